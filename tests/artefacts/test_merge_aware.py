"""Updates that act as they will once they are merged into NF4: output, gradient, merge, what cannot."""

from typing import Any

import pytest
import torch
from tiny import fill, llama, logits
from torch import nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import IA3, AdaLoRA, LoRA
from loralab.artefacts.merge_aware import (
    packed_layers,
    put_on_grid,
    require_method,
    seed_of,
    suits_grid,
    take_off_grid,
    with_update,
)
from loralab.errors import ConfigError
from loralab.models.quantize import NF4, QuantizedLinear, quantize

pytest.importorskip("bitsandbytes")


def adapted(config: Any = None) -> tuple[Any, Adapter]:
    model = llama(2, hidden_size=64, intermediate_size=128)
    quantize(model, "nf4", "llama")
    return model, fill(attach(model, config or LoRA(rank=2)))


def one_layer(dtype: torch.dtype) -> LinearWithLoRA:
    torch.manual_seed(0)
    base = nn.Linear(64, 48, dtype=dtype)
    packed = QuantizedLinear(NF4(base.weight), base.bias, (48, 64), dtype)
    layer = LinearWithLoRA(packed, LoRA(rank=4, alpha=8))
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer


def on_grid(layer: LinearWithLoRA) -> LinearWithLoRA:
    put_on_grid(Adapter(nn.ModuleDict({"layer": layer}), LoRA(rank=4, alpha=8), {"layer": layer}, {}))
    return layer


def test_output_and_gradient_are_those_of_the_merged_weight() -> None:
    layer = on_grid(one_layer(torch.float32))
    merged = with_update(layer.base.packed, layer.lora_A, layer.lora_B, 2.0, seed_of("layer")).dequantize().double()
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(3, 5, 64, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    update = 2.0 * B @ A
    straight = merged + update - update.detach()  # as if rounding were the identity
    want = wide @ straight.T + layer.base.bias.double()
    found = layer(x)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(found)
    found.backward(dy)
    want.backward(dy.double())
    for mine, theirs in ((layer.lora_A, A), (layer.lora_B, B), (x, wide)):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_gradient_is_that_of_fp32_but_for_rounding() -> None:
    narrow, wide = on_grid(one_layer(torch.bfloat16)), on_grid(one_layer(torch.float32))
    for name in ("lora_A", "lora_B"):
        getattr(wide, name).data = getattr(narrow, name).data.clone()
    wide.base = QuantizedLinear(NF4(narrow.base.dequantize()), narrow.base.bias.float(), (48, 64), torch.float32)
    x, dy = torch.randn(40, 64), torch.randn(40, 48)
    narrow(x.bfloat16()).backward(dy.bfloat16())
    wide(x).backward(dy)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(getattr(narrow, name).grad, getattr(wide, name).grad, rtol=0.05, atol=0.6)


def test_a_merge_has_the_codes_that_were_trained_and_can_be_undone() -> None:
    model, adapter = adapted()
    beside = logits(model)
    put_on_grid(adapter)
    live = logits(model)
    assert not torch.allclose(live, beside)
    codes = {n: m.grid.packed(m).data.clone() for n, m in packed_layers(adapter)}
    before = {n: m.base.packed for n, m in packed_layers(adapter)}
    adapter.merge()
    assert torch.equal(logits(model), live)
    for name, module in adapter.modules.items():
        assert torch.equal(module.base.packed.data, codes[name])
        assert torch.equal(module.base.packed.scales(), before[name].scales())
    assert len(codes) == 14
    adapter.unmerge()
    assert torch.equal(logits(model), live)
    take_off_grid(adapter)
    assert torch.equal(logits(model), beside)


def test_codes_follow_the_factors() -> None:
    _, adapter = adapted()
    put_on_grid(adapter)
    name, layer = next(packed_layers(adapter))
    first = layer.grid.packed(layer)
    assert layer.grid.packed(layer) is first
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert not torch.equal(layer.grid.packed(layer).data, first.data)
    adapter.load_state({**adapter.state(), f"{name}.lora_B": torch.zeros_like(layer.lora_B)})
    assert torch.equal(layer.grid.packed(layer).data, layer.base.weight.data)


def test_most_of_an_update_is_in_the_codes() -> None:
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False)
    layer = LinearWithLoRA(QuantizedLinear(NF4(base.weight), None, (256, 256), torch.float32), LoRA(rank=4, alpha=8))
    nn.init.normal_(layer.lora_B)
    layer.lora_B.data *= 0.05 * base.weight.norm() / layer.delta().norm()
    on_grid(layer)
    assert abs(layer.grid.kept(layer) - 1) < 0.1


@pytest.mark.parametrize(
    ("config", "code", "field"),
    [
        (IA3(), "lora_only", "merge_aware"),
        (AdaLoRA(total_steps=10), "lora_only", "merge_aware"),
        (LoRA(rank=2, dora=True), "no_merged_weight", "dora"),
        (LoRA(rank=2, dropout=0.1), "no_merged_weight", "dropout"),
        (LoRA(rank=2, target_modules=["lm_head"]), "nothing_packed", "merge_aware"),
    ],
    ids=["ia3", "adalora", "dora", "dropout", "head"],
)
def test_what_cannot_is_refused(config: Any, code: str, field: str) -> None:
    _, adapter = adapted(config)
    with pytest.raises(ConfigError) as error:
        require_method(config)
        put_on_grid(adapter)
    assert (error.value.code, error.value.field) == (code, field)
    assert suits_grid(adapter) == (field == "dropout")  # which a merge has nothing to do with


def test_a_base_that_is_not_packed_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        put_on_grid(attach(llama(2), LoRA(rank=2)))
    assert (error.value.code, error.value.field) == ("nothing_packed", "merge_aware")
