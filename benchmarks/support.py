"""Which model types can be adapted: every step on a tiny random model of each, by loralab and back by peft.

Each type runs in a process of its own, within a time limit. What is done is kept in the file of `--json`
and not done again; `--fresh` begins anew. `--docs FILE` writes the page.

    python benchmarks/support.py [--only llama,t5] [--jobs 2] [--json results/support.json] [--docs ../docs/support.md]
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import support_models as tiny
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loralab
from loralab.adapters.paths import inside
from loralab.errors import LoralabError

Row = dict[str, Any]
COLUMNS = {  # a cell -> its heading on the page
    "plan": "attach",
    "init": "B = 0 is the base",
    "train": "train",
    "merge": "merge",
    "files": "save, load",
    "peft": "peft reads it",
}
YES, SECONDS = "yes", 60.0
VERSIONS = ("torch", "transformers", "peft")
RANK, RATE, STEPS = 4, 1e-2, 2
TOLERANCE = 1e-4  # relative to the largest output; sums in another order
MIN_SIDE = 16  # of a matrix that could be a layer: widths are larger, states and heads smaller
PEFT = """Where the sizes of experts differ in peft: among the targets it takes `gate_proj`, `up_proj` and `down_proj`
for those of experts, as transformers 4 had them, doubles the rank of `gate_up_proj` and adapts no dense layer of
these names. An adapter of the experts alone is read as it is (`--target-modules experts`)."""
HEADS = ("lm_head", "head", "classifier", "score")


class No(Exception):  # noqa: N818
    """A step that did not do what it should; the text is the reason."""


# -- one model type -------------------------------------------------------------------------------


class Trial:
    """The steps on one model, in order; each needs the ones before it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model: Any = tiny.build(name)
        self.batch = tiny.inputs(name, self.model)
        self.unadapted = 1.0

    def plan(self) -> str:
        """Attach to all linear layers; what is left out must be named."""
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.parameters = [name for name, _ in self.model.named_parameters()]
        self.base = self.outputs(self.model)
        weights = _weights(self.model)
        meant = [name for name in weights if _meant(self.model, name)]
        draw = torch.Generator().manual_seed(0)
        self.adapter = loralab.attach(self.model, loralab.LoRA(rank=RANK), generator=draw)
        reached = [n for n in weights if inside(n, list(self.adapter.modules))]
        self.unadapted = 1 - sum(weights[n] for n in reached) / max(1, sum(weights.values()))
        named = list(self.adapter.left_out)
        silent = [n for n in meant if n not in reached and not inside(n, named)]
        if silent:
            raise No(f"{len(silent)} weights are left out in silence, such as {silent[0]}")
        return "; ".join(self.adapter.notes)

    def init(self) -> str:
        """Compare the adapted model before training with the base."""
        _require_close(self.outputs(self.model), self.base, "with B = 0", 0.0)
        return ""

    def train(self) -> str:
        """Take steps: each parameter of the adapter moves, and nothing else does."""
        start = {id(p): p.detach().clone() for p in self.adapter.parameters()}
        names = {id(p): n for n, p in self.model.named_parameters()}
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=RATE)
        self.model.train()
        for step in range(STEPS):
            torch.manual_seed(step)
            loss = (self.outputs(self.model, grad=True) * 10).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.model.eval()
        still = [names[id(p)] for p in self.adapter.parameters() if torch.equal(p, start[id(p)])]
        now = _base_state(self.model, self.before)
        frozen = [n for n in self.parameters if n in now and not torch.equal(now[n], self.before[n])]
        if frozen:
            raise No(f"the base moved: {frozen[0]}")
        if still:
            raise No(f"{len(still)} of {len(start)} parameters did not move, such as {still[0]}")
        return ""

    def merge(self) -> str:
        """Compare merged with unmerged, and the base after unmerging with that before."""
        self.trained = self.outputs(self.model)
        if torch.allclose(self.trained, self.base):
            raise No("training changed no output")
        self.adapter.merge()
        _require_close(self.outputs(self.model), self.trained, "merged")
        self.adapter.unmerge()
        for name, tensor in _base_state(self.model, self.before).items():
            if not torch.equal(tensor, self.before[name]):
                raise No(f"unmerging did not restore {name}")
        return ""

    def files(self) -> str:
        """Compare a fresh model with the saved adapter."""
        self.adapter.save(self.folder)
        fresh = tiny.build(self.name)
        loralab.load(fresh, self.folder)
        _require_close(self.outputs(fresh), self.trained, "reloaded", 1e-6)
        return ""

    def peft(self) -> str:
        """Compare a fresh model with the same adapter, as peft reads it."""
        found = peft.PeftModel.from_pretrained(tiny.build(self.name), str(self.folder)).eval()
        _require_close(self.outputs(found), self.trained, "in peft")
        return ""

    def outputs(self, model: Any, *, grad: bool = False) -> Tensor:
        """Return a model's logits in fp32."""
        with torch.set_grad_enabled(grad):
            found: Tensor = model(**self.batch).logits.float()
        return found


def examine(name: str, folder: Path) -> Row:
    """Run every step on a type; a step that fails says why, and those that need it say so."""
    row: Row = {"kind": tiny.KINDS[name], "cells": {}, "note": "", "unadapted": 1.0}
    try:
        trial = Trial(name, folder)
    except Exception as error:
        row["cells"] = dict.fromkeys(COLUMNS, f"no tiny model: {_line(error)}")
        return row
    broken = ""
    for step in COLUMNS:
        note, cell = ("", broken) if broken else _cell(getattr(trial, step))
        row["cells"][step], row["note"] = cell, row["note"] or note
        if cell != YES and step in ("plan", "train", "files") and not _goes_on(trial, step):
            broken = f"not tried: {step} failed"
    row["unadapted"] = round(trial.unadapted, 4)
    return row


def _cell(step: Callable[[], str]) -> tuple[str, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return step(), YES
    except No as reason:
        return "", str(reason)
    except LoralabError as error:
        return "", f"refused: {_line(error)}"
    except Exception as error:
        return "", f"{type(error).__name__}: {_line(error)}"


def _goes_on(trial: Trial, step: str) -> bool:
    """Return whether a failed step still left what the later ones need."""
    needed = {"plan": "adapter", "train": "adapter", "files": ""}[step]
    return hasattr(trial, needed) if needed else (trial.folder / "adapter_config.json").exists()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _weights(model: nn.Module) -> dict[str, int]:
    """Return the matrices of a model by path -> how many numbers each has."""
    return {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2}


def _meant(model: nn.Module, name: str) -> bool:
    """Return whether all linear layers could mean a weight: not an embedding, a convolution or a head."""
    path, _, own = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    if isinstance(module, nn.Linear | Conv1D):
        return not any(part in HEADS for part in path.split("."))
    known = type(module).__module__.startswith("torch.nn") or "embed" in type(module).__name__.lower()
    return not known and "embed" not in own and "token" not in own and min(parameter.shape[-2:]) >= MIN_SIDE


def _base_state(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the base, by their names before it was adapted."""
    names = ((key, name) for key in model.state_dict() for name in (key, key.replace(".base.", ".")))
    state = model.state_dict()
    return {name: state[key] for key, name in names if name in before}


def _require_close(found: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    scale = max(1e-6, float(wanted.abs().max()))
    worst = float((found - wanted).abs().max()) / scale
    if not worst <= tolerance:
        raise No(f"{what}, outputs differ by {worst:.1e} of the largest")


# -- many, each in a process of its own -------------------------------------------------------------


def run(names: Sequence[str], *, jobs: int, seconds: float, done: Callable[[str, Row], None]) -> None:
    """Examine types in processes that are forked from this one; one that takes too long ends as a reason."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), dict[str, tuple[Any, Any]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_examined, args=(name, theirs))
            process.start()
            theirs.close()
            running[name] = (process, ours)
        time.sleep(0.02)
        for name, (process, ours) in list(running.items()):
            if (row := _result(process, ours, seconds)) is not None:
                del running[name]
                done(name, {"kind": tiny.KINDS[name], **row})


def _examined(name: str, answer: Any) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        answer.send(examine(name, Path(folder) / "adapter"))


def _result(process: Any, answer: Any, seconds: float) -> Row | None:
    """Return the row of a process; None as long as it works."""
    failed: Row = {"note": "", "unadapted": 1.0}
    try:
        row: Row | None = answer.recv() if answer.poll() else None
    except EOFError:
        row = {**failed, "cells": dict.fromkeys(COLUMNS, "the process ended early")}
    if row is None and _used(process.pid) > seconds:
        process.kill()
        row = {**failed, "cells": dict.fromkeys(COLUMNS, f"took more than {seconds:.0f} s of the processor")}
    if row is not None:
        process.join()
    return row


def _used(pid: int) -> float:
    """Return the processor seconds of a process: how long it takes depends on what else runs here."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- the page -----------------------------------------------------------------------------------------


def page(rows: Mapping[str, Row], versions: Mapping[str, str]) -> str:
    """Return the page: numbers, the table, and the reason of every cell that is not yes."""
    cells = [cell for row in rows.values() for cell in row["cells"].values()]
    yes = sum(cell == YES for cell in cells)
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# Model types",
        "Generated by `python benchmarks/support.py`: a tiny random model of each type, LoRA on all linear layers.\n"
        "*unadapted* is the share of all weight matrices without an update: embeddings, the output head, and what the\n"
        "notes below name. Embeddings are a larger share of the tiny models than of real ones.",
        f"{len(rows)} model types, {yes} of {len(cells)} cells yes ({yes / max(1, len(cells)):.1%}). With {used}.",
        _table(rows),
        "## What is not yes",
        "\n".join(_reasons(rows)) or "Nothing.",
        PEFT,
        "## What is left out, as `attach` and `loralab plan` say it",
        "\n".join(f"- {name}: {row['note']}" for name, row in rows.items() if row["note"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Row]) -> str:
    head = ["model type", "kind", *COLUMNS.values(), "unadapted"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        marks = [YES if row["cells"][column] == YES else "**no**" for column in COLUMNS]
        lines.append([f"`{name}`", row["kind"], *marks, f"{row['unadapted']:.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _reasons(rows: Mapping[str, Row]) -> list[str]:
    """Return a line for each type and reason, with the columns that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        for column, cell in row["cells"].items():
            if cell != YES:
                found.setdefault((name, cell), []).append(COLUMNS[column])
    return [f"- {name}, {', '.join(columns)}: {reason}" for (name, reason), columns in found.items()]


def main() -> None:
    """Examine what is not known yet, and write what is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="comma-separated model types")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, for one type")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "support.json")
    parser.add_argument("--docs", type=Path, help="the page to write")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    known: dict[str, Any] = {} if options.fresh or not options.json.exists() else json.loads(options.json.read_text())
    rows: dict[str, Row] = known.get("rows", {}) if known.get("versions") == versions else {}
    names = options.only.split(",") if options.only else list(tiny.KINDS)

    def done(name: str, row: Row) -> None:
        rows[name] = row
        kept = {one: rows[one] for one in tiny.KINDS if one in rows}
        options.json.write_text(json.dumps({"versions": versions, "rows": kept}, indent=1) + "\n")
        print(
            name, *(f"{column}: {cell}" for column, cell in row["cells"].items() if cell != YES), sep="\n  ", flush=True
        )

    run([name for name in names if name not in rows], jobs=options.jobs, seconds=options.seconds, done=done)
    if options.docs:
        options.docs.write_text(page({one: rows[one] for one in tiny.KINDS if one in rows}, versions), encoding="utf-8")


if __name__ == "__main__":
    main()
