"""A weighted sum of adapters answers as the base with all their updates in its weights."""

import copy
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving.conftest import World, write_adapter
from serving.talk import post

from loralab.adapters.adapter import Adapter
from loralab.adapters.combine import combine
from loralab.adapters.load import load as load_adapter
from loralab.adapters.methods import LoRA
from loralab.errors import AdapterNotFoundError, ConfigError
from loralab.serving.adapters.info import describe
from loralab.serving.adapters.sums import describe_sum, digest_of_sum, parse_sum, stack
from loralab.serving.http.keys import Key, Keys
from loralab.serving.request import AdapterPart, Sampling
from loralab.serving.text_engine import TextEngine

Open = Callable[..., TextEngine]
GREEDY = Sampling(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = ([5, 9, 31], [7] * 20, [4, 80, 12, 9, 3])


@torch.no_grad()
def alone(model: Any, prompt: Sequence[int]) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=10**6, pad_token_id=0
    )
    return tuple(out[0, len(prompt) :].tolist())


def merged(world: World, parts: Sequence[tuple[str, float]]) -> Any:
    """Return a copy of the base with the weighted updates of each adapter added to its weights."""
    model, updates = copy.deepcopy(world.base.model), {}
    for name, scale in parts:
        own = copy.deepcopy(world.base.model)
        adapter = load_adapter(own, world.store / name)
        for path, module in adapter.modules.items():
            A, B, scaling = module.factors()
            delta = scale * scaling * (B @ A).double()
            delta = delta.T if "embed" in path else delta
            updates[path] = updates.get(path, 0) + delta
    for path, delta in updates.items():
        weight = model.get_submodule(path).weight
        weight.data = (weight.double() + delta).float()
    return model.eval()


SUMS = [
    [("lora", 0.7), ("wide", 0.3)],
    [("lora", 1.0), ("wide", -0.5), ("pissa", 0.25)],
    [("head", 1.5), ("embedding", 0.5), ("lora", 0.2)],
    [("wide", 0.6)],
]


@pytest.fixture(scope="module", name="world")
def with_pissa(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Add an adapter to the world."""
    store = tmp_path_factory.mktemp("sums") / "store"
    shutil.copytree(world.store, store)
    write_adapter(world.base.model, LoRA(rank=3, init="pissa", target_modules=["q_proj"]), store / "pissa", 77)
    return replace(world, store=store)


def test_sums_answer_as_the_merged_model_beside_all_others(opened: Open, world: World) -> None:
    engine = opened(store=world.store)
    names = ["+".join(f"{name}:{scale}" for name, scale in parts) for parts in SUMS]
    asked: list[str | None] = [*names, None, "lora", "dora", "prefix"]
    found = {name: engine.generate(PROMPTS, adapters=[name] * 3, sampling=GREEDY) for name in names}
    mixed = engine.generate(
        [prompt for prompt in PROMPTS for _ in asked], adapters=asked * len(PROMPTS), sampling=GREEDY
    )
    for number, (name, parts) in enumerate(zip(names, SUMS, strict=True)):
        model = merged(world, parts)
        for place, prompt in enumerate(PROMPTS):
            expected = alone(model, prompt)
            assert found[name][place].tokens == expected, name
            assert mixed[place * len(asked) + number].tokens == expected, name
    assert engine.store.loads >= len(SUMS)


def test_the_update_is_the_weighted_sum(opened: Open, world: World) -> None:
    store = opened(store=world.store).store
    parts = [("lora", 0.7), ("wide", 0.3), ("pissa", -2.0)]
    loaded = [store.acquire(store.entry(name).digest) for name, _ in parts]
    values = [held.value for held in loaded if held is not None]
    scales = [scale for _, scale in parts]
    whole = stack(values, scales, "0" * 64).adapter
    for path, module in whole.modules.items():
        pairs = zip(values, scales, strict=True)
        expected = sum(s * v.adapter.modules[path].delta() for v, s in pairs if path in v.adapter.modules)
        assert torch.allclose(module.delta(), torch.as_tensor(expected), atol=1e-6)
        ranks = [len(v.adapter.modules[path].factors()[0]) for v in values if path in v.adapter.modules]
        assert module.rank == sum(ranks)


def test_it_is_what_combine_gives_of_full_rank(opened: Open, world: World) -> None:
    store, model = opened(store=world.store).store, copy.deepcopy(world.base.model)
    names = ("lora", "wide")
    for name in names:
        load_adapter(model, world.store / name, name=name)
    reference: Adapter = combine(model, {"lora": 0.7, "wide": 0.3}, how="svd", rank=28)
    loaded = [held.value for name in names if (held := store.acquire(store.entry(name).digest)) is not None]
    whole = stack(loaded, [0.7, 0.3], "0" * 64).adapter
    assert whole.modules.keys() == reference.modules.keys()
    for path, module in whole.modules.items():
        assert torch.allclose(module.delta(), reference.modules[path].delta(), atol=1e-4)


def test_it_takes_one_place_and_stays_in_it(opened: Open, world: World) -> None:
    engine = opened(store=world.store, resident=2)
    for _ in range(3):
        engine.generate([PROMPTS[0]], adapters=["lora:0.7+wide:0.3"], sampling=GREEDY)
        engine.generate([PROMPTS[0]], adapters=["wide:0.3+lora:0.7"], sampling=GREEDY)  # the same sum
        engine.generate([PROMPTS[0]], adapters=["lora"], sampling=GREEDY)
    assert (engine.store.loads, engine.store.evictions) == (2, 0)


def test_it_goes_with_the_name_of_a_part(opened: Open, world: World, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(world.base.model, LoRA(rank=2), tmp_path / name, seed)
    engine = opened(store=tmp_path)
    own = engine.generate([PROMPTS[0]], adapters=["one+two"], sampling=GREEDY)[0]
    assert own.digest is not None
    assert engine.store.holds(own.digest)
    engine.store.unload("two")
    assert not engine.store.holds(own.digest)
    with pytest.raises(AdapterNotFoundError):
        engine.submit(PROMPTS[0], adapter="one+two", sampling=GREEDY)


def test_a_sum_of_several_kinds_is_of_none_whatever_the_order() -> None:
    record = {"digest": "0" * 64, "base": {"kind": "sentence-encoder"}}
    one = describe("a", Path("a"), {"peft_type": "LORA"}, record, 1)
    other = replace(one, name="b", digest="1" * 64, kind="sequence-classification")
    assert [describe_sum("s", pair, [1, 1]).embeds for pair in ([one, other], [other, one])] == [False, False]
    assert describe_sum("s", [one, replace(one, digest="1" * 64)], [1, 1]).embeds


def test_a_digest_is_of_the_parts_and_their_scales() -> None:
    parts = [AdapterPart(name="a", digest="a" * 64, scale=0.7), AdapterPart(name="b", digest="b" * 64, scale=0.3)]
    other = [AdapterPart(name="a", digest="a" * 64, scale=0.3), AdapterPart(name="b", digest="b" * 64, scale=0.7)]
    assert digest_of_sum(parts) == digest_of_sum(parts[::-1]) != digest_of_sum(other)


@given(
    st.dictionaries(st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True), st.floats(-4, 4), min_size=1, max_size=8)
)
def test_names_and_scales_are_read(parts: dict[str, float]) -> None:
    assert parse_sum("+".join(f"{name}:{scale!r}" for name, scale in parts.items())) == list(parts.items())


@pytest.mark.parametrize(
    "name",
    [
        "+",
        "a+",
        ":1",
        "a:",
        "a:x",
        "a:nan",
        "a:inf",
        "a:1e999",
        "a:4.1+b",
        "a:-4.1",
        "a+a",
        "a:1+b+a:2",
        "a:0x1",
        "a:1_0",
        "a:1:2",
        "a: 1",
        "+".join("abcdefghi"),
        "+" * 100_000,
    ],
)
def test_a_sum_that_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_sum(name)
    assert error.value.field == "model"
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("other", ["dora", "ia3", "houlsby", "prefix", "prompt"])
def test_methods_that_are_no_low_rank_update_are_named(other: str, opened: Open) -> None:
    with pytest.raises(ConfigError) as error:
        opened().submit(PROMPTS[0], adapter=f"lora+{other}:0.5", sampling=GREEDY)
    assert (error.value.code, error.value.field) == ("not_low_rank", "model")
    assert other in str(error.value)


def body(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": [5, 9, 31], "max_tokens": 6, "temperature": 0}


def test_over_http_it_is_named_with_its_parts(opened: Open, world: World) -> None:
    engine = opened(store=world.store)
    engine.start()
    response = post(engine, "/v1/completions", body("lora:0.7+wide:0.3"))  # type: ignore[arg-type]
    answer = response.json()
    assert answer["model"] == answer["adapter"]["name"] == "lora:0.7+wide:0.3"
    assert answer["adapter"]["digest"] == response.headers["X-Loralab-Digest"]
    digests = {name: engine.store.entry(name).digest for name in ("lora", "wide")}
    assert answer["adapter"]["parts"] == [
        {"name": "lora", "digest": digests["lora"], "scale": 0.7},
        {"name": "wide", "digest": digests["wide"], "scale": 0.3},
    ]
    for wrong, status in (
        ("lora:5+wide", 400),
        ("lora+nowhere", 404),
        ("lora+dora", 400),
        ("lora+lora", 400),
        (f"lora+{digests['lora']}", 400),
        (f"lora+{world.base.name.rsplit('/', 1)[-1]}", 400),
    ):
        error = post(engine, "/v1/completions", body(wrong))  # type: ignore[arg-type]
        assert (error.status_code, error.json()["error"]["param"]) == (status, "model"), wrong


def test_a_key_needs_the_right_to_every_part(opened: Open, world: World) -> None:
    engine = opened(store=world.store)
    engine.start()
    secret = "a-key-of-the-tests"
    keys = Keys([Key(name="k", sha256=hashlib.sha256(secret.encode()).digest(), adapters=("lora", "head"))])
    for model, status in (("lora+head:0.5", 200), ("lora+wide", 404), ("wide:1", 404)):
        found = post(engine, "/v1/completions", body(model), keys=keys, key=secret)  # type: ignore[arg-type]
        assert found.status_code == status, model
