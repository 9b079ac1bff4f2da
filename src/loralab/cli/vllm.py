"""serve --engine vllm: the store's adapters, prepared and handed over."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.errors import ConfigError
from loralab.values import check_choice

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo

ENGINES = ("loralab", "vllm")
OWN_ENGINE_OPTIONS = (
    "cache_memory",
    "queue",
    "step_tokens",
    "quantize",
    "timeout",
    "keep_alive",
    "connections",
)  # it has other words for them


def require_ours(engine: str, python: str | None, arguments: str) -> None:
    """Refuse what only another engine would hear, and engines that there are not.

    Raises:
        ConfigError: an option would have no effect.
    """
    check_choice("engine", engine, ENGINES)
    for flag, given in (("--engine-python", python), ("--engine-args", arguments)):
        if given:
            raise ConfigError(f"{flag} has no effect with --engine {engine}", code="no_effect", field=flag)


def serve_by_vllm(
    asked: Mapping[str, Any], host: str, port: int, python: str | None, arguments: str, as_json: bool
) -> int:
    """Serve a store by vLLM until it ends; its exit code.

    Args:
        asked: what our own engine would be opened with.

    Raises:
        InputError: the base, the store or an option is wrong, or vLLM is not there.
    """
    from loralab.serving.vllm import find_python

    model, store, settings = asked["model"], asked["store"], asked["settings"]
    further, found = _engine_arguments(arguments), find_python(python)
    from loralab.artefacts.export_copies import prepare
    from loralab.models import load as models
    from loralab.models.kinds import CAUSAL
    from loralab.models.source import resolve
    from loralab.serving.adapters.names import base_id
    from loralab.serving.adapters.store import Store
    from loralab.serving.http.server import address, open_socket
    from loralab.serving.vllm import VllmOptions, run

    if (kind := models.natural_kind(model)) != CAUSAL:
        text = f"{model} is a model of kind {kind}; vLLM is given language models alone"
        raise ConfigError(text, code="unserved_kind", field="model")
    if not store.is_dir():
        raise ConfigError(
            f"there is no store at {store}; give a folder that contains adapters", code="no_store", field="store"
        )
    shown = base_id(str(Path(model).resolve()) if Path(model).is_dir() else model)
    adapter_store = Store(store, lambda stored: None, resident=settings.resident, reserved=(shown,))
    for name, path in asked["adapters"].items():
        adapter_store.load(name, str(path))
    prepared = prepare({entry.name: entry.path for entry in adapter_store.entries()}, model)
    with open_socket(host, port) as opened:
        where, port = address(opened), opened.getsockname()[1]
    run_as = VllmOptions(
        python=found,
        source=resolve(model),
        name=shown,
        adapters=prepared.ready,
        rank=prepared.rank,
        store=store.resolve(),
        host=host,
        port=port,
        settings=settings,
        further=further,
    )
    left_out = {**adapter_store.refused, **prepared.refused}
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if not any(word.startswith("--chat-template") for word in further):
        ready_entries = [entry for entry in adapter_store.entries() if entry.name in prepared.ready]
        say_differing(ready_entries, run_as.source, shown)
    ready = {"url": where, "model": shown, "kind": CAUSAL, "adapters": list(prepared.ready)}
    return run(run_as, lambda: _say_ready(ready, as_json))


def _engine_arguments(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--engine-args {text!r}: {error}", code="invalid_value", field="engine_args") from None


def say_differing(entries: Sequence["AdapterInfo"], source: str, shown: str) -> None:
    """Name the adapters that were trained with another chat template than vLLM will ask with."""
    from transformers import AutoTokenizer

    from loralab.models.identity import tokenizer_changes
    from loralab.models.kinds import CAUSAL
    from loralab.models.load import Base

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    base = Base(name=shown, model=None, tokenizer=tokenizer, kind=CAUSAL, source=source)
    for entry in entries:
        for _, text in tokenizer_changes(base, dict(entry.tokenizer_overrides)).values():
            print(
                f"warning: vLLM asks {entry.name} with {text} of {shown}, not with the one that it "
                "was trained with; --engine-args '--chat-template FILE' names one for all",
                file=sys.stderr,
            )


def require_vllms(typed: Mapping[str, Any], keys: Path | None, pin: Any, ours: Any) -> None:
    """Refuse what vLLM has no word for.

    Args:
        ours: what only loralab's own engine knows, if anything was given.

    Raises:
        ConfigError: an option would have no effect.
    """
    unheard = [f"--{name.replace('_', '-')}" for name in OWN_ENGINE_OPTIONS if name in typed]
    unheard += ["--pin"] if pin else []
    if unheard:
        raise ConfigError(
            f"{unheard[0]} is not passed on to vLLM; say it in vLLM's own words with --engine-args",
            code="not_passed_on",
            field=unheard[0],
        )
    if ours:
        raise ConfigError(
            "--ray, --replicas, --allow-host and --allow-origin are for loralab's own engine",
            code="not_passed_on",
            field="engine",
        )
    if keys is not None:
        raise ConfigError(
            "--keys is not passed on to vLLM, which knows neither quotas nor adapters of a key; "
            "--engine-args '--api-key ...' asks every client for one",
            code="not_passed_on",
            field="keys",
        )


def _say_ready(ready: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(ready, ensure_ascii=False), flush=True)
        return
    names = ", ".join(ready["adapters"]) or "none yet"
    print(f"{ready['model']} at {ready['url']}/v1 by vLLM; adapters: {names}", flush=True)
