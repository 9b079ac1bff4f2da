"""Low-rank update of a linear layer.

Sources: Hu et al. 2021, arXiv:2106.09685, equation 3; DoRA: Liu et al. 2024, arXiv:2402.09353,
equations 5 and 11. Axes: I in_features, O out_features, R rank; `...` any leading axes.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.bases import dense_weight, is_conv1d, is_linear, linear_shape
from loralab.adapters.eager import is_hooked, is_plain_tensor, is_ragged, row_by_row
from loralab.adapters.fused import BaseWithUpdate, can_fuse, linears_with_updates
from loralab.adapters.init import INITS
from loralab.adapters.methods import LoRA
from loralab.adapters.wrapper import Wrapper, to_wide, without_autocast
from loralab.errors import ConfigError

Rows = tuple[int, int]  # first and one past the last
_State = list[tuple[Tensor, int]]  # tensors and their versions


class LinearWithLoRA(Wrapper):
    """A frozen linear layer plus a trainable low-rank update: W0 x + (alpha / r) B A x.

    With DoRA the rows of W0 + (alpha / r) B A are rescaled to trained lengths.

    Args:
        base: nn.Linear, weight (O, I), transformers' Conv1D, weight (I, O), or a quantised
            layer that computes a linear map. Kept and frozen.
        config: rank, alpha, scaling, dropout and start of the update.
        generator: where the random start comes from; None is torch's global generator.
        parts: rows of the weight that get an update of their own each, such as those of q and v
            in a fused projection; none is one update for all rows.

    Raises:
        ConfigError: the rank exceeds min(I, O) for PiSSA, or the base is not a linear layer.
    """

    def __init__(
        self, base: nn.Module, config: LoRA, generator: torch.Generator | None = None, parts: Sequence[Rows] = ()
    ) -> None:
        super().__init__(base)
        if not is_linear(base):
            raise ConfigError(f"{type(base).__name__} is not a linear layer", code="not_linear", field="target_modules")
        self.transposed = is_conv1d(base)
        self.out_features, self.in_features = linear_shape(base)
        self.parts = tuple(parts) or ((0, self.out_features),)
        self.rank = config.rank
        self.scaling = config.factor
        self.dropout = nn.Dropout(config.dropout)
        A, B = self._start(config, generator)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        principal = config.init == "pissa"
        # PiSSA: the start is taken out again here, so that W0 itself is never touched
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", A.clone() if principal else None)
        self.register_buffer("start_B", B.clone() if principal else None)
        self.magnitude: nn.Parameter | None = None
        if config.dora:
            self.register_buffer("squared_norm", self._squared_norm(), persistent=False)
            self.register_load_state_dict_post_hook(_measure_again)
            self.magnitude = nn.Parameter(self.row_norm())
        self._ratio: tuple[Tensor, _State] | None = None  # kept while its tensors stay
        self.grid: Any = None  # of artefacts/merge_aware.py, while the update acts as it will once it is merged

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) -> (..., O)."""
        if self.merged:
            return self.base(x)
        if self.grid is not None:
            return self.grid.forward(x, self)
        if self.magnitude is not None and is_ragged(x):
            return row_by_row(self.forward, x)
        if self.magnitude is not None:
            return self._rescaled(x, self.ratio())
        return self._updated(x)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """Return what `forward` gives, from y = W0 x + b."""
        if self.magnitude is None:
            return y + self.update(x).to(y.dtype)
        bias = 0 if self.base.bias is None else self.base.bias
        ratio = self.ratio()
        return (ratio * (y - bias + self.update(x)) + bias).to(y.dtype)

    def ratio(self) -> Tensor:
        """Return the (O,) factors by which DoRA multiplies each row of W0 + (alpha / r) B A."""
        assert self.magnitude is not None
        of = (self.magnitude, self.lora_A, self.lora_B)
        if any(t.requires_grad for t in of) or not is_plain_tensor(self.magnitude):
            return self.magnitude / self.row_norm()
        if self._ratio is None or not _is_as_before(of, self._ratio[1]):
            # not an inference tensor: gradients of the input may have to pass it later
            with torch.inference_mode(False), torch.no_grad():
                ratio = self.magnitude / self.row_norm()
            self._ratio = ratio, [(t, _version(t)) for t in of]
        return self._ratio[0]

    def refreshed(self) -> None:
        """Forget what was worked out from the factors."""
        self._ratio = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast all tensors (nn.Module) and drop what was computed from them."""
        self.refreshed()
        return super()._apply(fn, recurse)

    def update(self, x: Tensor) -> Tensor:
        """Return (alpha / r) B A x: (..., I) -> (..., O), computed in the adapter's dtype."""
        A, B, scaling = self.factors()
        low = F.linear(self.dropout(x).to(A.dtype), A)  # (..., R)
        return scaling * F.linear(low, B)

    def _updated(self, x: Tensor) -> Tensor:
        """Return the base's output plus the update."""
        if can_fuse(self.base, x):
            mask = self._dropout_mask(x)
            return linears_with_updates(x, [BaseWithUpdate(self.base, *self.factors())], mask)[0]
        y = self.base(x)
        return y + self.update(x).to(y.dtype)

    def _rescaled(self, x: Tensor, ratio: Tensor) -> Tensor:
        """Return DoRA's ratio * (W0 x + update) + bias, where ratio (O,) is m over the rows' lengths.

        With dropout it is W0 x + b + (ratio - 1) W0 D(x) + ratio * update(D(x)), as in the
        authors' code.
        """
        bias = 0 if self.base.bias is None else self.base.bias
        if not (self.training and self.dropout.p):
            y = self._updated(x)
            if self.base.bias is None:
                return (ratio * y).to(y.dtype)
            return y + ((ratio - 1) * (y - bias)).to(y.dtype)
        y, dropped = self.base(x), self.dropout(x)
        A, B, scaling = self.factors()
        low = F.linear(dropped.to(A.dtype), A)
        plain = (self.base(dropped) - bias).to(ratio.dtype)
        change = (ratio - 1) * plain + ratio * (scaling * F.linear(low, B))
        return y + change.to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return a (R, I), B (O, R) and the factor of the update.

        PiSSA subtracts its start: rank 2 R. k parts stand below each other in A and in their
        own rows of B: rank k R.
        """
        A: Tensor = self.lora_A
        B = self._block_diagonal(self.lora_B)
        if self.start_A is not None and self.start_B is not None:
            A = torch.cat([A, self.start_A])
            B = torch.cat([B, -self._block_diagonal(self.start_B)], dim=1)
        return A, B, self.scaling

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return the update of the weight, (O, I), in the adapter's dtype."""
        A, B, scaling = self.factors()
        with without_autocast(A.device):
            total = scaling * (B @ A)
        if self.magnitude is None:
            return total
        weight = dense_weight(self.base).to(total.dtype)
        return (self.magnitude / self.row_norm())[:, None] * (weight + total) - weight

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """Return the length of each row of W0 + (alpha / r) B A, (O,).

        DoRA holds it constant in the gradient (section 4.3), in that of forward mode too. It is
        worked out from |W0|^2, W0 A' and A A', so that no second matrix of the size of W0 is ever
        made.
        """
        A, B, scaling = self.factors()
        A, B = A.detach(), B.detach()
        weight = dense_weight(self.base).to(A.dtype)
        with without_autocast(A.device):
            cross = (F.linear(weight, A) * B).sum(dim=1)
            own = ((B @ (A @ A.T)) * B).sum(dim=1)
        squared: Tensor = self.squared_norm + 2 * scaling * cross + scaling**2 * own
        return squared.clamp_min(0).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        """Return A, B, and DoRA's lengths, under peft's names."""
        A, B, _ = self.factors()
        found = {"lora_A.weight": A, "lora_B.weight": B}
        if self.magnitude is not None:
            found["lora_magnitude_vector"] = self.magnitude
        return found

    def merge_weights(self) -> None:
        """Put W0 + delta in the place of W0 (wrapper.py); on the grid of W0 where the layer computes there."""
        if self.grid is None or self.merged:
            super().merge_weights()
            return
        self._packed, self.base, self.merged = (self.base,), self.grid.merged(self), True

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight with the update in it, in the base's own layout."""
        total = to_wide(dense_weight(self.base)) + self.delta()
        return {"weight": total.T if self.transposed else total}

    def extra_repr(self) -> str:
        """Return rank and scaling, for print(model)."""
        return f"rank={self.rank}, scaling={self.scaling:g}"

    def _block_diagonal(self, B: Tensor) -> Tensor:
        return block_diagonal(B, self.parts, self.out_features, self.rank)

    def _start(self, config: LoRA, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        least = min(self.in_features, *(stop - start for start, stop in self.parts))
        if config.init == "pissa" and config.rank > least:
            raise ConfigError(
                f"init 'pissa' needs a rank of at most {least} for a layer of "
                f"{self.in_features} x {self.out_features}, got {config.rank}",
                code="rank_too_large",
                field="rank",
            )
        device = self.base.weight.device
        rows = sum(stop - start for start, stop in self.parts)
        if device.type == "meta":
            shapes = (len(self.parts) * config.rank, self.in_features), (rows, config.rank)
            return torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta")
        if config.init == "pissa":
            matrix = dense_weight(self.base)
        else:  # the other starts read nothing but the shape
            matrix = torch.empty(self.out_features, self.in_features, device="meta")
        start = INITS[config.init]
        pairs = [start(matrix[a:b], config.rank, config.factor, generator) for a, b in self.parts]
        A, B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        return A.contiguous().to(device), B.contiguous().to(device)

    def _squared_norm(self) -> Tensor:
        return to_wide(dense_weight(self.base)).square().sum(dim=1)

    def _dropout_mask(self, x: Tensor) -> Tensor | None:
        if not (self.training and self.dropout.p):
            return None
        return F.dropout(torch.ones_like(x), self.dropout.p)


def together(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Return the outputs of layers that read the same input, (..., I) -> (..., O) each.

    Those that have a plain low-rank update share its first product.

    Semantics:
        [layer(x) for layer in layers]
    """
    plain = [layer for layer in layers if is_plain(layer) and _one_for_all(layer, x)]
    updated = [BaseWithUpdate(layer.base, *layer.factors()) for layer in plain]
    found = iter(linears_with_updates(x, updated) if updated else ())
    return [next(found) if layer in plain else layer(x) for layer in layers]


def is_plain(layer: nn.Module) -> TypeGuard[LinearWithLoRA]:
    """Return whether W0 x + (alpha / r) B A x is all that the layer does."""
    plain = type(layer) is LinearWithLoRA and layer.magnitude is None and layer.grid is None
    return plain and not layer.merged and not is_hooked(layer)


def _one_for_all(layer: LinearWithLoRA, x: Tensor) -> bool:
    """Return whether the updates of several such layers get the very same input."""
    return not (layer.training and layer.dropout.p) and can_fuse(layer.base, x)


def _is_as_before(tensors: Sequence[Tensor], state: _State) -> bool:
    pairs = zip(tensors, state, strict=True)
    return all(now is then and _version(now) == version for now, (then, version) in pairs)


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; -1 for one made in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def _measure_again(module: LinearWithLoRA, keys: Any) -> None:
    """Compute |W0|^2 again after load_state_dict: the base's weight may have changed."""
    if not module.base.weight.is_meta:
        module.squared_norm = module._squared_norm()


def block_diagonal(B: Tensor, parts: Sequence[Rows], rows: int, rank: int) -> Tensor:
    """Place the B of each part, stacked, in its rows of the whole: (rows, parts * R)."""
    if tuple(parts) == ((0, rows),):
        return B
    whole = B.new_zeros(rows, len(parts) * rank)
    blocks = B.split([stop - start for start, stop in parts])
    for number, ((start, stop), block) in enumerate(zip(parts, blocks, strict=True)):
        whole[start:stop, number * rank : (number + 1) * rank] = block
    return whole
