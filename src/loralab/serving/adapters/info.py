"""Read what the small files of an adapter folder say about it.

No tensor is read here: a store of a thousand adapters opens in a moment.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters.folder import CONFIG, RECORD, TENSORS
from loralab.adapters.peft_fields import TASK_TYPES
from loralab.adapters.record import FORMAT
from loralab.adapters.registry import MethodSpec, spec_of_file, specs
from loralab.errors import AdapterFileError
from loralab.models.kinds import SCORED_PAIRS, SENTENCES
from loralab.serving.adapters.names import DIGEST
from loralab.serving.request import AdapterPart
from loralab.tasks.kinds.kind import Kind
from loralab.tasks.kinds.registry import kinds

FURTHER = ("trainable_token_indices", "target_parameters", "lora_bias")  # what peft's LORA may have besides
EMBEDDING_KINDS = (SENTENCES, SCORED_PAIRS)
OVERRIDES = ("chat_template", "eos_token")  # of a tokenizer, that an adapter may have its own of


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """An adapter as the store lists it, or a sum of some (sums.py).

    Attributes:
        digest: of its content; empty as long as a folder without loralab.json was not read.
        method: as --method has it, such as dora.
        bytes: of the tensors on disk.
        metrics: of the validation.
        kind: of the base in training, as models/kinds.py calls it.
        prefix_tokens: tokens that stand before every input.
        form: of the rows that it was trained on; `instruction` is what stood before them.
        tokenizer_overrides: chat template and end of text of the tokenizer in training, as far as known.
        beyond_low_rank: what it has beside low-rank updates, which cannot be added to others'; empty if nothing.
        parts: of a sum; empty for an adapter of the store.
    """

    name: str
    digest: str
    method: str
    rank: int | None
    bytes: int
    task: str | None
    labels: tuple[str, ...]
    metrics: Mapping[str, float]
    base: str | None
    kind: str | None
    prefix_tokens: int
    loaded: bool
    pinned: bool
    path: Path
    form: str | None = None
    instruction: str | None = None
    tokenizer_overrides: tuple[tuple[str, str | None], ...] = ()
    beyond_low_rank: str = ""
    parts: tuple[AdapterPart, ...] = ()

    @property
    def embeds(self) -> bool:
        """Return whether it was trained to make vectors of texts."""
        return self.kind in EMBEDDING_KINDS

    @property
    def score(self) -> tuple[str, float] | None:
        """Return the task's main metric and its value; None where nothing was measured."""
        main = (kinds().get(self.kind or "") or Kind).main
        name = next((name for name in (*main, *self.metrics) if name in self.metrics), None)
        return None if name is None else (name, self.metrics[name])


def describe(
    name: str, path: Path, fields: Mapping[str, Any], record: Mapping[str, Any], size: int | None
) -> AdapterInfo:
    """Build the store's entry for an adapter folder, neither loaded nor pinned.

    Args:
        fields: the content of adapter_config.json; `record` that of loralab.json.
        size: of the tensors, in bytes; None if there are none.

    Raises:
        AdapterFileError: the tensors are missing, or the method is not known.
    """
    if size is None:
        raise AdapterFileError(f"{path} has no {TENSORS}", code="no_tensors", field="path")
    kind = fields.get("peft_type")
    spec = spec_of_file(kind, f"{path / CONFIG}: ")
    digest = record.get("digest", "")
    if record and (record.get("format", FORMAT) != FORMAT or not _is_digest(digest)):
        raise AdapterFileError(
            f"{path / RECORD} must have format {FORMAT} and a digest, found {record.get('format')!r} and {digest!r}",
            code="unknown_format",
            field="format",
        )
    base, task, metrics = (section(record, key) for key in ("base", "task", "metrics"))
    labels = task.get("labels")
    return AdapterInfo(
        name=name,
        digest=digest,
        method=method_of(fields, record),
        rank=_count(fields.get("r")),
        bytes=size,
        task=_text(task.get("name")),
        labels=tuple(map(str, labels)) if isinstance(labels, list) else (),
        metrics=_numbers(section(metrics, "validation")),
        base=_text(base.get("name")) or _text(fields.get("base_model_name_or_path")),
        kind=_text(base.get("kind")) or _kind(fields.get("task_type")),
        prefix_tokens=(_count(fields.get("num_virtual_tokens")) or 0) if spec.prefix_kv else 0,
        loaded=False,
        pinned=False,
        path=path,
        form=_text(task.get("format")),
        instruction=_text(task.get("instruction")),
        tokenizer_overrides=_tokenizer_overrides(section(record, "tokenizer")),
        beyond_low_rank=_beyond_low_rank(spec, fields),
    )


def method_of(fields: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the name that --method has for how an adapter was trained.

    loralab.json knows the options; where another tool wrote the folder, adapter_config.json says
    what is left of them.

    Args:
        fields: the content of adapter_config.json, with a peft_type; `record` that of loralab.json.
    """
    own, options = section(record, "method"), section(record, "training")
    spec = next((s for s in specs().values() if s.name == own.get("name")), None)
    if spec is None:
        spec = spec_of_file(fields["peft_type"])
        init = str(fields.get("init_lora_weights"))
        own = {
            **fields,
            "dora": fields.get("use_dora"),
            "mlp": fields.get("prefix_projection"),
            "scaling": "alpha/sqrt(r)" if fields.get("use_rslora") else None,
            "init": "pissa" if init.startswith("pissa") else None,
        }
    given = {**options, **own}
    return next(
        (
            variant
            for variant, wanted in spec.variants.items()
            if all(_is_so(given.get(key), wanted[key]) for key in wanted)
        ),
        spec.name,
    )


def _beyond_low_rank(spec: MethodSpec, fields: Mapping[str, Any]) -> str:
    """Return the first thing that an adapter has beside low-rank updates; empty if there is none."""
    if not spec.low_rank:
        return f"updates of the kind {spec.name}"
    usual = {"use_dora": (), "modules_to_save": (), "bias": ("none",), **dict.fromkeys(FURTHER, ())}
    return next((name for name, values in usual.items() if fields.get(name) and fields[name] not in values), "")


def _is_so(value: Any, wanted: Any) -> bool:
    """Return whether an option makes a variant: the papers' own factor, or any other but 1."""
    if isinstance(wanted, float):
        return isinstance(value, int | float) and value != 1
    return bool(value == wanted)


def section(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a record that should be an object; an empty one where it is none."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _tokenizer_overrides(tokenizer: Mapping[str, Any]) -> tuple[tuple[str, str | None], ...]:
    """Return what is stored of it; a template that many adapters share is kept once."""
    found = [(name, tokenizer[name]) for name in OVERRIDES if name in tokenizer]
    return tuple((name, sys.intern(t) if type(t) is str else None) for name, t in found)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _kind(task_type: Any) -> str | None:
    return next((kind for kind, name in TASK_TYPES.items() if name == task_type), None)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {n: v for n, v in values.items() if isinstance(v, int | float)}
    return {n: float(v) for n, v in numbers.items() if abs(v) < sys.float_info.max}
