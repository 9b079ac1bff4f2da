"""verify(): an artefact against its certificate, or anybody's merge against base and adapter.

A merge is replayed tensor by tensor from the files alone (proof/): no model is loaded, and no more
than some rows of the largest tensor are in memory at once.
"""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from loralab.artefacts import certificate
from loralab.artefacts.comparison import Certificate
from loralab.artefacts.proof.changes import AdapterChanges, read_changes
from loralab.artefacts.proof.judge import Judge
from loralab.artefacts.proof.logits import compare_logits, precision_of
from loralab.artefacts.proof.names import is_buffer
from loralab.artefacts.proof.plan import Plan, make_plan
from loralab.artefacts.proof.report import MergeReport, TensorVerdict
from loralab.artefacts.proof.tied import EMBEDDINGS, HEADS
from loralab.errors import AdapterFileError, ConfigError, ModelError, join_limited
from loralab.models.gguf_weights import read_gguf
from loralab.models.packed_weights import unpacked
from loralab.models.source import resolve
from loralab.models.weights import Weights, read_folder
from loralab.progress import Listener

LEAST_SURVIVING = 0.5  # of the whole update, in a merge that was quantised


@overload
def verify(
    artefact: str | Path, *, base: str | Path | None = None, listener: Listener | None = None
) -> Certificate: ...
@overload
def verify(
    artefact: str | Path,
    *,
    base: str | Path | None = None,
    adapter: str | Path,
    logits: bool = True,
    listener: Listener | None = None,
) -> MergeReport: ...
def verify(
    artefact: str | Path,
    *,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    logits: bool = True,
    listener: Listener | None = None,
) -> Certificate | MergeReport:
    """Check an artefact of loralab against its certificate, or a merge of any tool against its parts.

    Without `adapter`: every file's digest, and the logits in a fresh process beside those that were
    stored. With it: every tensor of the merged model beside W + s B A, and the logits of both.

    Args:
        base: the base model, by folder, GGUF file, short name or hub id; None is the one that the
            adapter names.
        adapter: the folder that was merged, written by peft or by loralab.
        logits: of a merge, compare logits too where both models can be opened.
        listener: called with what is being done, how much of it is done, and of how much.

    Raises:
        InputError: the parts do not belong together, a shard is missing or cut short, or there is no
            artefact with a certificate at this place.
        CertificateError: an artefact is not, or does not do, what was certified.
    """
    if adapter is None and not logits:
        raise ConfigError(
            "logits=False belongs to a merge; name the adapter that was merged", code="no_effect", field="adapter"
        )
    if adapter is None:
        return certificate.verify(artefact, base=base, listener=listener)
    return verify_merge(Path(artefact), base, Path(adapter), logits=logits, listener=listener)


def verify_merge(
    merged: Path, base: str | Path | None, adapter: Path, *, logits: bool = True, listener: Listener | None = None
) -> MergeReport:
    """Return what is proven of a merged model.

    Raises:
        InputError: see verify().
    """
    changes = read_changes(adapter)
    start = _open_base(base, changes)
    result = _open(merged, start)
    told = MergeReport(merged=str(merged), base=str(start.path), adapter=str(adapter), tensors=())
    own_keys = _own_keys(result)
    plan = make_plan(start, result, changes, own_keys)
    notes = [*plan.notes, *_doubts(changes), *dict.fromkeys(note for own in plan.expected for note in own.notes)]
    if changes.undecidable:
        open_ = TensorVerdict(name="*", verdict="undecided", cause="not_decidable", detail=changes.undecidable)
        return replace(told, tensors=(open_,), notes=tuple(notes))
    judge = Judge(plan.expected, _dtype_of(changes), _vocabulary(start, result))
    verdicts = [*judge.verdicts(listener), *plan.verdicts]
    survived = _survived(verdicts)
    if survived is not None and survived < LEAST_SURVIVING:
        verdicts = [_lost(v) for v in verdicts]
    found = None
    if logits and not any(v.verdict in ("wrong", "undecided") for v in verdicts):
        dtypes = judge.dtypes | {stream.dtype for stream in changes.bases.values()}
        why = _why_no_logits(result, own_keys, plan)
        if not why:
            found, why = compare_logits(start, result, adapter, precision_of(dtypes), listener)
        notes += [f"logits were not compared: {why}"] if why else []
    counted = Counter(v.order for v in verdicts if v.changed and v.order)
    return replace(
        told, tensors=tuple(verdicts), orders=dict(counted), survived=survived, logits=found, notes=tuple(notes)
    )


def _open_base(base: str | Path | None, changes: AdapterChanges) -> Weights:
    name = str(base) if base is not None else ""
    record = changes.record.get("base")
    name = name or str((record.get("name") if isinstance(record, dict) else "") or "")
    name = name or str(changes.fields.get("base_model_name_or_path") or "")
    if not name:
        raise AdapterFileError(
            f"{changes.path} does not name its base model; give it with --base", code="base_needed", field="base"
        )
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return read_gguf(Path(name), (), "base")
    if Path(name).is_dir():  # whatever stands in it is said by its own reader
        return unpacked(read_folder(Path(name), "base"))
    found = Path(resolve(name))
    if not found.is_dir():
        import huggingface_hub

        found = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    return unpacked(read_folder(found, "base"))


def _open(merged: Path, base: Weights) -> Weights:
    if merged.is_file() and merged.suffix == ".gguf":
        return read_gguf(merged, [*base.tensors], "merged")
    if merged.is_file():
        raise ModelError(
            f"{merged} is a file; a merged model is a folder or a GGUF file", code="not_a_model", field="merged"
        )
    return unpacked(read_folder(merged, "merged"))


def _own_keys(merged: Weights) -> dict[str, Any] | None:
    """Return the names of the tensors that the merged model's class has; None of one that is not known."""
    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nobody asks for
    names = merged.config.get("architectures")
    built = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if built is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(merged.path, trust_remote_code=False)
        with torch.device("meta"):
            return dict(built._from_config(config).state_dict())
    except Exception:  # a class or a configuration of another version
        return None


def _why_no_logits(merged: Weights, own_keys: dict[str, Any] | None, plan: Plan) -> str:
    """Say what stands against it before a model is loaded; empty if nothing does."""
    if any(own.notes for own in plan.expected):
        return "a weight is shared that was not in training"
    strange = [name for name in merged.tensors if own_keys and name not in own_keys and not is_buffer(name)]
    if strange and merged.path.is_dir():
        return f"transformers would not find {join_limited(strange, 2)} under these names, and draw others at random"
    return ""


def _dtype_of(changes: AdapterChanges) -> torch.dtype:
    updates = [own for change in changes.modules.values() for own in change.updates]
    # AdaLoRA's A E is rounded anew, whatever its parts are stored in
    return updates[0].B.dtype if updates and updates[0].E is None else torch.float32


def _vocabulary(base: Weights, merged: Weights) -> frozenset[str]:
    ends = (*EMBEDDINGS, *HEADS)
    names = (*base.tensors, *merged.tensors)
    return frozenset(n for n in names if n.removesuffix(".weight").rpartition(".")[2] in ends)


def _survived(verdicts: list[TensorVerdict]) -> float | None:
    """Return the share of the whole update that quantisation left: the mean over numbers."""
    own = [v for v in verdicts if v.survived is not None and v.verdict == "requantised"]
    total = sum(v.elements for v in own)
    return sum((v.survived or 0.0) * v.elements for v in own) / total if total else None


def _lost(own: TensorVerdict) -> TensorVerdict:
    """Call it wrong that less than half of an update is left."""
    if own.verdict != "requantised" or own.survived is None:
        return own
    return replace(own, verdict="wrong", cause="update_lost", detail=f"rounding left {own.survived:.0%} of the update")


def _doubts(changes: AdapterChanges) -> list[str]:
    nothing = not changes.modules and not changes.replaced and not changes.undecidable
    return ["the adapter changes nothing"] if nothing else []
