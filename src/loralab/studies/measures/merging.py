"""One base, before and after its adapter is merged: losses, logits, answers, and the way back.

The equation is Hu et al. 2021, arXiv:2106.09685, section 4.1: W = W0 + (alpha / r) B A, here summed
in fp32 and rounded once to the base's dtype. A 4-bit layer is replaced by a dense one, unless the
arm packs it again.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.bases import compute_dtype, dense_weight, is_linear
from loralab.artefacts import requantize
from loralab.artefacts.comparison import Certificate, compare, logits_of, reference_of
from loralab.artefacts.merge_aware import put_on_grid
from loralab.errors import ModelError
from loralab.models.device import resolve_precision
from loralab.models.quantize import dequantize
from loralab.studies.measures.carried import REFERENCE, adapter_folder, base_for, compared_inputs, put_on
from loralab.studies.study import Record, Trial
from loralab.studies.timing import timed
from loralab.studies.trained import Tell, items_of, score
from loralab.tasks.score import Scores

MEASURE_MERGING = "loralab.studies.measures.merging:measure"
BEFORE, AFTER = "before", "after"  # items of a record


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Merge, compare, unmerge and compare again; options name the form of the base.

    {"precision", "quantize", "compared": test rows whose logits are compared, "again": whether the
    merged model is packed again, "aware": whether the adapter was trained for that, "limit": most test rows}.
    """
    try:
        return _measured(trial, folder, tell)
    except RuntimeError as error:  # torch has no kernel of this dtype here
        if isinstance(error, ModelError) or "not implemented" not in str(error):
            raise
        text = f"this machine does not compute in {trial.arm.options['precision']}: {error}"
        raise ModelError(text, code="no_kernel", field="precision") from None


def _measured(trial: Trial, folder: Path, tell: Tell) -> Record:
    options, own = trial.arm.options, REFERENCE
    if options.get("aware"):
        own = replace(own, fields={**own.fields, "merge_aware": "nf4"})
    place = adapter_folder(trial, folder, tell, own)
    precision = resolve_precision(str(options["precision"]))
    base, task = base_for(trial.setup, precision, quantize=str(options["quantize"]))
    samples = compared_inputs(task, base, int(options["compared"]))
    task = replace(task, splits={**task.splits, "test": task.splits["test"][: options.get("limit")]})

    def logits() -> Tensor:
        return logits_of(base.model, samples, base.kind, base.tokenizer)

    plain, alone = logits(), score(base, task).metrics["loss"] if options.get("again") else 0.0
    adapter = put_on(base, place)
    before, reference = score(base, task), reference_of(base.model, samples, base.kind, base.tokenizer)
    numbers = {**rounding(adapter), "effect_kl": compare(reference, plain, precision).mean_kl}
    kept: dict[str, float] = {}
    if options.get("again"):
        kept = packed_again(adapter, aware=bool(options.get("aware")))
        numbers |= {"kept": float(np.median(list(kept.values()))), "packed": float(len(kept))}
    else:
        numbers |= round_trip(base.model, adapter, logits, reference.values)
    after = score(base, task)
    metric = trial.setup.metric or before.main
    numbers |= changes(before, after, compare(reference, logits(), precision))
    if kept:
        numbers["gain_kept"] = (alone - numbers["loss_after"]) / (alone - numbers["loss_before"])
    items = {BEFORE: items_of(before, metric), AFTER: items_of(after, metric)}
    items |= {f"{name} loss": [-loss for loss in own.row_losses] for name, own in ((BEFORE, before), (AFTER, after))}
    texts = {"metric": metric, "precision": precision}
    return trial.record(numbers=numbers, items=items, series={"kept": list(kept.values())}, texts=texts)


def packed_again(adapter: Adapter, *, aware: bool) -> dict[str, float]:
    """Merge into NF4 weights; return what each layer keeps of its update.

    Args:
        aware: along the grid of the base, as the adapter was trained for; else to the nearest level.
    """
    if aware:
        put_on_grid(adapter)
    kept = requantize.retention(adapter)
    merged: Any = adapter.merge_and_detach()
    if not aware:
        dequantize(merged)
    requantize.pack(merged)
    return kept


def has_fp16() -> bool:
    """Tell whether the machine multiplies in fp16."""
    abilities = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or bool(abilities.get("avx512_fp16") or abilities.get("amx_fp16"))


def changes(before: Scores, after: Scores, seen: Certificate) -> dict[str, float]:
    """Return the changes of merging in losses, logits and answers."""
    was, now = before.metrics["loss"], after.metrics["loss"]
    pairs = list(zip(before.predictions, after.predictions, strict=True))
    answered = any(a.answer for a, _ in pairs)  # plain texts have no answers that could change
    changed = {"changed": float(sum(a.answer != b.answer for a, b in pairs))} if answered else {}
    return {
        "loss_before": was,
        "loss_after": now,
        "loss_difference": abs(now - was),
        "logit_difference": seen.max_logit_difference,
        "relative": seen.relative_difference,
        "kl": max(0.0, seen.mean_kl),
        "top1": seen.top1_agreement,
        "positions": seen.positions,
        "rows": float(len(pairs)),
        **changed,
    }


def round_trip(model: nn.Module, adapter: Adapter, logits: Callable[[], Tensor], before: Tensor) -> dict[str, float]:
    """Merge, unmerge and merge again; tell whether weights and logits came back bit for bit.

    The adapter is left merged.
    """
    digests = weight_digests(model)
    _, merge_seconds = timed(adapter.merge)
    _, unmerge_seconds = timed(adapter.unmerge)
    restored, same = weight_digests(model) == digests, torch.equal(logits(), before)
    adapter.merge()
    return {
        "merge_seconds": merge_seconds,
        "unmerge_seconds": unmerge_seconds,
        "tensors": float(len(digests)),
        "restored": float(restored),
        "same_logits": float(same),
    }


@torch.no_grad()
def rounding(adapter: Adapter) -> dict[str, float]:
    """Tell how rounding the merged weights to the base's dtype changes the update.

    `moved` is the share of the weights that change at all, `noise` how far the rounded sum is from
    the exact one, over the length of the update (median over modules).
    """
    moved, count, noise = 0, 0, []
    for module in adapter.modules.values():
        if not is_linear(module.original):
            continue
        before = dense_weight(module.original).float()
        total: Tensor = module.merged_tensors()["weight"]
        exact = (total.T if getattr(module, "transposed", False) else total).float()
        rounded = exact.to(compute_dtype(module.original)).float()
        moved += int((rounded != before).sum())
        count += before.numel()
        length = float((exact - before).norm())
        noise.append(float((rounded - exact).norm()) / length if length else 0.0)
    return {"moved": moved / count if count else 0.0, "noise": float(np.median(noise)) if noise else 0.0}


def weight_digests(model: nn.Module) -> Mapping[str, str]:
    """Return a digest of every tensor's bytes: equal ones are equal bit for bit."""
    return {name: _digest(tensor) for name, tensor in model.state_dict().items()}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
