"""The engines that an audit can ask: what makes each of them answer, and whether it is installed."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from loralab.adapters import registry
from loralab.adapters.folder import CONFIG, read_json
from loralab.artefacts import gguf_adapter
from loralab.artefacts.audit.answers import Answers, answers_of, read_answers
from loralab.artefacts.audit.gguf_base import write_base
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.engines import VLLM_RANKS, allowed_rank, require
from loralab.errors import LoralabError, RunError
from loralab.models import load as models
from loralab.models.kinds import CAUSAL
from loralab.models.source import resolve
from loralab.models.tokens import add_tokens
from loralab.tasks.samples import MAX_POSITIONS

MOST_TOLD = 2048  # tokens of a place, by llama.cpp, which tells them one by one
MOST_BY_VLLM = 64  # each is an object of Python's on its way between processes
HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Question:
    """Prompts for an engine.

    Attributes:
        base: short name, folder, GGUF file or hub id.
        adapter: its folder; None asks the base alone.
        record: of the adapter, as loralab.json has it.
    """

    base: str
    adapter: Path | None
    record: Mapping[str, Any]
    prompts: Sequence[Sequence[int]]
    precision: str


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine.

    Attributes:
        ask: returns the answers to a question.
        python: returns the Python that has it; None if it is not installed.
        install: how to get it.
        precision: that it computes in, whatever is asked for; None is what is asked for.
    """

    ask: Callable[[Question], Answers]
    python: Callable[[], str | None]
    install: str
    precision: str | None = None


def _ours(question: Question) -> Answers:
    asked = _asked(question, base=question.base, precision=question.precision)
    return read_answers(_in_subprocess([sys.executable, "-m", "loralab.serving.audit_answers"], asked, "safetensors"))


def _peft(question: Question) -> Answers:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it warns of kernels not needed
    from peft import PeftModel

    base = models.load(question.base, kind=CAUSAL, dtype=models.parse_dtype(question.precision))
    add_tokens(base, question.record.get("tokenizer", {}).get("new_tokens", ()))
    model: Any = base.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between peft and transformers
        if question.adapter is not None:
            model = PeftModel.from_pretrained(model, str(question.adapter)).eval()
    return answers_of(logits_of(model, question.prompts, base.kind, base.tokenizer))


def _vllm(question: Question) -> Answers:
    rank = VLLM_RANKS[0]
    if question.adapter is not None:
        fields = read_json(question.adapter / CONFIG)
        rank = max(fields.get("r") or rank, *(fields.get("rank_pattern") or {}).values(), rank)
        if rank > VLLM_RANKS[-1]:
            raise RunError(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this is {rank}", code="rank_too_large")
    config = models.configuration(question.base)
    asked = _asked(question, model=resolve(question.base), rank=allowed_rank(rank), precision=question.precision)
    asked["most"] = min(MOST_BY_VLLM, config.get_text_config().vocab_size)
    return read_answers(_in_subprocess([_python_with("vllm")() or "", str(HERE / "ask_vllm.py")], asked, "npz"))


def _llama_cpp(question: Question) -> Answers:
    base = models.load(question.base, kind=CAUSAL)
    with tempfile.TemporaryDirectory() as place:
        asked = _asked(question, model=str(Path(place) / "base.gguf"))
        asked["most"] = min(MOST_TOLD, base.model.config.vocab_size)
        write_base(Path(asked["model"]), base.model)
        if question.adapter is not None:
            asked["adapter"] = str(Path(place) / gguf_adapter.FILE)
            stored = require(question.adapter, "gguf", question.base)
            gguf_adapter.write(Path(asked["adapter"]), stored, base.model.config)
        del base
        return read_answers(_in_subprocess([_llama_python() or "", str(HERE / "ask_llama_cpp.py")], asked, "npz"))


def _asked(question: Question, **more: Any) -> dict[str, Any]:
    adapter = None if question.adapter is None else str(question.adapter.resolve())
    prompts = [list(ids) for ids in question.prompts]
    return {"adapter": adapter, "prompts": prompts, "positions": MAX_POSITIONS, **more}


def _in_subprocess(command: Sequence[str], asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the arrays that a process writes.

    Raises:
        RunError: it gave no answer.
    """
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.json", Path(place) / f"answer.{kind}"
        request.write_text(json.dumps(asked), encoding="utf-8")
        environment = {**os.environ, **registry.environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)  # of this Python
        done = subprocess.run(
            [*command, str(request), str(answer)], capture_output=True, text=True, check=False, env=environment
        )
        if not answer.is_file():
            raise RunError(_last_line(done.stderr) or f"exit code {done.returncode}", code="no_answer", field="engines")
        if kind == "safetensors":
            return dict(safetensors.torch.load_file(answer))
        with numpy.load(answer, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays}


def _last_line(text: str) -> str:
    """Return the last line that names an error, or else the last one; none that only points to another."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "stack trace" not in line]
    named = [line for line in lines if "Error" in line or "error" in line]
    return (named or lines or [""])[-1][:300]


def _python_with(package: str) -> Callable[[], str | None]:
    """Return what finds the Python that has a package: this one, or that of LORALAB_..._PYTHON."""

    def find() -> str | None:
        if named := os.environ.get(f"LORALAB_{package.upper()}_PYTHON"):
            return named
        return sys.executable if importlib.util.find_spec(package) is not None else None

    return find


def _llama_python() -> str | None:
    if named := os.environ.get("LORALAB_LLAMA_PYTHON"):
        return named
    here = any(importlib.util.find_spec(name) for name in ("llama_cpp", "xllamacpp"))
    return sys.executable if here else None


def answer(engine: Engine, question: Question) -> Answers | str:
    """Return the answers of an engine, or why it gave none."""
    try:
        return engine.ask(question)
    except (LoralabError, OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
        return " ".join(str(error).split())[:300] or type(error).__name__


ENGINES: dict[str, Engine] = {
    "ours": Engine(ask=_ours, python=lambda: sys.executable, install=""),
    "peft": Engine(ask=_peft, python=_python_with("peft"), install="pip install peft"),
    "vllm": Engine(
        ask=_vllm,
        python=_python_with("vllm"),
        install="pip install vllm, here or in an environment whose Python LORALAB_VLLM_PYTHON names",
    ),
    "llama.cpp": Engine(
        ask=_llama_cpp,
        python=_llama_python,
        install="pip install xllamacpp (or llama-cpp-python), here or in an environment whose Python "
        "LORALAB_LLAMA_PYTHON names",
        precision="fp16",  # its products round activations to half precision in places
    ),
}
