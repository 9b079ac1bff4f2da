"""The quick path is the plain one: loss and all gradients, or it is not taken."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_variants import VARIANTS
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bert, fill, gpt2, llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
    XLNetLMHeadModel,
)

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.methods import FullFineTune, LoRA, Prompt
from loralab.errors import ModelError
from loralab.lanes import threads
from loralab.models.pictures import Pictures
from loralab.tasks.examples import IGNORED, Example
from loralab.training.fast import forward_path, lane_loss
from loralab.training.fast.forward_path import ForwardPath, fastest_path
from loralab.training.memory import checkpoint_gradients

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
}


def made(kind: Any, config: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return kind(config).eval()

    return make


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "untied": made(llama().__class__, llama().config.__class__(**SIZES, tie_word_embeddings=False)),
    "mistral": made(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": made(Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": made(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8)),
    "phi3": made(Phi3ForCausalLM, Phi3Config(**SIZES)),
    "opt": made(
        OPTForCausalLM,
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=50,
            word_embed_proj_dim=32,
            dropout=0.0,
        ),
    ),
}
NOT_PACKED: dict[str, Callable[[], Any]] = {
    "windowed mistral": made(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=4)),
    "gpt2": gpt2,  # drops attention weights out while it trains
    "gemma2": made(Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8)),
    "gemma3": made(Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, head_dim=8)),
}


def rows(lengths: list[int], answers: list[int]) -> list[Example]:
    draw = torch.Generator().manual_seed(sum(lengths))
    found = []
    for number, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        ids = tuple(torch.randint(3, 50, (length,), generator=draw).tolist())
        start = length - min(answer, length)
        found.append(Example(number, ids, (IGNORED,) * start + ids[start:]))
    return found


RAGGED = rows([31, 20, 9, 4, 1], [3, 20, 4, 0, 1])


def adapted(model: Any, method: Any = None) -> Adapter:
    draw = torch.Generator().manual_seed(0)
    return fill(attach(model, method or LoRA(rank=2), generator=draw))


def result(path: ForwardPath, adapter: Adapter, examples: list[Example], seed: int = 0) -> list[Tensor]:
    """Return loss and gradients, as the loop would get them."""
    torch.manual_seed(seed)
    total = torch.zeros(())
    for parameter in adapter.parameters():
        parameter.grad = None
    with path.activated():
        for part in path.micro_batches(examples):
            loss = path.loss(part)
            total += loss.detach()
            if loss.requires_grad:
                loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.parameters()]
    return [total, *gradients]


def plain(adapter: Adapter, kind: str = "causal-lm") -> ForwardPath:
    return ForwardPath(adapter.model, kind, pad_id=0)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    largest = max(float(t.abs().max()) for t in expected[1:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5 * max(1.0, largest))


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_loss_and_gradients_of_padded_ones(name: str) -> None:
    adapter = adapted(MODELS[name]())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused
    adapter.model.train()
    assert_same(result(path, adapter, RAGGED), result(plain(adapter), adapter, RAGGED))


@pytest.mark.parametrize("name", NOT_PACKED)
def test_a_model_that_cannot_be_packed_is_found_out(name: str) -> None:
    adapter = adapted(NOT_PACKED[name]())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "patched"
    assert path.refused["packed"]
    adapter.model.eval()
    assert_same(result(path, adapter, RAGGED), result(plain(adapter), adapter, RAGGED))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method(variant: str) -> None:
    if variant == "bitfit":
        pytest.skip("a Llama has no biases")
    adapter = adapted(llama(), VARIANTS[variant])
    if adapter.budget is not None:  # its regulariser would be in the first gradient only
        for module in adapter.modules.values():
            module.regularise(0.0)
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    expected = "patched" if variant.startswith(("prefix", "prompt")) else "packed"
    assert path.mode == expected, path.refused
    adapter.model.eval()
    assert_same(result(path, adapter, RAGGED), result(plain(adapter), adapter, RAGGED))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "k_proj", "up_proj"]},
        {"token_rows": [3, 7]},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 1.0}},
    ],
)
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_heads_and_embeddings_that_are_adapted(model: str, options: dict[str, Any]) -> None:
    adapter = adapted(MODELS[model](), LoRA(rank=2, **options))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused
    assert_same(result(path, adapter, RAGGED), result(plain(adapter), adapter, RAGGED))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), room=st.integers(16, 200), data=st.data())
def test_any_rows_in_any_room(lengths: list[int], room: int, data: st.DataObject) -> None:
    answers = data.draw(st.lists(st.integers(0, 60), min_size=len(lengths), max_size=len(lengths)))
    adapter, examples = adapted(llama()), rows(lengths, answers)
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    path.max_tokens = room
    assert sorted(e.row for part in path.micro_batches(examples) for e in part) == list(range(len(lengths)))
    assert_same(result(path, adapter, examples), result(plain(adapter), adapter, examples))


def test_rows_without_any_label_have_no_loss_and_no_gradient() -> None:
    adapter = adapted(llama())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    for tensor in result(path, adapter, rows([5, 1, 9], [0, 0, 0])):
        assert tensor.count_nonzero() == 0


def test_dropout_draws_the_same_masks_where_rows_stay_padded() -> None:
    adapter = adapted(llama(), LoRA(rank=2, dropout=0.4))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused
    path.mode = "patched"
    adapter.model.train()
    one, other = (result(p, adapter, RAGGED, seed=5) for p in (path, plain(adapter)))
    assert_same(one, other)
    assert not torch.equal(one[0], result(path, adapter, RAGGED, seed=6)[0])


def test_dropout_of_packed_rows_is_right_on_average() -> None:
    adapter = adapted(llama(), LoRA(rank=2, dropout=0.3))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    adapter.model.train()
    means = [
        torch.stack([result(p, adapter, RAGGED, seed)[0] for seed in range(30)]).mean() for p in (path, plain(adapter))
    ]
    torch.testing.assert_close(means[0], means[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_packed_too(reentrant: bool) -> None:
    adapter = adapted(llama())
    model: Any = adapter.model
    expected = result(plain(adapter), adapter, RAGGED)
    checkpoint_gradients(model, "reentrant" if reentrant else "on")
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused
    model.train()
    assert_same(result(path, adapter, RAGGED), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_too(dtype: torch.dtype) -> None:
    adapter = adapted(llama().to(dtype))
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused


def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_plain_way() -> None:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96}  # of which the compiled code is
    make = made(llama().__class__, llama().config.__class__(**sizes, tie_word_embeddings=True))
    exact = adapted(make().double())
    truth = result(plain(exact), exact, RAGGED)
    adapter = adapted(make().bfloat16())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused

    def apart(found: list[Tensor]) -> float:
        flat = [torch.cat([t.double().flatten() for t in g[1:]]) for g in (found, truth)]
        return float((flat[0] - flat[1]).norm() / flat[1].norm())

    quick, slow = (apart(result(way, adapter, RAGGED)) for way in (path, plain(adapter)))
    assert quick <= 1.2 * slow + 0.01


@pytest.mark.parametrize(("kind", "labels"), [("sequence-classification", 1)])
def test_a_classifier_keeps_padded_rows(kind: str, labels: int) -> None:
    adapter = adapted(bert(), LoRA(rank=2, modules_to_save=["classifier"]))
    path = fastest_path(adapter, kind, pad_id=0)
    assert path.mode == "patched", path.refused
    path.max_tokens = 24
    examples = [Example(e.row, e.input_ids, (e.row % 3,)) for e in RAGGED]
    adapter.model.eval()
    assert_same(result(path, adapter, examples), result(plain(adapter, kind), adapter, examples))


def test_afterwards_the_model_is_as_it_was() -> None:
    adapter = adapted(llama())
    model: Any = adapter.model.train()
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    with contextlib.suppress(RuntimeError), path.activated():
        assert any("forward" in m.__dict__ for m in model.modules())
        raise RuntimeError
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_norm_of_another_kind_keeps_its_own_forward() -> None:
    class WrongRMSNorm(type(llama().model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    model = llama()
    model.model.norm.__class__ = WrongRMSNorm
    path = fastest_path(adapted(model), "causal-lm", pad_id=0)
    assert path.mode == "packed", path.refused
    assert model.model.norm not in [module for module, _ in path.quicker]


def test_an_attention_that_is_not_what_its_name_says_is_refused() -> None:
    class LlamaAttention(type(llama().model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            out, weights = super().forward(*inputs, **named)
            return out * 2, weights

    model = llama()
    model.model.layers[0].self_attn.__class__ = LlamaAttention
    path = fastest_path(adapted(model), "causal-lm", pad_id=0)
    assert path.mode != "packed"
    assert "differs" in path.refused["packed"]


def test_a_forward_that_somebody_replaced_is_left_alone() -> None:
    model, calls = llama(), []
    mlp: nn.Module = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: (calls.append(1), own(x))[1]  # type: ignore[assignment,method-assign]
    adapter = adapted(model)
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert mlp not in [module for module, _ in path.quicker]
    calls.clear()
    result(path, adapter, RAGGED)
    assert calls


@pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning")
@pytest.mark.parametrize("name", ["bert", "xlnet"])
def test_a_language_model_that_sees_what_it_shall_predict_is_refused(name: str) -> None:
    seen: dict[str, Callable[[], Any]] = {
        "bert": made(BertLMHeadModel, BertConfig(**SIZES, is_decoder=False)),
        "xlnet": made(XLNetLMHeadModel, XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=48, vocab_size=50)),
    }
    with pytest.raises(ModelError) as error:
        fastest_path(adapted(seen[name]()), "causal-lm", pad_id=0)
    assert (error.value.code, error.value.field) == ("not_causal", "model")


def test_a_decoder_of_an_encoder_family_is_a_language_model() -> None:
    decoder = made(BertLMHeadModel, BertConfig(**SIZES, is_decoder=True))()
    fastest_path(adapted(decoder), "causal-lm", pad_id=0)


def test_a_step_that_fails_is_one_error_that_names_the_class() -> None:
    class Broken(type(llama())):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            raise ValueError("no such step")

    model = llama()
    model.__class__ = Broken
    with pytest.raises(ModelError) as error:
        fastest_path(adapted(model), "causal-lm", pad_id=0)
    assert (error.value.code, error.value.field) == ("model_cannot_train", "model")
    for part in ("Broken", "LoRA", "no such step"):
        assert part in str(error.value)


def test_a_model_that_lets_no_gradient_through_is_refused() -> None:
    class Cut(type(llama())):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            with torch.no_grad():
                return super().forward(*inputs, **named)

    model = llama()
    model.__class__ = Cut
    with pytest.raises(ModelError) as error:
        fastest_path(adapted(model), "causal-lm", pad_id=0)
    assert error.value.code == "no_gradient"


def test_memory_that_runs_out_is_not_blamed_on_the_model() -> None:
    class Hungry(type(llama())):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            raise RuntimeError("can't allocate memory")

    model = llama()
    model.__class__ = Hungry
    with pytest.raises(RuntimeError, match="allocate"):
        fastest_path(adapted(model), "causal-lm", pad_id=0)


def test_a_model_for_fp32_alone_says_so() -> None:
    class Exact(type(llama())):  # type: ignore[misc]
        def forward(self, *inputs: Any, **named: Any) -> Any:
            if self.dtype != torch.float32:
                raise RuntimeError("expected scalar type Float")
            return super().forward(*inputs, **named)

    model = llama().bfloat16()
    model.__class__ = Exact
    with pytest.raises(ModelError) as error:
        fastest_path(adapted(model), "causal-lm", pad_id=0)
    assert error.value.code == "model_cannot_train"
    assert "--precision fp32" in str(error.value)


def test_a_vision_model_is_tried_before_it_is_trained() -> None:
    model = made(
        ViTForImageClassification,
        ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
            num_labels=3,
        ),
    )()
    adapter = attach(model, LoRA(rank=2))
    fits, other = Pictures(size=28), Pictures(size=28, mean=(0.5,), std=(0.5,))
    assert fastest_path(adapter, "image-classification", pad_id=0, pictures=fits).mode == "plain"
    with pytest.raises(ModelError) as error:
        fastest_path(adapter, "image-classification", pad_id=0, pictures=other)
    assert error.value.code == "model_cannot_train"


@pytest.fixture
def two_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_path, "lane_count", lambda: 2)
    monkeypatch.setattr(forward_path, "MIN_LANE_TOKENS", 1)
    monkeypatch.setattr(forward_path, "MIN_BALANCE", 0.0)
    monkeypatch.setattr(forward_path, "MAX_TRAINED_SHARE", 1.0)


@pytest.mark.parametrize("name", MODELS)
def test_lanes_give_the_loss_and_gradients_of_one(name: str, two_lanes: None) -> None:
    adapter = adapted(MODELS[name]())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    assert path.lanes == 2
    assert len(path._lanes(RAGGED)) == 2
    adapter.model.train()
    found = result(path, adapter, RAGGED)
    assert_same(found, result(plain(adapter), adapter, RAGGED))
    for one, other in zip(found, result(path, adapter, RAGGED), strict=True):
        assert torch.equal(one, other)


def test_lanes_call_the_hooks_of_gradients(two_lanes: None) -> None:
    adapter = adapted(llama())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    seen: list[int] = []
    for number, parameter in enumerate(adapter.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p, number=number: seen.append(number))
    result(path, adapter, RAGGED)
    assert sorted(seen) == list(range(len(adapter.parameters())))


def test_lanes_leave_what_has_no_gradient_without_one(two_lanes: None) -> None:
    adapter = adapted(llama())
    path = fastest_path(adapter, "causal-lm", pad_id=0)
    path.model.spare = torch.nn.Parameter(torch.ones(2))
    with path.activated():
        path.loss(RAGGED).backward()
    assert path.model.spare.grad is None
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_gradients_of_lanes_are_added_where_there_are_any() -> None:
    one, two = torch.ones(2), torch.full((2,), 3.0)
    found = lane_loss._added([[None, one, one.clone(), None], [two, None, two, None]])
    assert [None if t is None else t.tolist() for t in found] == [[3.0, 3.0], [1.0, 1.0], [4.0, 4.0], None]


def test_a_prompt_is_worked_out_in_one_lane(two_lanes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_loss, "side_by_side", lambda work, items: [work(item) for item in items])
    assert fastest_path(adapted(llama(), Prompt(tokens=2)), "causal-lm", pad_id=0).lanes == 1


def test_random_numbers_are_drawn_in_one_lane(two_lanes: None) -> None:
    adapter = adapted(llama(), LoRA(rank=2, dropout=0.5))
    assert fastest_path(adapter, "causal-lm", pad_id=0).lanes == 1


def test_a_model_that_cannot_be_in_two_places_has_one_lane(two_lanes: None) -> None:
    model = llama()

    def only_once(module: Any, inputs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("in use")

    adapter = adapted(model)
    model.model.norm.register_forward_pre_hook(only_once)
    assert fastest_path(adapter, "causal-lm", pad_id=0).lanes == 1


def test_large_gradients_have_one_lane(two_lanes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_path, "MAX_TRAINED_SHARE", 0.9)
    for method, lanes in ((LoRA(rank=1), 2), (FullFineTune(), 1)):
        assert fastest_path(adapted(llama(), method), "causal-lm", pad_id=0).lanes == lanes


def test_unequal_or_few_rows_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ForwardPath(llama(), "causal-lm", pad_id=0, mode="packed", lanes=2)
    assert len(path._lanes(rows([280, 260], [9, 9]))) == 2
    assert len(path._lanes(rows([560, 20], [9, 9]))) == 1
    assert len(path._lanes(rows([240, 240], [9, 9]))) == 1
    assert len(path._lanes(rows([600], [9]))) == 1
    with torch.no_grad():
        assert len(path._lanes(rows([280, 260], [9, 9]))) == 1


def test_trial_passes_are_made_in_one_thread_and_one_pass_each_where_nothing_is_drawn() -> None:
    adapter = adapted(llama())
    seen: list[int] = []
    adapter.model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    with threads(2):
        path = fastest_path(adapter, "causal-lm", pad_id=0)
        assert torch.get_num_threads() == 2
    assert not path.draws
    assert seen == [1] * 4  # plain, two for what a token sees, packed
