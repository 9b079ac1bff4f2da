"""Low-rank update of a linear layer.

Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
Axes: I in_features, O out_features, R rank; `...` any leading axes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.fused import linear_with_update
from loralab.adapters.methods import LoRA
from loralab.adapters.start import STARTS
from loralab.errors import AdapterStateError, ConfigError


class LinearWithLoRA(nn.Module):
    """A frozen linear layer plus a trainable low-rank update: W0 x + (alpha / r) B A x.

    Args:
        base: nn.Linear, weight (O, I), or transformers' Conv1D, weight (I, O). Kept and frozen.
        config: rank, alpha, scaling, dropout and start of the update.
        generator: where the random start comes from; None is torch's global generator.

    Raises:
        ConfigError: the rank exceeds min(I, O) for PiSSA, or the base is no linear layer.
    """

    def __init__(
        self, base: nn.Module, config: LoRA, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not is_linear(base):
            raise ConfigError(f"{type(base).__name__} is not a linear layer")
        self.base: Any = base.requires_grad_(False)
        self.transposed = is_conv1d(base)
        self.rank = config.rank
        self.scaling = config.factor
        self.dropout = nn.Dropout(config.dropout)
        self._unmerged: nn.Parameter | None = None
        A, B = self._start(config, generator)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        principal = config.init == "pissa"
        # PiSSA: the start is taken out again here, so that W0 itself is never touched
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", A.clone() if principal else None)
        self.register_buffer("start_B", B.clone() if principal else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        if self.merged:
            return self.base(x)
        if self._fuses(x):
            mask = self._dropout_mask(x)
            return linear_with_update(self.base, self.transposed, x, *self.factors(), mask)
        y = self.base(x)
        return y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """(alpha / r) B A x: (..., I) -> (..., O), computed in the adapter's dtype."""
        A, B, scaling = self.factors()
        low = F.linear(self.dropout(x).to(A.dtype), A)  # (..., R)
        return scaling * F.linear(low, B)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (R, I), B (O, R) and the factor of the update; PiSSA subtracts its start: rank 2 R."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B, self.scaling
        both_A = torch.cat([self.lora_A, self.start_A])
        return both_A, torch.cat([self.lora_B, -self.start_B], dim=1), self.scaling

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update of the weight, (O, I), in the adapter's dtype."""
        A, B, scaling = self.factors()
        return scaling * (B @ A)

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update at present."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Put W0 + delta in the place of W0, and keep W0 aside: it costs one weight of memory.

        The sum is rounded once, to the base's dtype. W0 is replaced, never written to, so a
        tensor that shares it (a tied embedding) keeps its values.

        Raises:
            AdapterStateError: the layer is already merged, or the sum overflows the dtype.
        """
        if self.merged:
            raise AdapterStateError("already merged; call unmerge_weights() first")
        weight: nn.Parameter = self.base.weight
        delta = self.delta().T if self.transposed else self.delta()
        total = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if not total.isfinite().all():
            raise AdapterStateError(f"the merged weight is not finite in {weight.dtype}")
        self.base.weight = nn.Parameter(total.contiguous(), requires_grad=False)
        self._unmerged = weight

    def unmerge_weights(self) -> None:
        """Put W0 back, the same tensor as before: subtracting the update would drift in bf16.

        Raises:
            AdapterStateError: the layer is not merged.
        """
        if self._unmerged is None:
            raise AdapterStateError("not merged")
        self.base.weight = self._unmerged
        self._unmerged = None

    @property
    def unmerged_weight(self) -> nn.Parameter:
        """W0 in the base's own layout, merged or not."""
        return self.base.weight if self._unmerged is None else self._unmerged

    # Some models read these of their layers.
    @property
    def weight(self) -> Tensor:
        """The base weight, in the base's own layout."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """I."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.lora_B.shape[0]

    def extra_repr(self) -> str:
        """Rank and scaling, for print(model)."""
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def _start(self, config: LoRA, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        matrix = self.base.weight.T if self.transposed else self.base.weight
        out_features, in_features = matrix.shape
        if config.init == "pissa" and config.rank > min(matrix.shape):
            raise ConfigError(
                f"init 'pissa' needs a rank of at most {min(matrix.shape)} for a layer of "
                f"{in_features} x {out_features}, got {config.rank}"
            )
        if matrix.is_meta:
            shapes = (config.rank, in_features), (out_features, config.rank)
            return torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta")
        A, B = STARTS[config.init](matrix, config.rank, config.factor, generator)
        return A.contiguous().to(matrix.device), B.contiguous().to(matrix.device)

    def _fuses(self, x: Tensor) -> bool:
        """Whether the fused function may stand for base(x) + update(x).

        Only for an untouched layer: somebody's hook or replaced forward must still be called.
        """
        base = self.base
        return (
            (type(base) is nn.Linear or self.transposed)
            and "forward" not in base.__dict__
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and not any(p.requires_grad for p in base.parameters())
            and x.dtype == base.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _dropout_mask(self, x: Tensor) -> Tensor | None:
        if not (self.training and self.dropout.p):
            return None
        return F.dropout(torch.ones_like(x), self.dropout.p)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer that stores its weight as (I, O)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether LinearWithLoRA can wrap this module.

    nn.MultiheadAttention reads its out_proj's weight without calling the layer, so an update
    there would never act: that layer does not count.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)
