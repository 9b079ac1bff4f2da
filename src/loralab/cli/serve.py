"""serve."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.cli.app import app
from loralab.cli.arguments import DEFAULT_MODEL, Json, Model
from loralab.cli.options import build, with_options
from loralab.cli.vllm import require_ours, require_vllms, serve_by_vllm
from loralab.cli.working import working
from loralab.errors import ConfigError
from loralab.serving.settings import Limits, ServeSettings

if TYPE_CHECKING:
    from loralab.serving.http.keys import Keys
    from loralab.serving.http.service import ServerInfo

MAX_LISTED_ADAPTERS = 12  # adapters that are named at the start
INSTALL = "pip install 'loralab[serve]'"
AllowHost = Annotated[list[str] | None, typer.Option(help="extra allowed host name; may be repeated")]
AllowOrigin = Annotated[
    list[str] | None, typer.Option(help="allowed CORS origin such as https://chat.example.org; may be repeated")
]


@app.command()
@with_options(ServeSettings, Limits)
def serve(
    model: Model = None,
    store: Annotated[Path | None, typer.Option(help="a folder of adapter folders", show_default=False)] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH inside the store; may be repeated")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="an adapter that stays in memory; may be repeated")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one", min=0, max=65535)] = 8000,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    keys: Annotated[Path | None, typer.Option(help="TOML file of API keys")] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="serve without API keys on any address")] = False,
    engine_name: Annotated[str, typer.Option("--engine", help="loralab or vllm")] = "loralab",
    engine_python: Annotated[
        str | None, typer.Option(help="Python interpreter with vLLM installed", show_default=False)
    ] = None,
    engine_args: Annotated[str, typer.Option(help="extra arguments for vLLM, as one string")] = "",
    replicas: Annotated[int | None, typer.Option(help="number of engines, with --ray", min=1)] = None,
    ray: Annotated[str | None, typer.Option(help="a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT")] = None,
    json_: Json = False,
    typed: dict[str, Any] | None = None,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API, with a page to try them."""
    settings, limits = build(ServeSettings, typed or {}), build(Limits, typed or {})
    if store is None:
        raise ConfigError("give --store, a folder of adapter folders", code="missing_option", field="store")
    _require_extra()
    from loralab.serving.serve import keys_for, rules_for, serve_by

    asked: dict[str, Any] = {
        "model": model or DEFAULT_MODEL,
        "store": store.resolve(),
        "settings": settings,
        "adapters": _named_paths(adapter or []),
        "pinned": pin or [],
    }
    if engine_name == "vllm":
        require_vllms(typed or {}, keys, pin, ray or replicas or allow_host or allow_origin)
        keys_for(host, None, no_keys=no_keys)
        raise typer.Exit(serve_by_vllm(asked, host, port, engine_python, engine_args, json_))
    require_ours(engine_name, engine_python, engine_args)
    known = keys_for(host, keys, no_keys=no_keys)
    rules = rules_for(host, known, limits, allow_host or [], allow_origin or [])
    if ray is not None or replicas is not None:
        _serve_replicas(asked | rules, replicas or 1, ray, host, port, known, json_)
    else:
        with ExitStack() as opening:
            opening.enter_context(working(f"opening {asked['model']} and the adapters of {store}", quiet=json_))

            def say(found: "ServerInfo", where: str, with_keys: bool) -> None:
                opening.close()
                _say_ready(found, where, with_keys, json_)

            serve_by(asked, host, port, known, rules, say)


def _named_paths(given: list[str]) -> dict[str, str | Path]:
    """Return the path of each NAME=PATH, each name once."""
    found: dict[str, str | Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--adapter expects NAME=PATH, got {text!r}", code="invalid_value", field="adapter")
        if name in found:
            raise ConfigError(f"--adapter names {name} twice", code="repeated_name", field="adapter")
        found[name] = path
    return found


def _require_extra() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}; get it with: {INSTALL}", code="not_installed", field="serve"
        ) from None
    assert fastapi
    assert prometheus_client
    assert uvicorn


def _serve_replicas(
    plan: dict[str, Any], count: int, ray: str | None, host: str, port: int, keys: "Keys | None", as_json: bool
) -> None:
    """Serve on a Ray cluster, until a signal ends it."""
    if ray is None:
        raise ConfigError(
            "--replicas needs --ray: local, or the address of a Ray cluster", code="missing_option", field="ray"
        )
    from loralab.serving.http.server import address, open_socket, wait_for_signal
    from loralab.serving.replicas import ReplicaPlan, running

    own = ReplicaPlan(**plan, keys=None if keys is None else keys.keys)
    with open_socket(host, port) as opened:  # it is free; Ray opens it itself
        where = address(opened)
    with running(own, count, ray, host, int(where.rpartition(":")[2])) as found:
        _say_ready(found, where, keys is not None, as_json)
        wait_for_signal()


def _say_ready(found: "ServerInfo", where: str, with_keys: bool, as_json: bool) -> None:
    """Print one line for machines, or a few for people."""
    base, adapters = found.base, list(found.adapters)
    if as_json:
        ready = {"url": where, "model": base, "kind": found.kind, "adapters": adapters}
        print(json.dumps(ready, ensure_ascii=False), flush=True)
        return
    more = f" and {len(adapters) - MAX_LISTED_ADAPTERS} more" if len(adapters) > MAX_LISTED_ADAPTERS else ""
    print(f"{base} at {where}, a page to try it, and {where}/v1 for clients of OpenAI's API")
    print(f"adapters: {', '.join(adapters[:MAX_LISTED_ADAPTERS]) or 'none yet'}{more}")
    for name, reason in found.refused.items():
        print(f"left out: {name}: {reason}")
    for way, reason in found.slower.items():
        print(f"slower than it could be: no {way} step, as {reason}")
    print(_example(found, where, (adapters or [base])[0], with_keys), flush=True)


def _example(found: "ServerInfo", where: str, model: str, with_keys: bool) -> str:
    """Return a command that asks something."""
    key = " -H 'Authorization: Bearer KEY'" if with_keys else ""
    bodies: dict[str, Any] = {
        "chat": {"messages": [{"role": "user", "content": "Hello"}]},
        "classify": {"input": {"image": "BASE64"} if found.kind == "image-classification" else "Hello"},
        "embeddings": {"input": "Hello"},
        "score": {"text_1": "Hello", "text_2": "Good morning"},
    }
    what = next((what for what in bodies if what in found.capabilities), "classify")
    path, body = "chat/completions" if what == "chat" else what, bodies[what]
    content = json.dumps({"model": model, **body}, ensure_ascii=False)
    return f"curl {where}/v1/{path}{key} -H 'Content-Type: application/json' -d '{content}'"
