"""Small networks in every block of a model.

Sources: Houlsby et al. 2019, arXiv:1902.00751 (after attention and after the feed-forward
network, before the residual); Pfeiffer et al. 2020, arXiv:2005.00247 (once a block, reading the
sum with the residual); He et al. 2022, arXiv:2110.04366 (beside the feed-forward network).
They add layers that no weight of the base can hold: they cannot be merged.
Axes: D width of the model, M width of the bottleneck.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.methods import Bottleneck
from loralab.adapters.peft_fields import own_config
from loralab.adapters.targets import Block, blocks, require_layers
from loralab.adapters.wrapper import Wrapper
from loralab.errors import TargetError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
CANNOT_MERGE = (
    "bottleneck adapters cannot be merged: they are layers of their own, with an activation that "
    "no weight of the base can hold"
)


class Network(nn.Module):
    """factor * up(act(down(x))) in the dtype of its weights, fp32: (..., D) -> (..., D)."""

    def __init__(self, size: int, config: Bottleneck, generator: torch.Generator | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size) if config.layer_norm else None
        self.down = nn.Linear(size, config.width)
        self.up = nn.Linear(config.width, size)
        self.dropout = nn.Dropout(config.dropout)
        self.act: Callable[[Tensor], Tensor] = _ACTIVATIONS[config.activation]
        self.factor = config.factor
        for layer, std in ((self.down, 0.02), (self.up, config.init_std)):
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the update, in the dtype of x."""
        own = x.to(self.down.weight.dtype)
        own = own if self.norm is None else self.norm(own)
        out = self.factor * self.up(self.act(self.down(own)))
        return self.dropout(out).to(x.dtype)


class _WithNetwork(Wrapper):
    cannot_merge = CANNOT_MERGE

    def __init__(self, base: nn.Module, network: Network) -> None:
        super().__init__(base)
        self.network = network.to(next(base.parameters()).device)


class AfterSublayer(_WithNetwork):
    """Houlsby: the last layer of a sub-layer, whose output x becomes x + network(x)."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Map (..., D_in) -> (..., D)."""
        return self.after(self.base(*inputs, **named))

    def after(self, y: Tensor, *_: Any) -> Tensor:
        """Return what `forward` gives, from the base's output."""
        return y + self.network(y)


class AfterBlock(_WithNetwork):
    """Pfeiffer, where norms come first: a whole block, whose output x becomes x + network(x).

    The block ends in x = h + residual, so this is h + network(h + residual) + residual.
    """

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the block's output with its first tensor changed."""
        return self.after(self.base(*inputs, **named))

    def after(self, y: Any, *_: Any) -> Any:
        """Return what `forward` gives, from the base's output."""
        if isinstance(y, Tensor):
            return y + self.network(y)
        return (y[0] + self.network(y[0]), *y[1:])


class BeforeLastNorm(_WithNetwork):
    """Pfeiffer, where the block ends in a norm N (BERT): N(h + network(N(h + r)) + r).

    The base is the module that computes N(dropout(dense(x)) + r) from x and r.
    """

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map x (..., D_inner), residual (..., D) -> (..., D)."""
        h = self.base.dropout(self.base.dense(x))
        change = self.network(self.base.LayerNorm(h + residual))
        out: Tensor = self.base.LayerNorm(h + change + residual)
        return out


class SaveInput(Wrapper):
    """The first layer of a feed-forward network; remembers what goes in, for `ParallelAdapter`."""

    cannot_merge = CANNOT_MERGE

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output."""
        return self.after(self.base(x), x)

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """Return what `forward` gives, from the base's output: the same."""
        self.seen = x
        return y


class ParallelAdapter(_WithNetwork):
    """Parallel: the last layer of a feed-forward network, plus network(what went into it)."""

    def __init__(self, base: nn.Module, network: Network, entrance: SaveInput) -> None:
        super().__init__(base, network)
        self._entrance = (entrance,)  # in a tuple: it is a module of the model, not of this one

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D_inner) -> (..., D)."""
        return self.after(self.base(x))

    def after(self, y: Tensor, *_: Any) -> Tensor:
        """Return what `forward` gives, from the base's output."""
        entrance = self._entrance[0]
        seen, entrance.seen = entrance.seen, None
        assert seen is not None  # the network's first layer ran before its last
        return y + self.network(seen)


def build(model: nn.Module, config: Bottleneck, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path."""
    found = blocks(model)
    require_layers([block.path for block in found], config.layers)
    wrappers: dict[str, Wrapper] = {}
    for block in found:
        if config.layers is None or block.number in config.layers:
            network = lambda b=block: Network(b.width, config, generator)  # noqa: E731
            wrappers |= _IN_BLOCK[config.placement](model, block, network)
    return wrappers


def _houlsby(model: nn.Module, block: Block, network: Any) -> dict[str, Wrapper]:
    names = (block.attention_out, block.ffn_out)
    return {name: AfterSublayer(model.get_submodule(name), network()) for name in names}


def _pfeiffer(model: nn.Module, block: Block, network: Any) -> dict[str, Wrapper]:
    parent = block.ffn_out.rpartition(".")[0]
    owner = model.get_submodule(parent)
    if all(hasattr(owner, name) for name in ("dense", "dropout", "LayerNorm")):
        return {parent: BeforeLastNorm(owner, network())}
    whole = model.get_submodule(block.path)
    if hasattr(whole, "output_layer_norm"):
        raise TargetError(
            f"{type(whole).__name__} ends in a norm that cannot be reached; use the placement houlsby",
            code="norm_out_of_reach",
            field="placement",
        )
    return {block.path: AfterBlock(whole, network())}


def _parallel(model: nn.Module, block: Block, network: Any) -> dict[str, Wrapper]:
    entrance = SaveInput(model.get_submodule(block.ffn_in))
    beside = ParallelAdapter(model.get_submodule(block.ffn_out), network(), entrance)
    return {block.ffn_in: entrance, block.ffn_out: beside}


_IN_BLOCK = {"houlsby": _houlsby, "pfeiffer": _pfeiffer, "parallel": _parallel}


def fields(config: Bottleneck, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: our own, since peft has no such method."""
    return {"peft_type": "BOTTLENECK", **asdict(config)}


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Bottleneck, Mapping[str, Tensor]]:
    """Return the configuration that our own fields describe."""
    return own_config(Bottleneck, fields), tensors
