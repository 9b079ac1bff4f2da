"""Export an adapter to another format, with its certificate."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, RECORD, read_json
from loralab.adapters.record import FORMAT
from loralab.adapters.registry import spec_of_file
from loralab.artefacts import gguf_adapter
from loralab.artefacts.certificate import FRESH, Begin, compare_afresh, file_digests
from loralab.artefacts.comparison import Certificate, reference_of
from loralab.artefacts.engines import differs_in_peft, require
from loralab.artefacts.loaded_adapter import LoadedAdapter, load_with_base, sample_of
from loralab.artefacts.merge import merge, proven_output
from loralab.artefacts.temporary_base import base_folder
from loralab.artefacts.updates import uniform
from loralab.errors import CertificateError, ConfigError, join_limited, nearest
from loralab.models.load import configuration
from loralab.progress import Listener, stages

Record = dict[str, Any]
LOADING, ASKING = "loading base and adapter", "asking them"
SHARES = {LOADING: 3, ASKING: 1} | FRESH


def export(
    adapter: str | Path,
    output: str | Path,
    *,
    to: str,
    model: Any = None,
    tokenizer: Any = None,
    precision: str | None = None,
    listener: Listener | None = None,
) -> Certificate:
    """Write an adapter in another form to a new folder, and prove it in a fresh process.

    Args:
        to: "peft" (the adapter folder that peft loads), "vllm" (the same with one rank for all
            modules), "gguf" (a folder with adapter.gguf for llama.cpp) or "merged" (a full model).
        model: the base; None is the one that the adapter names. A live model needs its
            `tokenizer`, and stays as it is; adapters that are in it have no effect.
        precision: fp32, bf16 or fp16; None is that of the training, and of a live model its own.
        listener: called with what is being done, how much of it all is done, and of how much.

    Raises:
        InputError: something given is wrong; nothing has been written.
        CertificateError: what was written does not do what the live model does.
    """
    if to not in TARGETS:
        raise ConfigError(
            f"there is no export target {to!r}, only {', '.join(TARGETS)}{nearest(to, TARGETS)}",
            code="unknown_target",
            field="to",
        )
    return TARGETS[to](Path(adapter), Path(output), _Base(model, tokenizer, precision, listener))


@dataclass(frozen=True, eq=False)
class _Base:
    """The base as it was asked for."""

    model: Any
    tokenizer: Any
    precision: str | None
    listener: Listener | None

    @property
    def begin(self) -> Begin:
        """Return what tells which stage begins."""
        return stages(SHARES, self.listener)

    def with_adapter(self, path: Path) -> LoadedAdapter:
        """Load an adapter onto it."""
        self.begin(LOADING)
        return load_with_base(path, model=self.model, tokenizer=self.tokenizer, precision=self.precision)


def _to_peft(adapter: Path, output: Path, base: _Base) -> Certificate:
    """Write peft's own files, of the methods that peft has."""
    atomic.require_free(output)
    kind = read_json(adapter / CONFIG).get("peft_type") if (adapter / CONFIG).is_file() else None
    if kind is not None and not spec_of_file(kind).in_peft:
        raise ConfigError(
            f"peft has no method {kind}, so {adapter} cannot be written for it", code="not_in_peft", field="method"
        )
    live = base.with_adapter(adapter)
    if reasons := differs_in_peft(live.adapter):
        raise ConfigError(
            f"peft cannot express {adapter}: {join_limited(reasons)}", code="not_in_peft", field="adapter"
        )
    return _certified(live, output, live.adapter.save, base.begin)


def _to_vllm(adapter: Path, output: Path, base: _Base) -> Certificate:
    """Write peft's files once more, with one rank and one alpha for all modules."""
    atomic.require_free(output)
    fields, tensors = uniform(require(adapter, "vllm", base.model))
    live = base.with_adapter(adapter)
    fields["base_model_name_or_path"] = live.base.recorded["name"]
    return _certified(live, output, lambda place, record: folder.write(place, fields, tensors, record), base.begin)


def _to_gguf(adapter: Path, output: Path, base: _Base) -> Certificate:
    """Write a folder with adapter.gguf, its record and its certificate."""
    if output.suffix == ".gguf":
        raise ConfigError(
            f"{output} would be a folder, with {gguf_adapter.FILE} and its certificate in it; "
            f"name it {output.with_suffix('')}",
            code="output_is_folder",
            field="output",
        )
    atomic.require_free(output)
    stored = require(adapter, "gguf", base.model)
    live = base.with_adapter(adapter)
    config = live.base.model.config if live.base.live else configuration(live.base.name)

    def write(place: Path, record: Record) -> None:
        with atomic.new_folder(place) as partial:
            gguf_adapter.write(partial / gguf_adapter.FILE, stored, config)
            content = {"format": FORMAT, "kind": "gguf-adapter", "adapter": stored.digest, **record}
            content["files"] = file_digests(partial)
            folder.write_json(partial / RECORD, content)

    return _certified(live, output, write, base.begin)


def _to_merged(adapter: Path, output: Path, base: _Base) -> Certificate:
    return merge(
        adapter, output, model=base.model, tokenizer=base.tokenizer, precision=base.precision, listener=base.listener
    )


def _certified(live: LoadedAdapter, output: Path, write: Callable[[Path, Record], object], begin: Begin) -> Certificate:
    """Write a folder, compare it in a fresh process, and give it its name if it passed."""
    base, stored = live.base, live.stored.record
    begin(ASKING)
    reference = reference_of(base.model, sample_of(stored, base), base.kind, base.tokenizer)
    record = {k: v for k, v in stored.items() if k not in ("format", "digest", "certificate")}
    record["base"] = {
        **{k: v for k, v in stored.get("base", {}).items() if k != "live"},
        **base.recorded,
        "precision": live.precision,
    }
    with proven_output(output) as rejected, base_folder(base) as copied:
        write(rejected, record)
        certificate = compare_afresh(rejected, reference, copied, begin)
        if not certificate.passed:
            raise CertificateError(
                f"the exported adapter differs; it is left in {rejected}", code="not_equal", field="artefact"
            )
    return certificate


TARGETS: dict[str, Callable[[Path, Path, _Base], Certificate]] = {
    "peft": _to_peft,
    "vllm": _to_vllm,
    "gguf": _to_gguf,
    "merged": _to_merged,
}
