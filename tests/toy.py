"""A small model with every kind of layer that is adapted, and methods for it."""

from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, AdaLoRA, BitFit, FullFineTune, LoRA

LAYERS = ("up", "down")
METHODS: dict[str, Any] = {
    "lora": LoRA(rank=2, target_modules=LAYERS),
    "dora": LoRA(rank=2, dora=True, target_modules=LAYERS),
    "pissa": LoRA(rank=2, init="pissa", target_modules=LAYERS),
    "rslora": LoRA(rank=2, scaling="alpha/sqrt(r)", target_modules=LAYERS),
    "parts": LoRA(rank=2, target_modules=("qkv.q", "qkv.v")),
    "everywhere": LoRA(rank=2, target_modules=("words", "conv", "groups", *LAYERS)),
    "saved": LoRA(rank=2, target_modules=LAYERS, modules_to_save=("head",)),
    "adalora": AdaLoRA(rank=4, target_rank=2, total_steps=9, target_modules=LAYERS),
    "ia3": IA3(target_modules=LAYERS, feedforward_modules=("down",)),
    "bitfit": BitFit(),
    "full": FullFineTune(),
}


class Toy(nn.Module):
    """Ids (N, T), or what would be looked up for them (N, T, 6), -> (N, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.groups = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.is_floating_point() else self.words(x)
        h = h + sum(c(h.transpose(-1, -2)) for c in (self.conv, self.groups)).transpose(-1, -2)
        h = h + self.down(torch.tanh(self.up(h)))
        q, _, v = self.qkv(h).chunk(3, -1)
        out: Tensor = self.head(h + q * v)
        return out


def toy(method: str, dtype: torch.dtype = torch.float32) -> Adapter:
    """The model in evaluation with a method attached, all trained numbers moved."""
    torch.manual_seed(0)
    adapter = attach(Toy().eval(), METHODS[method])
    adapter.model.to(dtype)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    for module in adapter.modules.values():
        module.refreshed()
        if method == "adalora":
            module.kept[0] = False
    return adapter
