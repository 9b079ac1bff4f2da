"""How an artefact is loaded elsewhere: in peft or transformers, vLLM, llama.cpp and loralab.

What an engine would refuse is said in place of a command: see engines.py.
"""

import json
import shlex
from dataclasses import dataclass

from loralab.artefacts.artefact import ADAPTER, MERGED, Artefact
from loralab.artefacts.engines import EXPORT, Verdict, allowed_rank, check
from loralab.artefacts.gguf_adapter import FILE
from loralab.artefacts.updates import updates
from loralab.models.kinds import CAUSAL, HEADS, LOADERS

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PLAIN_MODEL = "BASE"  # stands for a base that no hub is known to have


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """Lines of one engine; none where `remark` says why."""

    engine: str
    code: str = ""
    language: str = "sh"
    remark: str = ""


def snippets_for(artefact: Artefact) -> list[Snippet]:
    """Return the snippets of all engines."""
    if artefact.form == ADAPTER:
        return [_peft(artefact), _vllm(artefact), _llama_cpp(artefact), _loralab(artefact)]
    return _of_merged(artefact) if artefact.form == MERGED else _of_gguf(artefact)


def place_of(artefact: Artefact) -> str:
    """Return what stands for the folder in commands."""
    return artefact.repo or artefact.name


def _base(artefact: Artefact) -> str:
    return artefact.base_id or PLAIN_MODEL


def _peft(artefact: Artefact) -> Snippet:
    assert artefact.stored is not None
    verdict = check(artefact.path, target="peft")
    if not verdict.as_it_is:
        return Snippet(engine="peft", remark=_why_not(verdict))
    loader = LOADERS[artefact.kind].__name__
    labels = artefact.part("task").get("labels") or []
    options = f", num_labels={len(labels) or 1}" if artefact.kind in HEADS else ""
    options += f', dtype="{dtype}"' if (dtype := DTYPES.get(artefact.part("base").get("precision", ""))) else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({json.dumps(_base(artefact))}{options})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(place_of(artefact))})",
    ]
    new = artefact.part("tokenizer").get("new_tokens")
    remark = f"its tokenizer needs new tokens first: {', '.join(new)}" if new else ""
    return Snippet(engine="peft", language="python", code="\n".join(lines), remark=remark)


def _vllm(artefact: Artefact) -> Snippet:
    assert artefact.stored is not None
    verdict = check(artefact.path, target="vllm")
    if verdict.lasting:
        return Snippet(engine="vLLM", remark=_why_not(verdict))
    place, export = place_of(artefact), []
    if not verdict.as_it_is:
        place = "adapter-for-vllm"
        export = _exported(artefact, place, "vllm")
    rank = max((own.rank for own in updates(artefact.stored)), default=1)
    module = shlex.quote(f"{artefact.name}={place}")
    serve = f"vllm serve {_base(artefact)} --enable-lora --max-lora-rank {allowed_rank(rank)} --lora-modules {module}"
    return Snippet(engine="vLLM", code="\n".join([*export, serve]))


def _llama_cpp(artefact: Artefact) -> Snippet:
    verdict = check(artefact.path, target="gguf")
    if artefact.kind != CAUSAL or verdict.lasting:
        why = _why_not(verdict) if verdict.lasting else f"it runs no adapter of a base of kind {artefact.kind}"
        return Snippet(engine="llama.cpp", remark=why)
    export = _exported(artefact, "adapter-for-llama", "gguf")
    return Snippet(
        engine="llama.cpp", code="\n".join([*export, f"llama-cli -m BASE.gguf --lora adapter-for-llama/{FILE}"])
    )


def _loralab(artefact: Artefact) -> Snippet:
    """Return commands on the folder; one on a hub is brought here first."""
    get, place = _brought(artefact)
    ask = f"loralab evaluate --adapter {place} --data DATA"
    if artefact.kind == CAUSAL:
        ask = f"loralab generate --adapter {place} 'a prompt'"
    return Snippet(engine="loralab", code="\n".join([*get, f"loralab verify {place}", ask]))


def _of_merged(artefact: Artefact) -> list[Snippet]:
    loader, name = LOADERS[artefact.kind].__name__, json.dumps(place_of(artefact))
    lines = [f"from transformers import {loader}", "", f"model = {loader}.from_pretrained({name})"]
    get, place = _brought(artefact)
    own = [Snippet(engine="transformers", language="python", code="\n".join(lines))]
    if artefact.kind == CAUSAL:
        own.append(Snippet(engine="vLLM", code=f"vllm serve {shlex.quote(place_of(artefact))}"))
        make = f"python convert_hf_to_gguf.py {place} --outfile model.gguf"
        own.append(Snippet(engine="llama.cpp", code="\n".join([*get, make, "llama-cli -m model.gguf"])))
    ask = f"loralab {'generate' if artefact.kind == CAUSAL else 'evaluate'} --model {place}"
    ask += " 'a prompt'" if artefact.kind == CAUSAL else " --data DATA"
    return [*own, Snippet(engine="loralab", code="\n".join([*get, f"loralab verify {place}", ask]))]


def _of_gguf(artefact: Artefact) -> list[Snippet]:
    get, place = _brought(artefact)
    return [
        Snippet(engine="llama.cpp", code="\n".join([*get, f"llama-cli -m BASE.gguf --lora {place}/{FILE}"])),
        Snippet(engine="loralab", code="\n".join([*get, f"loralab verify {place}"])),
    ]


def _exported(artefact: Artefact, output: str, to: str) -> list[str]:
    """Return commands that write an adapter in another form; only a folder that is here can be read."""
    get, place = _brought(artefact)
    return [*get, f"loralab export {place} {output} --to {to}"]


def _brought(artefact: Artefact) -> tuple[list[str], str]:
    """Return commands that bring a folder from the hub, and its name then."""
    name = shlex.quote(artefact.name)
    return ([f"hf download {artefact.repo} --local-dir {name}"] if artefact.repo else []), name


def _why_not(verdict: Verdict) -> str:
    remedies = {one.remedy for one in verdict.obstacles}
    way = "; `loralab export` writes it" if remedies == {EXPORT} else ""
    way = "; a merged model has it (`loralab merge`)" if remedies == {"merge"} else way
    return f"not as it is: {'; '.join(one.what for one in verdict.obstacles)}{way}"
