"""Methods as another package brings them: the example's VeRA, and one of a layer at a time."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters import registry
from loralab.adapters.bases import linear_shape
from loralab.adapters.methods import Method
from loralab.adapters.registry import MethodSpec, register

PLUGIN = Path(__file__).parents[1] / "examples" / "vera_plugin"


def vera_plugin() -> Any:
    """The module of the example, imported once."""
    if "vera_plugin" not in sys.modules:
        where = PLUGIN / "vera_plugin.py"
        found = importlib.util.spec_from_file_location("vera_plugin", where)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules["vera_plugin"] = module
        found.loader.exec_module(module)
    return sys.modules["vera_plugin"]


@dataclass(frozen=True, kw_only=True)
class Outer(Method):
    """W0 x + factor * u (v . x)."""

    factor: float = 1.0


class LinearWithOuter(nn.Module):
    """No base class of loralab's; v starts at random numbers that nobody asked for."""

    def __init__(self, config: Outer, layer: nn.Module) -> None:
        super().__init__()
        out_features, in_features = linear_shape(layer)
        self.base, self.factor = layer, config.factor
        self.u = nn.Parameter(torch.zeros(out_features))
        self.v = nn.Parameter(torch.randn(in_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        low = (x.to(self.v.dtype) * self.v).sum(-1, keepdim=True)
        return y + (self.factor * low * self.u).to(y.dtype)

    def delta(self) -> Any:
        return self.factor * torch.outer(self.u, self.v)


def outer(**changes: Any) -> MethodSpec:
    """The short form of a method: three functions, no more."""
    given: dict[str, Any] = {
        "config": Outer,
        "name": "outer",
        "build": lambda config, path, layer: LinearWithOuter(config, layer),
        "fields": lambda config: {"factor": config.factor},
        "parse": lambda fields: Outer(factor=fields["factor"]),
        **changes,
    }
    return MethodSpec(**given)


@contextmanager
def registered(*specs: MethodSpec) -> Iterator[None]:
    """Methods that are known within the block."""
    registry.built_in()
    before, looked = dict(registry._SPECS), set(registry._LOADED)
    try:
        for spec in specs:
            register(spec)
        yield
    finally:
        for store, own in ((registry._SPECS, before), (registry._LOADED, looked)):
            store.clear()
            store.update(own)
