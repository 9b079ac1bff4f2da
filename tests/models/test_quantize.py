"""4-bit weights: the levels and sizes of the papers, products, gradients, what survives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fill, llama, logits
from torch import nn

from loralab.adapters.attach import attach
from loralab.adapters.methods import IA3, LoRA
from loralab.errors import ModelError
from loralab.models.gguf_blocks import FORMATS, GGUFBlocks, linear_tensors, row_order
from loralab.models.quantize import NF4, QuantizedLinear, dequantize, quantize, retained_share

LEVELS = [  # arXiv:2305.14314, appendix E
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> QuantizedLinear:
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedLinear(NF4(weight), bias, shape, weight.dtype)


def test_the_levels_are_those_of_the_paper() -> None:
    weight = torch.tensor(LEVELS).repeat(4)[None].repeat(64, 1)  # each block holds a 1
    plain = NF4(weight, double=False).dequantize()
    torch.testing.assert_close(plain, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_a_weight(double: bool, bits: float) -> None:
    weight = torch.randn(1024, 1024)
    assert round(8 * NF4(weight, double=double).nbytes() / weight.numel(), 3) == bits


@pytest.mark.parametrize("shape", [(6, 32), (5, 48), (3, 96), (4, 100), (3, 7), (4, 128)], ids=str)
def test_every_weight_has_the_scale_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = NF4(torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None])
    codes = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], dim=1).flatten().int()
    scales = weight.scales().repeat_interleave(64)
    count = shape[0] * shape[1]
    want = torch.tensor(LEVELS)[codes[:count]] * scales[:count]
    torch.testing.assert_close(weight.dequantize(), want.view(shape), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_linear_layer_of_its_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = packed(torch.randn(48, 64, dtype=dtype), torch.randn(48, dtype=dtype))
    plain = nn.Linear(64, 48)
    plain.weight.data, plain.bias.data = layer.dequantize(), layer.bias.data.float()
    plain = plain.to(dtype)
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, want = layer(x), plain(y)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, want, **tolerance)
    found.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=5e-2 if tolerance else 1e-4, atol=2e1 if tolerance else 1e-3)
    assert not any(p.requires_grad for p in layer.parameters())


def test_casting_a_model_leaves_the_bytes_alone() -> None:
    layer = packed(torch.randn(32, 64), torch.randn(32))
    before, data = layer.dequantize(), layer.weight.data.clone()
    layer.bfloat16()
    assert torch.equal(layer.weight.data, data)
    assert torch.equal(layer.dequantize(), before)
    assert layer.bias.dtype == torch.bfloat16


def test_all_linear_layers_but_the_head_are_packed() -> None:
    model = llama()
    quantize(model, "nf4", "llama")
    names = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(names) == 21
    assert type(model.lm_head) is nn.Linear
    assert dequantize(model) == 21
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


@pytest.mark.parametrize("config", [LoRA(rank=2), LoRA(rank=2, dora=True), IA3(), LoRA(rank=2, init="pissa")], ids=str)
def test_methods_on_a_packed_base(config: Any) -> None:
    model = llama()
    quantize(model, "nf4", "llama")
    before = logits(model)
    adapter = attach(model, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    fill(adapter)
    live = logits(model)
    adapter.merge()
    assert not any(isinstance(m.base, QuantizedLinear) for m in adapter.modules.values())
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(logits(model), live)
    adapter.merge()
    adapter.merge_and_detach()
    dequantize(model)
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "least", "most"), [(0.02, 0.0, 0.15), (0.2, 0.93, 1.03)])
def test_a_small_update_does_not_survive_4_bits(size: float, least: float, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    base = NF4(weight).dequantize()
    update = torch.randn(256, 8) @ torch.randn(8, 256)
    update *= size * weight.norm() / update.norm()
    assert least <= retained_share(base, base + update) <= most
    assert retained_share(base, base) == 1.0


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_are_unpacked_as_by_the_gguf_package(kind: str) -> None:
    weight = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    form = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(weight, form)
    blocks = GGUFBlocks(torch.from_numpy(data), kind)
    want = torch.from_numpy(gguf.quants.dequantize(data, form))
    assert torch.equal(blocks.dequantize(), want)
    assert blocks.nbytes() * 8 / weight.size == FORMATS[kind][0] * 8 / 32


def test_other_formats_go_through_the_package() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float16)
    blocks = GGUFBlocks(torch.from_numpy(weight.view(np.uint8)), "F16")
    assert torch.equal(blocks.dequantize(), torch.from_numpy(weight.astype(np.float32)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6))
def test_the_rotary_order_undoes_that_of_llama_cpp(heads: int, half: int) -> None:
    rows = torch.arange(2 * half * heads)
    theirs = rows.view(heads, 2, half).transpose(1, 2).reshape(-1)  # its converter's permutation
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=heads)
    for layer in ("attn_q", "attn_k"):
        order = row_order("llama", config, layer, len(rows))
        assert order is not None
        assert torch.equal(theirs[order], rows)
    assert row_order("llama", config, "attn_v", len(rows)) is None
    assert row_order("qwen2", config, "attn_q", len(rows)) is None


def write_gguf(file: Path, model: Any, architecture: str = "llama") -> None:
    """The layers of a tiny Llama in 8 bits, as llama.cpp names and orders them."""
    writer = gguf.GGUFWriter(file, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    short = {
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear and path != "lm_head":
            name, number = path.split(".")[-1], path.split(".")[2]
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            weight = layer.weight.detach()
            if name in heads:
                shape = (heads[name], 2, len(weight) // heads[name] // 2, weight.shape[1])
                weight = weight.view(shape).transpose(1, 2).reshape(weight.shape)
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(weight.contiguous().numpy(), kind)
            writer.add_tensor(f"blk.{number}.{short[name]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_blocks_of_a_file_take_the_place_of_the_weights(tmp_path: Path) -> None:
    model, file = wide(), tmp_path / "tiny.gguf"
    write_gguf(file, model)
    found = linear_tensors(file, model.config)
    for path, blocks in found.items():
        model.get_submodule(path).weight.data = blocks.dequantize()
    before = logits(model)
    quantize(model, "gguf", str(file))
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 21
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-7)


def test_blocks_of_another_model_are_refused(tmp_path: Path) -> None:
    model, file = wide(), tmp_path / "tiny.gguf"
    write_gguf(file, model)
    for path, blocks in linear_tensors(file, model.config).items():
        model.get_submodule(path).weight.data = blocks.dequantize()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(ModelError) as error:
        quantize(model, "gguf", str(file))
    assert (error.value.code, error.value.field) == ("damaged", "model.layers.1.mlp.up_proj")
    with pytest.raises(ModelError) as error:
        quantize(model, "gguf", "llama")
    assert (error.value.code, error.value.field) == ("not_gguf", "quantize")
    write_gguf(tmp_path / "other.gguf", wide(), "mamba")
    with pytest.raises(ModelError) as error:
        quantize(wide(), "gguf", str(tmp_path / "other.gguf"))
    assert (error.value.code, error.value.field) == ("unknown_architecture", "model")


def wide() -> Any:
    """The tiny Llama with an inner width of whole blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            tie_word_embeddings=True,
        )
    ).eval()
