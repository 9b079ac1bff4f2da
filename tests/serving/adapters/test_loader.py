"""The loader: an adapter made for a batch answers as one that is loaded alone, or is refused."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import IDS, MODELS, bert, fill, gpt2, llama, logits
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from loralab.adapters import folder
from loralab.adapters.attach import attach
from loralab.adapters.grouped import Bank, Span
from loralab.adapters.load import load
from loralab.adapters.methods import IA3, AdaLoRA, BitFit, Bottleneck, LinearProbe, LoRA, Prefix, Prompt
from loralab.errors import AdapterFileError
from loralab.models.load import Base
from loralab.serving.adapters.loader import AdapterLoader, ServableAdapter

KINDS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "sequence-classification"}
HEAD = ("classifier",)
CASES: list[tuple[str, Any]] = [
    ("llama", LoRA()),
    ("llama", LoRA(scaling="alpha/sqrt(r)", target_modules="attention")),
    ("llama", LoRA(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})),
    ("llama", LoRA(init="pissa", rank=3)),
    ("llama", LoRA(dora=True)),
    ("llama", LoRA(layers=(1,), exclude_modules=["k_proj"])),
    ("llama", LoRA(target_modules=["lm_head", "embed_tokens", "q_proj"])),
    ("llama", LoRA(modules_to_save=("lm_head",))),
    ("llama", LoRA(token_rows=(3, 7))),
    ("llama", AdaLoRA(rank=4, target_rank=2, total_steps=10)),
    ("llama", IA3()),
    ("llama", Bottleneck(width=4)),
    ("llama", Bottleneck(width=4, placement="pfeiffer")),
    ("llama", Bottleneck(width=4, placement="parallel", layer_norm=True)),
    ("gpt2", LoRA(target_modules=["c_attn.q", "c_attn.v"])),
    ("gpt2", LoRA(dora=True, rank=3)),
    ("gpt2", BitFit()),
    ("gpt2", IA3()),
    ("gpt2", LinearProbe(modules_to_save=("lm_head",))),
    ("bert", LoRA(modules_to_save=HEAD)),
    ("bert", BitFit(modules_to_save=HEAD)),
    ("bert", LinearProbe()),
    ("bert", IA3(modules_to_save=HEAD)),
    ("bert", Bottleneck(width=4, placement="pfeiffer", modules_to_save=HEAD)),
    ("bert", Bottleneck(width=4, placement="houlsby")),
]


def base_of(name: str, model: Any = None) -> Base:
    own = MODELS[name]() if model is None else model
    return Base(name=f"tiny-{name}", model=own, tokenizer=None, kind=KINDS[name], source="")


def save(name: str, method: Any, place: Path, seed: int = 1, **record: Any) -> Path:
    """Save an adapter of a tiny model."""
    made = fill(attach(MODELS[name](), method), seed)
    base = {"kind": KINDS[name], **record.pop("base", {})}
    return made.save(place, {"base": base, **record}, overwrite=True)


def served(base: Base, loaded: ServableAdapter) -> Tensor:
    """Return the logits of the base with an adapter in a bank, between rows of the base alone."""
    bank = Bank(base.model)
    bank.put("a", loaded.adapter)
    with bank.routed([Span("a", 0, len(IDS))]):
        found = logits(base.model)
    bank.remove()
    return found


def alone(name: str, place: Path) -> Tensor:
    model = MODELS[name]()
    load(model, place)
    return logits(model)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_in_a_bank_it_answers_as_alone(name: str, method: Any, tmp_path: Path) -> None:
    place = save(name, method, tmp_path / "a")
    base = base_of(name)
    before = state(base.model)
    modules = [type(module) for module in base.model.modules()]
    plain, loader = logits(base.model), AdapterLoader(base)
    expected = alone(name, place)
    for _ in range(2):  # the second time from what is remembered of the first
        found = loader.load(folder.read(place))
        assert found.prefix_kv is None and found.prefix_tokens == 0 and found.bytes > 0
        assert torch.allclose(served(base, found), expected, atol=1e-6)
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert torch.equal(logits(base.model), plain)
    assert [type(module) for module in base.model.modules()] == modules
    assert all(torch.equal(before[n], tensor) for n, tensor in base.model.state_dict().items())


def test_adapters_of_one_configuration_share_nothing_but_the_base(tmp_path: Path) -> None:
    base = base_of("llama")
    loader = AdapterLoader(base)
    places = [save("llama", LoRA(dora=True, rank=3), tmp_path / str(n), seed=n) for n in range(3)]
    made = [loader.load(folder.read(place)) for place in places]
    bank = Bank(base.model)
    for number, loaded in enumerate(made):
        bank.put(number, loaded.adapter)
    ids = torch.cat([IDS[:1]] * 3)
    with bank.routed([Span(n, n, n + 1) for n in range(3)]), torch.no_grad():
        found = base.model(ids).logits
    for number, place in enumerate(places):
        assert torch.allclose(found[number], alone("llama", place)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [Prefix(tokens=5), Prefix(tokens=4, mlp=True), Prompt(tokens=3)])
def test_a_prefix_is_its_keys_and_values(name: str, method: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    place = save(name, method, tmp_path / "a")
    base = base_of(name, MODELS[name]().to(dtype))
    plain, loaded = logits(base.model), AdapterLoader(base).load(folder.read(place))
    model = MODELS[name]().to(dtype)
    adapter = load(model, place)
    expected = logits(model)  # a prompt's keys and values are recorded here
    table = next(iter(adapter.modules.values())).table
    layers = range(len(adapter.modules))
    own = [table.of(n) if isinstance(method, Prefix) else table.states[n] for n in layers]
    assert loaded.prefix_kv is not None and loaded.prefix_kv.dtype == dtype
    assert torch.equal(loaded.prefix_kv, torch.stack(own).detach().to(dtype))
    assert loaded.prefix_tokens == method.tokens and not loaded.adapter.modules
    assert not torch.equal(plain, expected) and torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("method", [Prefix(tokens=5), Prompt(tokens=3)])
def test_a_prefix_in_the_cache_is_the_adapter(method: Any, tmp_path: Path) -> None:
    from transformers import DynamicCache

    place = save("llama", method, tmp_path / "a")
    base = base_of("llama")
    prefix_kv = AdapterLoader(base).load(folder.read(place)).prefix_kv
    assert prefix_kv is not None
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix_kv):
        cache.update(keys[None].expand(2, *keys.shape), values[None].expand(2, *values.shape), layer)
    with torch.no_grad():
        found = base.model(IDS, past_key_values=cache).logits
    assert torch.allclose(found, alone("llama", place), atol=1e-5)


# -- heads --------------------------------------------------------------------------------------


def three_to(classes: int) -> Any:
    """Return the tiny classifier's body with a head of so many classes."""
    model = bert()
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    other = BertForSequenceClassification(config).eval()
    other.bert.load_state_dict(model.bert.state_dict())
    return other


@pytest.mark.parametrize("method", [LoRA(modules_to_save=HEAD), LinearProbe()])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_adapter_brings_a_head_of_its_own_size(method: Any, classes: int, tmp_path: Path) -> None:
    adapter = fill(attach(three_to(classes), method))
    task = {"labels": [str(n) for n in range(classes)]}
    place = adapter.save(tmp_path / "a", {"base": {"kind": "sequence-classification"}, "task": task})
    model = three_to(classes)
    load(model, place)
    base = base_of("bert")
    loader = AdapterLoader(base)
    found = served(base, loader.load(folder.read(place)))
    assert found.shape[-1] == classes
    assert torch.allclose(found, logits(model), atol=1e-6)
    assert logits(base.model).shape[-1] == 3


def test_a_head_of_other_labels_than_named_is_refused(tmp_path: Path) -> None:
    place = save("bert", LinearProbe(), tmp_path / "a", task={"labels": ["a", "b"]})
    with pytest.raises(AdapterFileError) as error:
        AdapterLoader(base_of("bert")).load(folder.read(place))
    assert (error.value.code, error.value.field) == ("label_count", "labels")


# -- folders of another tool --------------------------------------------------------------------

PEFT = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "rslora": LoraConfig(
        r=4, target_modules=["q_proj", "nothing"], use_rslora=True, init_lora_weights=False, rank_pattern={"q_proj": 3}
    ),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", PEFT)
def test_what_peft_wrote_is_served(kind: str, tmp_path: Path) -> None:
    theirs = get_peft_model(llama(), copy.deepcopy(PEFT[kind]))
    theirs.save_pretrained(tmp_path / "a")
    base = base_of("llama")
    found = served(base, AdapterLoader(base).load(folder.read(tmp_path / "a")))
    with torch.no_grad():
        expected = theirs.eval()(IDS).logits
    assert torch.allclose(found, expected, atol=2e-6)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own
@pytest.mark.parametrize(
    "config",
    [
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
)
def test_a_prefix_of_peft_is_served(config: Any, tmp_path: Path) -> None:
    get_peft_model(llama(), config).save_pretrained(tmp_path / "a")
    loaded = AdapterLoader(base_of("llama")).load(folder.read(tmp_path / "a"))
    assert loaded.prefix_kv is not None and loaded.prefix_kv.shape == (3, 2, 2, 4, 8)


# -- memory -------------------------------------------------------------------------------------


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("method", "times"),
    [
        (LoRA(rank=2), 200),
        (LoRA(rank=2, dora=True, modules_to_save=("lm_head",)), 40),
        (IA3(), 40),
        (Prefix(tokens=3), 40),
        (Prompt(tokens=3), 10),
    ],
)
def test_what_is_dropped_leaves_nothing_and_the_base_is_untouched(method: Any, times: int, tmp_path: Path) -> None:
    place = save("llama", method, tmp_path / "a")
    base = base_of("llama")
    before, loader = state(base.model), AdapterLoader(base)
    bank = Bank(base.model)
    counts = []
    for number in range(times):
        loaded = loader.load(folder.read(place))
        bank.put(loaded.digest, loaded.adapter)
        bank.drop(loaded.digest)
        del loaded
        if number in (2, times - 1):
            counts.append(tensors_alive())
    assert counts[0] == counts[1]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loader._model.modules()]
    assert not any(hooks)
    assert all(torch.equal(before[n], tensor) for n, tensor in base.model.state_dict().items())


def test_what_is_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    place = save("llama", LoRA(rank=2), tmp_path / "a")
    loaded = AdapterLoader(base_of("llama")).load(folder.read(place))
    before = [p.clone() for p in loaded.adapter.parameters()]
    size = (place / folder.TENSORS).stat().st_size
    with (place / folder.TENSORS).open("r+b") as file:  # in place, as no careful writer does
        file.write(b"\1" * size)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.adapter.parameters(), strict=True))


def test_the_weights_of_the_base_are_shared() -> None:
    base = base_of("llama")
    loader = AdapterLoader(base)
    own = {id(parameter) for parameter in base.model.parameters()}
    assert {id(parameter) for parameter in loader._model.parameters()} == own
    assert loader._model.lm_head.weight is loader._model.model.embed_tokens.weight


def test_many_threads_load_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    methods = [LoRA(rank=2), Prompt(tokens=2), Bottleneck(width=3), LoRA(rank=2, dora=True)]
    places = [save("gpt2", m, tmp_path / str(n), seed=n) for n, m in enumerate(methods)]
    expected = [alone("gpt2", place) for place in places]
    base = base_of("gpt2", gpt2())
    loader = AdapterLoader(base)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: loader.load(folder.read(place)), places * 3))
    for number, loaded in enumerate(found):
        if loaded.prefix_kv is None:
            assert torch.allclose(served(base, loaded), expected[number % 4], atol=1e-6)
