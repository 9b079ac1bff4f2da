"""Each way computes what the model computes, and is not taken where it does not."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES, Saver
from serving.conftest import write_adapter
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import IA3, BitFit, LoRA, Method, Prefix
from loralab.lanes import threads
from loralab.models.load import load as load_base
from loralab.native.library import kernels
from loralab.serving.kv_cache import KVCache
from loralab.serving.opening import open_engine
from loralab.serving.request import Sampling
from loralab.serving.runners import choose
from loralab.serving.runners.choose import ModelRunner, batch_of
from loralab.serving.runners.native import NativeRunner, unsupported_reason
from loralab.serving.scheduler import Chunk, TokenSequence
from loralab.serving.settings import ServeSettings

WIDE = {**SIZES, "hidden_size": 64, "num_attention_heads": 2, "initializer_range": 0.2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
MODELS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=SIZES["vocab_size"], **IDS)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, **IDS, num_key_value_heads=1)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, **IDS, num_key_value_heads=1, sliding_window=8)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=SIZES["vocab_size"],
            word_embed_proj_dim=64,
            max_position_embeddings=128,
            **IDS,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, **IDS, num_key_value_heads=1, head_dim=32, sliding_window=8)
    ),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(hidden_size=64, n_layer=2, n_head=2, **IDS, vocab_size=SIZES["vocab_size"])
    ),
}
TAKEN = {
    "gpt2": "packed",
    "qwen2": "packed",
    "mistral": "packed",
    "opt": "packed",
    "gemma2": "one by one",
    "bloom": "one by one",
}
needs_dots = pytest.mark.skipif(
    kernels() is None or not kernels().dots,  # type: ignore[union-attr]
    reason="no AVX-512 BF16, or no C compiler",
)


@pytest.mark.parametrize("name", MODELS)
def test_any_causal_model_is_served(name: str, save_tiny: Saver, tmp_path: Path) -> None:
    """Mixed requests, longer than a window: what transformers' generate writes for each alone."""
    torch.manual_seed(1)
    folder = save_tiny(name, MODELS[name](), True)
    base = load_base(str(folder), kind="causal-lm")
    methods: dict[str, Method] = {"lora": LoRA(rank=3), "prefix": Prefix(tokens=4, init_std=0.3)}
    if name == "bloom":  # its places cannot be moved
        del methods["prefix"]
    if name == "gpt2":
        methods["biases"] = BitFit()
    for seed, (own, method) in enumerate(methods.items()):
        write_adapter(base.model, method, tmp_path / own, seed)
    engine = open_engine(
        model=str(folder), store=tmp_path, settings=ServeSettings(precision="fp32", cache_memory="1MB", step_tokens=9)
    )
    assert engine._runner.names[-1] == TAKEN[name], engine._runner.refused
    asked = [[5, 6, 7], list(range(3, 25)), [9]]
    names = [None, *methods]
    jobs = [(own, prompt) for own in names for prompt in asked]
    found = engine.generate(
        [prompt for _, prompt in jobs],
        adapters=[own for own, _ in jobs],
        sampling=Sampling(max_tokens=5, temperature=0, ignore_eos=True),
    )
    for (own, prompt), answer in zip(jobs, found, strict=True):
        assert answer.tokens == generated(str(folder), own and tmp_path / own, prompt), (own, prompt)


@torch.no_grad()
def generated(folder: str, adapter: Any, prompt: list[int]) -> tuple[int, ...]:
    model = load_base(folder, kind="causal-lm").model
    if adapter is not None:
        load_adapter(model, adapter)
    ids = torch.tensor([prompt])
    out = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=10**6,
        pad_token_id=0,
        repetition_penalty=1.0,
    )
    return tuple(out[0, len(prompt) :].tolist())


def llama(**options: Any) -> Any:
    torch.manual_seed(2)
    config = LlamaConfig(**{**WIDE, **options}, **IDS, num_key_value_heads=1)
    return LlamaForCausalLM(config).bfloat16().eval()


@needs_dots
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 40])
def test_the_compiled_step_is_the_model(rows: int, tmp_path: Path) -> None:
    """Every token of ragged rows in pieces, some with adapters of many kinds and ranks."""
    model = llama()
    methods = [
        LoRA(rank=1),
        LoRA(rank=7, dora=True),
        IA3(),
        LoRA(rank=33, alpha=3.0),
        LoRA(rank=64, target_modules=["v_proj", "down_proj"]),
    ]
    pool = KVCache(model, 256)
    compiled, solo = NativeRunner(model, pool), [model]
    for number, method in enumerate(methods):
        folder = write_adapter(model.float(), method, tmp_path / str(number), number)
        own = llama()
        adapter = load_adapter(own, folder)
        solo.append(own)
        assert compiled.put(number, adapter)
    model.bfloat16()
    compiled = clone_layout(model, pool, tmp_path, len(methods))
    draw = torch.Generator().manual_seed(rows)
    lively = []
    for number in range(rows):
        length = int(torch.randint(1, 40, (1,), generator=draw))
        tokens = torch.randint(3, 90, (length,), generator=draw).tolist()
        key = number % (len(methods) + 1) - 1
        lively.append(
            TokenSequence(
                number=number,
                key=None if key < 0 else key,
                tokens=tokens,  # type: ignore[arg-type]
                blocks=list(range(number * 4, number * 4 + 4)),
                scored=1,
            )
        )
    lively.sort(key=lambda row: -1 if row.key is None else row.key)
    found: dict[int, list[torch.Tensor]] = {row.number: [] for row in lively}
    while works := [Chunk(r, r.done, min(r.done + 17, len(r.tokens))) for r in lively if r.left]:
        out = compiled.logits(batch_of(works)).split([len(work.logit_positions) for work in works])
        for work, part in zip(works, out, strict=True):
            found[work.sequence.number].append(part)
            work.sequence.done = work.stop
    for row in lively:
        own = solo[0 if row.key is None else 1 + int(row.key)]
        with torch.no_grad():
            expected = own(input_ids=torch.tensor([row.tokens])).logits[0, :-1].float()
        if len(expected):
            mine = torch.cat(found[row.number])
            off = (mine - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert float(off.median()) < 0.05, (row.key, off)


def clone_layout(model: Any, pool: KVCache, folder: Path, count: int) -> NativeRunner:
    """Compiled on the bfloat16 weights, which are other tensors than before."""
    compiled = NativeRunner(model, pool)
    for number in range(count):
        own = llama()
        assert compiled.put(number, load_adapter(own, folder / str(number)))
    return compiled


@needs_dots
def test_the_compiled_step_has_the_same_bytes_with_any_number_of_threads() -> None:
    model = llama()
    compiled = NativeRunner(model, KVCache(model, 16))
    found = []
    for count in (1, 2, 3):
        rows = [
            TokenSequence(number=n, key=None, tokens=[*range(3, 13 + n)], blocks=[2 * n, 2 * n + 1]) for n in range(3)
        ]
        with threads(count):
            found.append(compiled.logits(batch_of([Chunk(row, 0, len(row.tokens)) for row in rows])))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_dots
@pytest.mark.parametrize("packed_from", [1, 9, math.inf])
def test_long_prompts_go_through_the_packed_way_with_the_same_logits(packed_from: float, tmp_path: Path) -> None:
    model, alone = llama(), llama()
    folder = write_adapter(alone.float(), LoRA(rank=5), tmp_path / "a", 3)
    adapted, loaded = llama(), llama()
    load_adapter(adapted, folder)
    runner = ModelRunner(model, 32)
    runner.packed_from = packed_from
    adapter = load_adapter(loaded, folder)
    adapter.detach()
    runner.put("a", SimpleNamespace(adapter=adapter, prefix_kv=None))
    rows = [(None, 20), (None, 3), ("a", 20), ("a", 4), (None, 1)]
    draw = torch.Generator().manual_seed(0)
    chunks, expected = [], []
    for number, (key, length) in enumerate(sorted(rows, key=lambda row: row[0] or "")):
        tokens = torch.randint(3, 90, (length,), generator=draw).tolist()
        blocks = list(range(4 * number, 4 * number + 4))
        chunks.append(Chunk(TokenSequence(number=number, key=key, tokens=tokens, blocks=blocks), 0, length))
        with torch.no_grad():
            expected.append((adapted if key else llama())(input_ids=torch.tensor([tokens])).logits[0, -1:].float())
    for _ in range(2):
        for mine, theirs in zip(runner.logits(chunks), expected, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 0.05
    runner.drop("a")
    assert [type(module) for module in model.modules()] == [type(module) for module in llama().modules()]


@needs_dots
@pytest.mark.parametrize(
    ("slower", "found"),
    [
        ([], (math.inf, math.inf)),
        ([(0, 128), (0, 512), (1920, 2048)], (128, math.inf)),  # deep ones are among the long ones
        ([(0, 512), (1920, 2048)], (512, 2048)),
        ([(1920, 2048)], (math.inf, 2048)),
    ],
)
def test_long_chunks_go_the_way_that_was_quicker_for_such(
    slower: list[tuple[int, int]], found: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "_is_slower", lambda *asked: asked[3:] in slower)
    runner = ModelRunner(llama(), 32)
    assert (runner.packed_from, runner.packed_beyond) == found
    for start, stop in ((0, 31), (0, 128), (0, 512), (1919, 2047), (1920, 2048), (2049, 2050), (3000, 3200)):
        chunk = Chunk(TokenSequence(number=0, key=None, tokens=[0] * stop), start, stop)
        packed = stop - start >= found[0] or (stop - start >= 128 and stop >= found[1])
        assert runner._is_compiled(chunk) is not packed, (start, stop)


@needs_dots
def test_a_cache_is_not_timed_with_prompts_that_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(choose, "_seconds", lambda runner, batch: timed.append(batch.places[-1] + 1) or 1.0)
    ModelRunner(llama(), 9)
    assert sorted({*timed}) == [32, 128]


@needs_dots
def test_what_a_model_has_beyond_is_noticed() -> None:
    assert unsupported_reason(llama()) == ""
    assert "AVX-512" in unsupported_reason(llama().float())
    assert "uneven" in unsupported_reason(llama(hidden_size=36))
    assert "activation" in unsupported_reason(llama(hidden_act="gelu"))
    assert "biases" in unsupported_reason(llama(mlp_bias=True))
    assert "window" in unsupported_reason(MistralForCausalLM(MistralConfig(**WIDE, num_key_value_heads=1)).bfloat16())
    assert "GPT2LMHeadModel" in unsupported_reason(MODELS["gpt2"]().bfloat16())


@needs_dots
def test_a_compiled_step_that_is_wrong_is_not_taken(monkeypatch: Any) -> None:
    model = llama()
    assert ModelRunner(model, 32).names == ["compiled", "packed"]
    whole = NativeRunner.logits
    monkeypatch.setattr(NativeRunner, "logits", lambda self, step: whole(self, step).roll(1, dims=1))
    ways = ModelRunner(model, 32)
    assert ways.names == ["packed"]
    assert "differ by" in ways.refused["compiled"]


def test_numbers_of_a_request_that_went_wrong_do_not_spread() -> None:
    """A block that held no numbers serves the next request as a fresh one would."""
    model = llama().float()
    ways = ModelRunner(model, 32)
    row = TokenSequence(number=0, key=None, tokens=[5, 6, 7], blocks=[0])
    expected = ways.logits([Chunk(row, 0, 3)])[0]
    pool: KVCache = ways._fallback._pool  # type: ignore[union-attr]
    pool.keys[:, 0] = torch.nan
    pool.values[:, 0] = torch.inf
    assert torch.equal(ways.logits([Chunk(row, 0, 3)])[0], expected)
