"""Logits of two models side by side: how far one is from the other, and what is allowed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from loralab import atomic
from loralab.adapters.folder import read_tensors
from loralab.errors import AdapterFileError
from loralab.tasks.samples import outputs

STORED_LOGITS = 64
TOLERANCES: dict[str, dict[str, float]] = {
    # Reloading is the same computation. Merging rounds every weight once, and moved SmolLM2-135M
    # by a relative 3e-6, 4e-3 and 4e-2, with a mean KL of 1e-11, 4e-5 and 2e-3 (docs/findings.md).
    # KL grows with the square of the difference: fp32 has room for ten times, bf16 for three.
    "fp32": {"relative_difference": 3e-5, "mean_kl": 1e-9, "top1_agreement": 0.99},
    "bf16": {"relative_difference": 0.15, "mean_kl": 0.02, "top1_agreement": 0.9},
    "fp16": {"relative_difference": 0.02, "mean_kl": 1e-3, "top1_agreement": 0.97},
}


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Distance between an artefact's logits and the live model's.

    `relative_difference` is max |d logit| over the largest |logit|; `mean_kl` in nats, from live
    to reloaded; both over the last positions of the task's own prompts. `device` is the kind of
    device that the reloaded one computed on; `base` says what the fresh process had for a base, if
    that was not the one that the artefact names.
    """

    max_logit_difference: float
    relative_difference: float
    mean_kl: float
    top1_agreement: float
    precision: str
    prompts: int
    positions: int
    tolerance: dict[str, float]
    passed: bool
    device: str = "cpu"
    base: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all fields, for loralab.json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Logits to compare with: values (P, K) at indices (P, K), log-sum-exp over all (P,).

    The sum is kept in fp64: half a unit of fp32 at 20 nats is 1e-6, as much as fp32 is allowed.
    `device` is the one that they were computed on, which is not written.
    """

    prompts: list[list[int]]
    values: Tensor
    indices: Tensor
    total: Tensor
    device: str = "cpu"

    def smaller(self, kept: int) -> "Reference":
        """Return it with the largest logits alone."""
        values, places = self.values.topk(min(kept, self.values.shape[1]), dim=1)
        indices = self.indices.gather(1, places)
        return replace(self, values=values.contiguous(), indices=indices.contiguous())

    def save(self, file: Path) -> None:
        """Write it as safetensors, the prompts as tensors of ids."""
        tensors = {f"prompt.{i}": torch.tensor(ids) for i, ids in enumerate(self.prompts)}
        tensors |= {"values": self.values, "indices": self.indices.int(), "total": self.total}
        atomic.write_file(file, safetensors.torch.save(tensors))

    @staticmethod
    def read(file: Path) -> "Reference":
        """Read it back."""
        tensors = read_tensors(file)
        count = sum(name.startswith("prompt.") for name in tensors)
        try:
            prompts = [tensors[f"prompt.{i}"] for i in range(count)]
            values, indices, total = (tensors[name] for name in ("values", "indices", "total"))
        except KeyError as error:
            raise AdapterFileError(f"{file} is damaged: it lacks {error}", code="damaged", field="path") from None
        whole = not any(t.is_floating_point() for t in (*prompts, indices))
        if values.ndim != 2 or values.shape != indices.shape or total.shape != values.shape[:1]:
            raise AdapterFileError(
                f"{file} is damaged: its tensors do not fit each other", code="damaged", field="path"
            )
        if not whole or any(t.ndim != 1 for t in prompts):
            raise AdapterFileError(
                f"{file} is damaged: prompts and indices must be whole numbers", code="damaged", field="path"
            )
        return Reference(prompts=[t.tolist() for t in prompts], values=values, indices=indices.long(), total=total)


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]], kind: str, tokenizer: Any = None) -> Tensor:
    """Return (P, V) in fp32: the last positions of each prompt, or one row a prompt for a classifier.

    Args:
        prompts: token ids, or samples of another kind (tasks/samples.py).
        tokenizer: what turns a sample into pixels; for pictures only.
    """
    was_training = model.training
    model.eval()
    rows = [outputs(model, prompt, kind=kind, tokenizer=tokenizer) for prompt in prompts]
    model.train(was_training)
    return torch.cat(rows)


def reference_of(model: nn.Module, prompts: Sequence[Sequence[int]], kind: str, tokenizer: Any = None) -> Reference:
    """Return all logits of a live model on some prompts."""
    logits = logits_of(model, prompts, kind, tokenizer)
    indices = torch.arange(logits.shape[1]).expand(logits.shape).contiguous()
    total = logits.double().logsumexp(dim=1)
    return Reference(
        prompts=[list(ids) for ids in prompts],
        values=logits,
        indices=indices,
        total=total,
        device=next(model.parameters()).device.type,
    )


def compare(reference: Reference, logits: Tensor, precision: str, device: str = "cpu") -> Certificate:
    """Return the verdict on logits (P, V), found on a device, that should be those of the reference."""
    values = reference.values.double()
    found = logits.double().gather(1, reference.indices)
    difference = float((found - values).abs().max())
    p_log = values - reference.total.double()[:, None]
    q_log = found - logits.double().logsumexp(dim=1, keepdim=True)
    kl = _kl(p_log, q_log)
    best = reference.indices.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]
    agreement = float((logits.argmax(dim=1) == best).double().mean())
    relative = difference / max(float(values.abs().max()), 1e-12)
    tolerance = TOLERANCES[precision]
    finite = bool(logits.isfinite().all())
    passed = (
        finite
        and relative <= tolerance["relative_difference"]
        and kl <= tolerance["mean_kl"]
        and agreement >= tolerance["top1_agreement"]
    )
    return Certificate(
        max_logit_difference=difference,
        relative_difference=relative,
        mean_kl=kl,
        top1_agreement=agreement,
        precision=precision,
        prompts=len(reference.prompts),
        positions=len(values),
        tolerance=dict(tolerance),
        passed=passed,
        device=device,
    )


def _kl(p_log: Tensor, q_log: Tensor) -> float:
    """Return the mean KL(p || q) in nats; what is not listed counts as one more outcome."""
    listed = (p_log.exp() * (p_log - q_log)).sum(dim=1)
    p_rest = (1 - p_log.exp().sum(dim=1)).clamp_min(0)
    q_rest = (1 - q_log.exp().sum(dim=1)).clamp_min(0)
    both = (p_rest > 1e-12) & (q_rest > 1e-12)
    rest = torch.where(both, p_rest * (p_rest.clamp_min(1e-12) / q_rest.clamp_min(1e-12)).log(), 0)
    return float((listed + rest).mean().clamp_min(0))
