"""Load an adapter folder together with the base that it names."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.adapters import folder
from loralab.adapters.adapter import Adapter
from loralab.adapters.folder import AdapterFolder, read_json
from loralab.adapters.load import load as load_adapter
from loralab.adapters.several import attached
from loralab.errors import AdapterFileError
from loralab.models import load as models
from loralab.models.given import Given, given
from loralab.models.identity import as_trained
from loralab.models.kinds import HEADS, LOADERS
from loralab.models.load import Base
from loralab.models.quantize import quantize as pack
from loralab.models.tokens import add_tokens
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.samples import patterns

Ids = Sequence[int]
_SENTENCES = (
    "The meeting was moved to Thursday because the trains were late.",
    "Write one sentence about the sea.",
    "What is the capital of France?",
    "今天的天氣很好,我們去公園走走。",
    "def area(width, height): return width * height",
    "Is this review positive or negative? A slow start, then a wonderful second half.",
)


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """Base model with an adapter in it."""

    base: Base
    adapter: Adapter
    stored: AdapterFolder
    precision: str


def load_with_base(
    path: str | Path, *, model: Any = None, tokenizer: Any = None, precision: str | None = None, device: str = "cpu"
) -> LoadedAdapter:
    """Load an adapter folder onto its base, which is asked as it was in the adapter's training.

    Args:
        model: the base; None is the one that the folder names. Of a live model with its
            `tokenizer` a copy is used, without the adapters that are in it.
        precision: fp32, bf16 or fp16; None is that of the training, or fp32, and of a live model
            its own.
        device: where to.

    Raises:
        AdapterFileError: the folder is damaged, or names no base.
    """
    stored = folder.read(path)
    record = stored.record.get("base", {})
    name = model
    if name is None:
        name = record.get("name")
        name = name or read_json(Path(path) / folder.CONFIG).get("base_model_name_or_path")
    if name is None or name == "":
        raise AdapterFileError(
            f"{path} does not name its base model; give it with --model", code="base_needed", field="model"
        )
    name = str(name) if isinstance(name, Path) else name
    own = given(name, tokenizer)
    if own is not None:
        precision = own.precision(precision or "auto")
        base = _copied(own, stored)
    else:
        precision = precision or record.get("precision") or "fp32"
        base = _loaded(name, stored, precision)
    base.model.to(device)
    if (how := record.get("quantize", "none")) != "none":
        pack(base.model, how, base.name)
    prompts = stored.record.get("tokenizer", {})
    add_tokens(base, prompts.get("new_tokens", ()))
    adapter = load_adapter(base.model, path)
    base = as_trained(base, prompts, path)
    return LoadedAdapter(base=base, adapter=adapter, stored=stored, precision=precision)


def on_base(path: str | Path, base: str | Path, *, device: str = "cpu") -> LoadedAdapter:
    """Load an adapter folder onto a base as transformers alone reads it, without a tokenizer.

    The base's kind and precision are those that the adapter's record names.

    Raises:
        AdapterFileError: the folder is damaged, or does not fit the base.
    """
    stored = folder.read(path)
    kind, precision = (stored.record["base"][name] for name in ("kind", "precision"))
    labels = len(label_names(stored)) if kind in HEADS else 0
    model = LOADERS[kind].from_pretrained(
        str(base),
        dtype=models.parse_dtype(precision),
        use_safetensors=True,
        **({"num_labels": labels} if labels else {}),
    )
    adapter = load_adapter(model.to(device).eval(), path)
    whole = Base(name=str(base), model=model, tokenizer=None, kind=kind, source=str(base))
    return LoadedAdapter(base=whole, adapter=adapter, stored=stored, precision=precision)


def _copied(own: Given, stored: AdapterFolder) -> Base:
    """Return a copy of a live model without its adapters, as the adapter's training needs it."""
    record = stored.record.get("base", {})
    copied = Given(copy.deepcopy(own.model), own.tokenizer)
    for other in attached(copied.model).values():
        other.detach()
    return copied.base(record.get("kind") or "", labels=label_names(stored), image_size=record.get("image_size"))


def _loaded(name: str, stored: AdapterFolder, precision: str) -> Base:
    """Return a base by name, as the adapter's training needs it."""
    record = stored.record.get("base", {})
    kind = record.get("kind") or models.natural_kind(name)
    # whatever is new in the base and not in the folder, such as a pooler, starts as in training
    seed = stored.record.get("training", {}).get("seed", 0)
    return models.load(
        name,
        kind=kind,
        dtype=models.parse_dtype(precision),
        labels=label_names(stored),
        seed=seed,
        image_size=record.get("image_size"),
    )


def label_names(stored: AdapterFolder) -> list[str]:
    """Return the classes of a trained head: as recorded, or numbered where another tool wrote it."""
    if labels := stored.record.get("task", {}).get("labels"):
        return [str(label) for label in labels]
    heads = [
        tensor
        for key, tensor in stored.tensors.items()
        if ".lora_" not in key and any(f".{head}." in key for head in ("classifier", "score"))
    ]
    return [f"LABEL_{index}" for index in range(min((len(head) for head in heads), default=0))]


def sample_of(record: Mapping[str, Any], base: Base) -> list[list[int]]:
    """Return the task's own inputs that a run recorded, or some sentences."""
    if sample := record.get("sample"):
        return [list(ids) for ids in sample]
    if kind_named(base.kind).pictures:
        return [list(values) for values in patterns()]
    return [base.tokenizer(text)["input_ids"] for text in _SENTENCES]
