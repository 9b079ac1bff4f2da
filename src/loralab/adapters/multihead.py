"""The low-rank update on nn.MultiheadAttention, which calls none of its projections.

It keeps q, k and v in one parameter and hands its output projection's weight to a function, so
the updated weights are made first and the module is called with them. Axes: E width, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loralab.adapters.init import INITS
from loralab.adapters.linear import Rows, block_diagonal
from loralab.adapters.methods import LoRA
from loralab.adapters.wrapper import Wrapper, to_wide, without_autocast
from loralab.errors import ConfigError

IN, OUT = "in_proj_weight", "out_proj.weight"


class MultiheadAttentionWithLoRA(Wrapper):
    """A frozen nn.MultiheadAttention with updates of its projections.

    Args:
        parts: rows of the joint weight (3 E, E) of q, k and v with an update each; none is one
            update for all, as peft has it.
        out: whether the output projection gets one.
    """

    merges_into = (IN,)

    def __init__(
        self,
        base: nn.MultiheadAttention,
        config: LoRA,
        generator: torch.Generator | None = None,
        parts: Sequence[Rows] = (),
        out: bool = True,
    ) -> None:
        super().__init__(base)
        if base.in_proj_weight is None:
            raise ConfigError(
                "nn.MultiheadAttention with own sizes of keys or values: not adapted",
                code="not_adaptable",
                field="target_modules",
            )
        if config.dora or config.init == "pissa" or config.dropout:
            raise ConfigError(
                "nn.MultiheadAttention takes plain LoRA: no dora, pissa or dropout", code="lora_only", field="method"
            )
        self.rank, self.scaling = config.rank, config.factor
        self.width = base.embed_dim
        self.parts = tuple(parts) or ((0, 3 * self.width),)
        self.lora_A, self.lora_B = self._drawn([stop - start for start, stop in self.parts], config, generator)
        self.out_A: nn.Parameter | None = None
        self.out_B: nn.Parameter | None = None
        if out:
            self.out_A, self.out_B = self._drawn([self.width], config, generator)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the base's output with the updated weights."""
        if self.merged:
            return self.base(*inputs, **named)
        weights = {n: w.to(self.base.in_proj_weight.dtype) for n, w in self._updated().items()}
        return functional_call(self.base, weights, inputs, named)

    def tensors(self) -> dict[str, Tensor]:
        """Return both updates under peft's names, with one rank: the narrower one is filled with zeros."""
        A, B = self.lora_A, block_diagonal(self.lora_B, self.parts, 3 * self.width, self.rank)
        out_A, out_B = A.new_zeros(A.shape), B.new_zeros(self.width, B.shape[1])
        if self.out_A is not None and self.out_B is not None:
            if len(self.parts) == 1:
                out_A, out_B = self.out_A, self.out_B
            else:
                out_A[: self.rank], out_B[:, : self.rank] = self.out_A, self.out_B
        return {
            "lora_A.weight": A,
            "lora_B.weight": B,
            "base_layer.out_proj.lora_A.weight": out_A,
            "base_layer.out_proj.lora_B.weight": out_B,
        }

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Put the updated weights in the place of both; the originals are kept aside."""
        if self.merged or self.cannot_merge:
            super().merge_weights()  # raises
        with without_autocast(self.lora_A.device):
            new = self._updated()
        totals = self._rounded({IN: new.pop(IN)})
        for owner, name, total in [
            (self.base, IN, totals[IN]),
            *((self.base.out_proj, "weight", w.to(totals[IN].dtype)) for w in new.values()),
        ]:
            key = IN if owner is self.base else OUT
            self._unmerged[key] = owner._parameters[name]
            owner.register_parameter(name, nn.Parameter(total, requires_grad=False))
        self.merged = True

    def unmerge_weights(self) -> None:
        """Put both weights back."""
        out = self._unmerged.pop(OUT, None)
        if out is not None:
            self.base.out_proj.register_parameter("weight", out)
        super().unmerge_weights()

    def _updated(self) -> dict[str, Tensor]:
        B = block_diagonal(self.lora_B, self.parts, 3 * self.width, self.rank)
        new = {IN: to_wide(self.base.in_proj_weight) + self.scaling * (B @ self.lora_A)}
        if self.out_A is not None and self.out_B is not None:
            update = self.scaling * (self.out_B @ self.out_A)
            new[OUT] = to_wide(self.base.out_proj.weight) + update
        return new

    def _drawn(
        self, rows: Sequence[int], config: LoRA, generator: torch.Generator | None
    ) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of parts of so many rows, each with a start of its own."""
        start = INITS[config.init]
        shapes = [torch.empty(count, self.width, device="meta") for count in rows]  # nothing else is read
        pairs = [start(shape, self.rank, self.scaling, generator) for shape in shapes]
        A, B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])
        device = self.base.in_proj_weight.device
        return nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
