"""The tables of docs/scale.md are what benchmarks/scale.py prints, and its formulas count right."""

import importlib
import json
import random
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from loralab.adapters.attach import attach
from loralab.adapters.folder import TENSORS
from loralab.adapters.methods import LoRA
from loralab.native.library import kernels_for
from loralab.tasks.examples import Example
from loralab.training import memory
from loralab.training.fast.forward_path import fastest_path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scale.md"
TINY = {"hidden": 32, "inner": 48, "layers": 3, "heads": 4, "groups": 2, "width": 8, "words": 50}


def benchmark(name: str) -> Any:
    """A module of the benchmarks, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


formulas, scale = benchmark("scale_formulas"), benchmark("scale")


def shape(**other: Any) -> Any:
    """That of tiny.llama."""
    return formulas.Shape(name="tiny", tied=True, **{**TINY, **other})


def test_the_tables_of_the_document_are_what_the_command_prints_without_torch() -> None:
    code = "import runpy, sys; runpy.run_path('scale.py', run_name='__main__'); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT / "benchmarks"
    )
    found = re.findall(r"^([a-z ]+)\n\n((?:\|.*\n)+)", done.stdout, re.M)
    printed = {name: table.strip() for name, table in found}
    text = DOCUMENT.read_text(encoding="utf-8")
    assert printed.keys() == scale.TABLES.keys()
    assert scale.updated(text, printed) == text, "python benchmarks/scale.py --update docs/scale.md"
    assert [name for name in scale.TABLES if f"<!-- table: {name} -->" not in text] == []


def test_the_numbers_of_a_base_are_counted_right() -> None:
    model = tiny.llama()
    assert formulas.parameters(shape()) == sum(p.numel() for p in model.parameters())
    assert formulas.base_bytes(shape()) == 2 * formulas.parameters(shape())
    published = {
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.1-8B": 8_030_261_248,
        "Qwen2.5-32B": 32_763_876_352,
        "Llama-3.1-70B": 70_553_706_496,
        "SmolLM2-135M": 134_515_008,
    }
    assert {n: formulas.parameters(s) for n, s in formulas.SHAPES.items()} == published


@pytest.mark.parametrize("targets", [formulas.WHOLE, ("q", "v"), ("down",)])
def test_an_adapter_has_the_predicted_numbers_and_bytes(targets: tuple[str, ...], tmp_path: Path) -> None:
    names = [f"{name}_proj" for name in targets]
    adapter = attach(tiny.llama(), LoRA(rank=4, target_modules=names))
    assert formulas.lora_parameters(shape(), 4, targets) == adapter.num_parameters
    file = adapter.save(tmp_path / "a") / TENSORS
    with file.open("rb") as stream:
        (header,) = struct.unpack("<Q", stream.read(8))
    own = formulas.adapter_bytes(shape(), 4, targets=targets)
    assert file.stat().st_size - 8 - header == formulas.FP32 * adapter.num_parameters
    assert own == pytest.approx(file.stat().st_size, rel=0.06)


def test_known_adapters_have_their_published_numbers() -> None:
    three = shape(hidden=3072, inner=8192, layers=28, heads=24, groups=8, width=128, words=128256)
    assert formulas.lora_parameters(three, 32, ("q", "v")) == 9_175_040
    assert formulas.lora_parameters(formulas.SHAPES["SmolLM2-135M"]) == 2_442_240


def test_keys_and_values_take_the_predicted_bytes() -> None:
    cache = DynamicCache()
    tiny.llama().bfloat16()(torch.arange(10)[None], past_key_values=cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == 10 * formulas.kv_bytes(shape())


def test_what_a_pass_keeps_is_predicted() -> None:
    native = kernels_for(torch.zeros(1, dtype=torch.bfloat16))
    if native is None or not native.dots:
        pytest.skip("the formula is for attention in one pass, which needs AVX-512 bf16")
    sizes = {**TINY, "hidden": 64, "width": 16}
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    adapter = attach(LlamaForCausalLM(config).bfloat16(), LoRA(rank=4))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed"
    ids = tuple(range(8))
    few, many = (memory.saved_bytes(path, [Example(0, ids, ids)] * rows) for rows in (20, 40))
    own = formulas.activation_bytes(shape(**sizes), rank=4)
    assert own == pytest.approx((many - few) / (20 * len(ids)), rel=0.02)


def test_operations_are_counted_as_products_are() -> None:
    base = shape()
    lora = formulas.lora_parameters(base)
    every = formulas.linear_parameters(base) + formulas.head_parameters(base)
    assert formulas.train_flops(base) == 4 * every + 6 * lora
    assert formulas.train_flops(base, full=True) == 6 * every
    assert formulas.token_flops(base, adapters=True) == 2 * (every + lora)


@pytest.mark.parametrize(("places", "exponent"), [(20, 0.7), (64, 1.0), (200, 1.0), (64, 1.3)])
def test_the_hit_rate_is_that_of_places_where_the_unused_makes_room(places: int, exponent: float) -> None:
    draw, count, asked = random.Random(0), 1000, 40_000
    weights = formulas.popularity(count, exponent).tolist()
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, one in enumerate(draw.choices(range(count), weights, k=asked)):
        hits += one in held and number >= asked // 4  # the places fill up first
        held[one] = None
        held.move_to_end(one)
        if len(held) > places:
            held.popitem(last=False)
    found = formulas.hit_rate(count, places, exponent)
    assert found == pytest.approx(hits / (asked - asked // 4), abs=0.015)
    assert formulas.hit_rate(count, count, exponent) == 1


def test_a_ceiling_is_the_tighter_of_two() -> None:
    base, slow = shape(), formulas.Machine(name="", memory=1e9, bandwidth=1e3, flops=1e15)
    read = formulas.decode_bytes(base, "bf16", 4, 2, 8)
    own = formulas.decode_ceiling(base, slow, "bf16", 4, 2, 8)
    assert own == pytest.approx(4 * 1e3 / read)
    weak = formulas.Machine(name="", memory=1e9, bandwidth=1e15, flops=1e6)
    own = formulas.decode_ceiling(base, weak, "bf16", 4, 2, 8)
    assert own == pytest.approx(1e6 / formulas.token_flops(base, adapters=True))


def test_own_machines_and_prices_are_taken(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "out.json"
    monkeypatch.setattr(
        sys, "argv", ["scale.py", "--machine", "48", "900", "90", "2.5", "--only", "price", "--json", str(file)]
    )
    scale.main()
    head, rows = json.loads(file.read_text(encoding="utf-8"))["tables"]["price"]
    assert head[-1] == "yours"
    assert float(rows[0][-1]) > 0
