"""The text of a model card, as Markdown.

Values of a folder may be anybody's: they can neither end a table, nor be markup, nor be a link.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from loralab.adapters.registry import specs
from loralab.artefacts.artefact import ADAPTER, GGUF, Artefact
from loralab.artefacts.loading_snippets import PLAIN_MODEL, place_of, snippets_for
from loralab.errors import join_limited, one_line
from loralab.models.catalog import MODELS

MAX_VALUE = 300  # characters of a value in a table
SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$!&])")
NOT_TOLD = ("memory_budget", "processes", "shard_base", "pass_tokens")  # of the machine, not of the result
Rows = Iterable[tuple[str, Any]]


def body(artefact: Artefact) -> str:
    """Return all that follows the front matter."""
    parts = [
        f"# {escaped(artefact.name)}",
        _summary(artefact),
        _section("Results", _results(artefact), "None are recorded."),
        _section("Certificate", _certificate(artefact), "It was never compared with a live model."),
        _section("Data", _table(_data(artefact)), "None is recorded."),
        _section("Training", _table(_arguments(artefact)), "No arguments are recorded."),
        _loading(artefact),
    ]
    if versions := artefact.part("versions"):
        parts.append(f"Made with {escaped(', '.join(f'{name} {version}' for name, version in versions.items()))}.")
    return "\n\n".join(parts) + "\n"


def escaped(value: Any) -> str:
    """Return a value as plain text on one line of Markdown."""
    text = one_line(str(value))
    text = text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"
    return SPECIAL.sub(r"\\\1", text)


def _summary(artefact: Artefact) -> str:
    """Return in one paragraph what this is."""
    what = {ADAPTER: f"An adapter ({escaped(_method(artefact))}) for", GGUF: "An adapter for llama.cpp, of"}
    start = what.get(artefact.form, "A full model: an adapter merged into")
    base = escaped(artefact.base_name) or "a base model without a recorded name"
    text = f"{start} {base} ({escaped(artefact.kind)}), made and checked by loralab."
    if artefact.short_name and artefact.base_id:
        told = MODELS[artefact.short_name].description
        text += f" Training read `{artefact.short_name}` ({told}); other files of the base can answer otherwise."
    return text


def _method(artefact: Artefact) -> str:
    """Return a method as its class is called; the name of one that is not known here."""
    known = specs().get(artefact.method)
    return known.config.__name__ if known else artefact.method


def _results(artefact: Artefact) -> str:
    metrics = artefact.part("metrics").get("validation")
    if not metrics:
        return ""
    rows, most = artefact.part("task").get("rows"), artefact.part("training").get("evaluation_rows")
    held = rows.get("validation") if isinstance(rows, Mapping) else None
    counts = [n for n in (held, most) if isinstance(n, int)]
    start = f"On {min(counts)} validation rows" if counts else "On validation rows"
    steps, best = artefact.record.get("steps"), artefact.record.get("best_step")
    after = f", with the weights of step {best} of {steps}" if isinstance(steps, int) and isinstance(best, int) else ""
    return f"{start}{after}:\n\n{_table((name, f'{value:.4f}') for name, value in metrics.items())}"


def _certificate(artefact: Artefact) -> str:
    found = artefact.part("certificate")
    wanted = ("passed", "precision", "prompts", "positions", "max_logit_difference", "mean_kl", "top1_agreement")
    if not found:
        return ""
    start = "What was saved was reloaded in a fresh process and compared with the live model on the task's own prompts"
    shown = {name: found[name] for name in (*wanted, "device", "base") if found.get(name) is not None}
    numbers = ((n.replace("_", " "), f"{v:.3g}" if isinstance(v, float) else v) for n, v in shown.items())
    return f"{start}; `loralab verify` repeats it.\n\n{_table(numbers)}"


def _data(artefact: Artefact) -> Rows:
    task = artefact.part("task")
    if artefact.data_name:
        yield "name", artefact.data_name
    if task.get("format"):
        yield "columns", task["format"]
    if isinstance(task.get("rows"), Mapping):
        yield "rows", ", ".join(f"{split} {count}" for split, count in task["rows"].items())
    if task.get("labels"):
        yield "labels", join_limited(map(str, task["labels"]), 20)
    if task.get("instruction"):
        yield "question", task["instruction"]
    if task.get("digest"):
        yield "digest", task["digest"]


def _arguments(artefact: Artefact) -> Rows:
    """Yield the method's fields and the training's, of those that are given."""
    method = dict(artefact.part("method"))
    own = {"method": method.pop("name", None), **method, **artefact.part("training")}
    base = artefact.part("base")
    own |= {name: base[name] for name in ("precision", "quantize", "image_size") if base.get(name)}
    for name, value in own.items():
        if value not in (None, "", [], {}, ()) and name not in NOT_TOLD:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


def _loading(artefact: Artefact) -> str:
    stands = f"`{place_of(artefact)}` stands for this folder" + ("" if artefact.repo else ", or for its id on a hub")
    stands += "" if artefact.base_id else f"; `{PLAIN_MODEL}` for the base model"
    parts = [f"## How to load it\n\n{stands}."]
    for own in snippets_for(artefact):
        remark = f": {escaped(own.remark)}" if own.remark else ""
        code = f"\n\n```{own.language}\n{own.code}\n```" if own.code else ""
        parts.append(f"**{own.engine}**{remark}{code}")
    return "\n\n".join(parts)


def _section(title: str, content: str, otherwise: str) -> str:
    return f"## {title}\n\n{content or otherwise}"


def _table(rows: Rows) -> str:
    """Return two columns; empty if there are no rows."""
    lines = [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""
