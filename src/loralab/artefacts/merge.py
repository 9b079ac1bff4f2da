"""Base + adapter -> a full model folder, published only with its proof.

The merged weights are W0 + delta, summed in fp32 and rounded once, module by module, so that at
most one weight is held twice. The whole model is in memory; it is saved in shards.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.adapters.adapter import Adapter
from loralab.adapters.folder import RECORD, write_json
from loralab.adapters.model_folder import has_own_head
from loralab.adapters.record import FORMAT
from loralab.artefacts import requantize
from loralab.artefacts.certificate import FRESH, compare_afresh, file_digests
from loralab.artefacts.comparison import Certificate, Reference, reference_of
from loralab.artefacts.loaded_adapter import LoadedAdapter, load_with_base, sample_of
from loralab.artefacts.merge_aware import put_on_grid, suits_grid
from loralab.errors import CertificateError, ConfigError
from loralab.models import processors
from loralab.models.quantize import dequantize
from loralab.models.source import quiet
from loralab.progress import Listener, stages
from loralab.values import check_choice

REJECTED = ".rejected"
LOADING, ASKING, MERGING, WRITING = "loading base and adapter", "asking them", "merging", "writing"
SHARES = {LOADING: 3, ASKING: 1, MERGING: 1, WRITING: 1} | FRESH
KEPT = ("seed", "learn", "thoughts")  # of the record of a training


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    precision: str | None = None,
    quantize: str = "none",
    force: bool = False,
    listener: Listener | None = None,
) -> Certificate:
    """Write the base model with the adapter in its weights to a new folder.

    The folder holds weights, configuration, tokenizer with the chat template of the training, and
    generation settings that stop where the adapter's answers end. It is reloaded in a fresh process
    and compared with the unmerged model; if it differs too much it stays as `<output>.rejected`.

    Args:
        model: the base; None is the one that the adapter names. Of a live model with its
            `tokenizer` a copy is merged, without the adapters that are in it.
        precision: of the written weights: fp32, bf16, fp16; None is that of the training, and of
            a live model its own.
        quantize: "nf4" packs the merged weights again; a 4-bit base is otherwise left unpacked.
        force: also where 4 bits would round most of the update away.
        listener: called with what is being done, how much of it all is done, and of how much.

    Raises:
        InputError: adapter, base or output cannot be used; nothing has been written.
        CertificateError: the merged model does not do what the unmerged one does.
    """
    output = Path(output)
    atomic.require_free(output)
    check_choice("quantize", quantize, ("none", "nf4"))
    packs, begin = quantize == "nf4", stages(SHARES, listener)
    begin(LOADING)
    live = load_with_base(adapter, model=model, tokenizer=tokenizer, precision=precision)
    if reason := live.adapter.reason_not_to_merge():
        raise ConfigError(f"{adapter}: {reason}", code="cannot_merge", field="adapter")
    if packs:
        requantize.require_whole_blocks(live.base.model)
    begin(ASKING)
    reference = None if packs else _reference(live, live.base.model)
    begin(MERGING)
    plain, kept = _merged(live.adapter, packs=packs, force=force)
    # what is written is compared with what was packed: that differs from the unpacked model
    reference = reference or _reference(live, plain)
    with proven_output(output) as rejected:
        begin(WRITING)
        with atomic.new_folder(rejected) as place:
            _write_model(live, plain, place, kept)
        certificate = compare_afresh(rejected, reference, begin=begin)
        if not certificate.passed:
            raise CertificateError(
                f"the merged model differs from the unmerged one (relative logit difference "
                f"{certificate.relative_difference:.2e}, mean KL {certificate.mean_kl:.2e}, top-1 "
                f"agreement {certificate.top1_agreement:.3f}); it is left in {rejected}",
                code="not_equal",
                field="artefact",
            )
    return certificate


def _reference(live: LoadedAdapter, model: Any) -> Reference:
    """Return the logits of a model on the task's own prompts."""
    return reference_of(model, sample_of(live.stored.record, live.base), live.base.kind, live.base.tokenizer)


def _merged(adapter: Adapter, *, packs: bool, force: bool) -> tuple[Any, Mapping[str, float]]:
    """Return the plain model, in NF4 if it is packed, and what each packed layer keeps of its update.

    Raises:
        CertificateError: that is too little, and not forced.
    """
    on_grid = packs and suits_grid(adapter)
    if on_grid:
        put_on_grid(adapter)
    kept = requantize.retention(adapter) if packs else {}
    if not force:
        requantize.require_retention(kept, on_grid=on_grid)
    plain: Any = adapter.merge_and_detach()
    if not on_grid:
        dequantize(plain)
    if packs:
        requantize.pack(plain)
    return plain, kept


@contextlib.contextmanager
def proven_output(output: Path) -> Iterator[Path]:
    """Yield the place of an artefact until the block ends: then it gets its final name.

    One that raises a CertificateError is left there to be looked at; of any other nothing is left.

    Raises:
        OutputError: it cannot be written.
    """
    rejected = output.with_name(output.name + REJECTED)
    with atomic.explained(output):
        atomic.remove_folder(rejected)
        try:
            yield rejected
            atomic.put(rejected, output)
        except CertificateError:
            raise
        except BaseException:
            atomic.remove_folder(rejected)
            raise


def _write_model(live: LoadedAdapter, plain: Any, place: Path, kept: Mapping[str, float]) -> None:
    _untie(plain)
    record = live.stored.record
    stops = record.get("tokenizer", {}).get("stop_ids")
    if stops and getattr(plain, "generation_config", None) is not None:
        plain.generation_config.eos_token_id = list(stops)
    with quiet():
        requantize.save(plain, place) if kept else plain.save_pretrained(place)
        processors.save(live.base.tokenizer, place)
    for file in place.iterdir():  # safetensors lets only its writer read: a server may be another
        file.chmod((place / "config.json").stat().st_mode)
    told: dict[str, Any] = {key: record[key] for key in ("task", "tokenizer", "sample") if key in record}
    # tells which rows were held out, and which of their answers were learnt
    wanted = (*KEPT, "merge_aware") if kept else KEPT
    if stored := {name: v for name, v in record.get("training", {}).items() if name in wanted}:
        told["training"] = stored
    if kept:
        told["retained"] = {name: round(share, 4) for name, share in kept.items()}
    base: dict[str, Any] = {
        **{k: v for k, v in record.get("base", {}).items() if k not in ("quantize", "live")},
        **live.base.recorded,
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "kind": "model",
        "precision": live.precision,
        "base": base,
        "adapter": live.stored.digest,
        **told,
        "files": file_digests(place),
    }
    write_json(place / RECORD, content)


def _untie(model: Any) -> None:
    """Untie an adapted head, which no longer shares its weight with the embedding."""
    if has_own_head(model):
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
