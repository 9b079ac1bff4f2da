"""An adapter folder as changes of single tensors, without a model.

Read wider than `adapters/folder.py` does: what cannot be loaded here may still have been merged by
peft. What no weight can be said to hold is not decidable, with the reason.
Axes: I in_features, O out_features, R rank.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from loralab.adapters.expressions import matches
from loralab.adapters.folder import CONFIG, RECORD, TENSORS, content_digest, read_json
from loralab.adapters.methods import LoRA
from loralab.adapters.paths import ends_with
from loralab.adapters.peft_fields import INERT, PREFIX, SELECTING
from loralab.errors import AdapterFileError, InputError, format_value, join_limited
from loralab.models.weights import Stream, read_file, whole

# what ends a key: the adapter's name may stand in it where another tool wrote the state as it was
PART = re.compile(
    r"(?P<path>.*?)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l"
    r"|ranknum|(?:token_adapter\.)?trainable_tokens_delta)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<end>weight|bias))?"
)
SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "pissa_init")
UNDERSTOOD = INERT | SELECTING
LORA_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    *("init_lora_weights", "trainable_token_indices", "lora_bias", "target_parameters", "velora_config"),
}
ADALORA_FIELDS = LORA_FIELDS | {
    *("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
}
FIELDS = {
    "LORA": LORA_FIELDS,
    "ADALORA": ADALORA_FIELDS,
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "TRAINABLE_TOKENS": {"token_indices", "init_weights"},
}


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """scale / divisor * B A, with A (R, I) and B (O, R); of an embedding turned over.

    AdaLoRA has an E between the two, and a divisor: the rank, which peft divides by on its own.
    """

    A: Stream
    B: Stream
    scale: float
    divisor: float = 1.0
    kind: str = "linear"
    magnitude: Stream | None = None
    E: Stream | None = None

    def factors(self, turned: bool) -> tuple[Tensor, Tensor]:
        """Return (rows, R) and (R, columns) whose product is the update of the weight as it is stored."""
        A, B = whole(self.A), whole(self.B)
        A, B = A.flatten(1), B.flatten(1)
        return (A.T.contiguous(), B.T.contiguous()) if turned else (B, A)


@dataclass(kw_only=True, eq=False)
class ModuleChange:
    """Everything that an adapter does to one module."""

    path: str
    updates: list[LowRank] = field(default_factory=list)
    bias: tuple[Stream, float] | None = None
    scaling: Stream | None = None
    inputs_scaled: bool = False
    rows: tuple[int, ...] = ()
    row_values: Stream | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterChanges:
    """Changes that an adapter folder makes to a model.

    Attributes:
        modules: by path in the model.
        replaced: whole tensors by their names: modules trained in full, biases, new embeddings.
        bases: frozen weights under an update, which peft saves with those of embeddings and heads.
        undecidable: why no weight can be said to hold it; empty where one can.
    """

    path: Path
    fields: Mapping[str, Any]
    record: Mapping[str, Any]
    modules: Mapping[str, ModuleChange]
    replaced: Mapping[str, Stream]
    bases: Mapping[str, Stream]
    undecidable: str = ""

    @property
    def turned(self) -> bool:
        """Return whether the file says that weights are stored as (I, O)."""
        return bool(self.fields.get("fan_in_fan_out"))


def read_changes(path: Path) -> AdapterChanges:
    """Read an adapter folder of any tool.

    Raises:
        AdapterFileError: it is none, is damaged, or its parts do not fit each other.
    """
    fields, record, tensors = _content(path)
    kind = str(fields.get("peft_type"))
    groups, replaced = _grouped(tensors)
    updated = {_plain(name) for name, parts in groups.items() if parts.keys() & {"lora_A", "lora_embedding_A"}}
    bases = {k: t for k, t in replaced.items() if k.endswith(".weight") and k.removesuffix(".weight") in updated}
    reason = _undecidable(kind, fields)
    modules: dict[str, ModuleChange] = {}
    if not reason:
        try:
            config = _config(kind, fields)
            for name, parts in groups.items():
                change = modules.setdefault(_plain(name), ModuleChange(path=_plain(name)))
                _add(change, name, parts, kind, fields, config)
        except InputError as error:
            text = f"{path / CONFIG}: {error}"
            raise AdapterFileError(text, code=error.code, field=error.field) from None
    return AdapterChanges(
        path=path,
        fields=fields,
        record=record,
        modules=modules,
        replaced={name: stream for name, stream in replaced.items() if name not in bases},
        bases=bases,
        undecidable=reason,
    )


class _Lazily(Mapping[str, Tensor]):
    """Tensors read when they are asked for, one at a time."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self._streams = streams

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._streams[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Stream]]:
    if not (path / CONFIG).is_file():
        raise AdapterFileError(
            f"{path} is not an adapter folder: it has no {CONFIG}", code="no_adapter", field="adapter"
        )
    fields = read_json(path / CONFIG)
    if not (path / TENSORS).is_file():
        pickled = (path / "adapter_model.bin").exists()
        what = "holds a pickle, which can run code" if pickled else f"has no {TENSORS}"
        raise AdapterFileError(f"{path} {what}", code="pickle" if pickled else "no_tensors", field="adapter")
    try:
        tensors = read_file(path / TENSORS, "adapter")
    except InputError as error:
        raise AdapterFileError(str(error), code=error.code, field="adapter") from None
    record = read_json(path / RECORD) if (path / RECORD).is_file() else {}
    if record and record.get("digest") != content_digest(fields, _Lazily(tensors)):
        raise AdapterFileError(
            f"{path} was changed or damaged: its digest is not that of {RECORD}", code="changed", field="digest"
        )
    return fields, record, tensors


def _grouped(tensors: Mapping[str, Stream]) -> tuple[dict[str, dict[str, Stream]], dict[str, Stream]]:
    """Return the parts of each module's change, and the tensors that are there whole."""
    groups: dict[str, dict[str, Stream]] = {}
    replaced: dict[str, Stream] = {}
    for key, stream in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := PART.fullmatch(name):
            part = found["part"].rpartition(".")[2] + (".bias" if found["end"] == "bias" else "")
            groups.setdefault(found["path"], {})[part] = stream
        elif ".original_module." not in name:
            replaced[_plain(SAVED.sub("", name))] = stream
    return groups, replaced


def _plain(path: str) -> str:
    """Return a path without the wrappers that peft puts around a layer."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def _undecidable(kind: str, fields: Mapping[str, Any]) -> str:
    """Say why nobody can tell what the merged weights must be; empty if they can."""
    if kind in ("FULL", "BITFIT", "LINEAR_PROBE"):
        return ""
    if kind not in FIELDS:
        merges = kind not in ("None", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
        return f"the method {kind} is not replayed here" if merges else f"the method {kind} has no merged weights"
    init = fields.get("init_lora_weights", True)
    if kind == "LORA" and init not in KEEPS_BASE:
        return f"init_lora_weights {init!r} changes the base at the start, and the file does not say how"
    unknown = [k for k, v in fields.items() if v and k not in UNDERSTOOD | FIELDS[kind]]
    return f"the meaning of {join_limited(sorted(unknown))} is not known here" if unknown else ""


def _config(kind: str, fields: Mapping[str, Any]) -> LoRA | None:
    """Return what says each module's rank and factor."""
    if kind != "LORA":
        return None
    return LoRA(
        rank=fields.get("r", 8),
        alpha=fields.get("lora_alpha") or 8,
        scaling="alpha/sqrt(r)" if fields.get("use_rslora") else "alpha/r",
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
    )


def _add(
    change: ModuleChange,
    name: str,
    parts: Mapping[str, Stream],
    kind: str,
    fields: Mapping[str, Any],
    config: LoRA | None,
) -> None:
    """Add the tensors of one module's group to its change."""
    if "trainable_tokens_delta" in parts:
        change.row_values = parts["trainable_tokens_delta"]
        change.rows = _indices(name, fields, change.row_values.shape[0])
    if "ia3_l" in parts:
        change.scaling = parts["ia3_l"]
        inner = fields.get("feedforward_modules") or []
        change.inputs_scaled = (
            matches(inner, name) if isinstance(inner, str) else any(ends_with(name, end) for end in inner)
        )
    ends = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    A, B = (parts.get(end) for end in ends)
    if (A is None) != (B is None):
        raise AdapterFileError(f"of {name} there is only one of A and B", code="missing_tensor", field=name)
    if A is None or B is None:
        return
    scale, divisor = _scale(name, A, fields, config)
    shape = "embedding" if ends[0] == "lora_embedding_A" else "linear"
    change.updates.append(
        LowRank(
            A=A,
            B=B,
            scale=scale,
            divisor=divisor,
            kind=shape,
            magnitude=parts.get("lora_magnitude_vector"),
            E=parts.get("lora_E"),
        )
    )
    if "lora_B.bias" in parts:
        change.bias = parts["lora_B.bias"], scale


def _scale(name: str, A: Stream, fields: Mapping[str, Any], config: LoRA | None) -> tuple[float, float]:
    """Return factor and divisor of a module's update; the tensors must have the rank that they come from."""
    if config is None:  # AdaLoRA, as peft computes it
        start = fields.get("init_r", 12)
        return float(fields.get("lora_alpha") or start), start + 1e-5
    own = config.for_module(_plain(name))
    if A.shape[0] % own.rank:
        raise AdapterFileError(
            f"A of {name} has {A.shape[0]} rows, and the configuration says rank {own.rank}",
            code="rank_mismatch",
            field=name,
        )
    return float(own.factor), 1.0


def rank_of(changes: AdapterChanges, path: str) -> int:
    """Return the rank that the configuration gives a module."""
    config = _config(str(changes.fields.get("peft_type")), changes.fields)
    return 0 if config is None else config.for_module(path).rank


def _indices(name: str, fields: Mapping[str, Any], count: int) -> tuple[int, ...]:
    given = fields.get("trainable_token_indices", fields.get("token_indices"))
    if isinstance(given, Mapping):
        given = next((own for end, own in given.items() if ends_with(name, end)), None)
    if not isinstance(given, list) or len(given) != count or not all(type(i) is int and i >= 0 for i in given):
        raise AdapterFileError(
            f"the trained rows of {name} are {format_value(given)}, for {count} rows", code="wrong_shape", field=name
        )
    return tuple(given)
