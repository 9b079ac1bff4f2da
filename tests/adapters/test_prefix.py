"""Prefix and prompt tuning: cached generation, padding, grouped queries, and what they refuse."""

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import fill, gpt2, llama, logits
from torch.func import functional_call, grad, vmap
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from loralab.adapters.attach import attach
from loralab.adapters.load import load
from loralab.adapters.methods import Prefix, Prompt
from loralab.errors import AdapterStateError, ConfigError, TargetError

METHODS = {"prefix": Prefix(tokens=5), "mlp": Prefix(tokens=5, mlp=True, mlp_width=8), "prompt": Prompt(tokens=5)}
every_method = pytest.mark.parametrize("method", METHODS)
decoders = pytest.mark.parametrize("make", [llama, gpt2])
PROMPTS = [[5, 9, 3], [7, 2, 8, 11, 30, 4], [40]]


def filled(make: Any, method: str) -> Any:
    model = make()
    adapter = attach(model, METHODS[method], generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.7, generator=draw)
    return model


def slowly(model: Any, prompt: list[int], steps: int) -> list[int]:
    """Generate greedily without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@decoders
@every_method
def test_generation_with_a_cache_is_generation_without(make: Any, method: str) -> None:
    model = filled(make, method)
    for prompt in PROMPTS:
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=7,
            min_new_tokens=7,
            do_sample=False,
            pad_token_id=0,
        )
        assert found[0, len(prompt) :].tolist() == slowly(model, prompt, 7)


@decoders
@every_method
def test_a_batch_of_unequal_lengths_is_its_rows_alone(make: Any, method: str) -> None:
    model = filled(make, method)
    longest = max(map(len, PROMPTS))
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(together[row, : len(prompt)], alone, rtol=1e-4, atol=1e-5)


@decoders
@every_method
def test_padding_on_the_left_changes_no_answer(make: Any, method: str) -> None:
    model = filled(make, method)
    longest = max(map(len, PROMPTS))
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
    )
    for row, prompt in enumerate(PROMPTS):
        assert found[row, longest:].tolist() == slowly(model, prompt, 5)


@every_method
def test_eager_attention_gives_the_same(method: str) -> None:
    fast, slow = llama(), llama()
    slow.set_attn_implementation("eager")
    for model in (fast, slow):
        fill(attach(model, METHODS[method]))
    torch.testing.assert_close(logits(fast), logits(slow), rtol=1e-4, atol=1e-5)


def test_a_prompt_is_the_same_as_its_tokens_in_front() -> None:
    """Expect of a prompt made of the embeddings of real tokens the answer to those."""
    model = llama()
    tokens, rest = [4, 17, 31, 8, 22], [5, 9, 3]
    with torch.no_grad():
        want = model(torch.tensor([tokens + rest])).logits[0, 5:]
        adapter = attach(model, Prompt(tokens=5))
        adapter.parameters()[0].copy_(model.get_input_embeddings().weight[tokens])
        torch.testing.assert_close(model(torch.tensor([rest])).logits[0], want)


def test_prompt_states_are_made_once_and_again_after_a_change() -> None:
    model = filled(llama, "prompt")
    table = next(iter(model.model.layers)).self_attn.table
    first = logits(model)
    states = table.states
    logits(model)
    assert table.states is states
    with torch.no_grad():
        table.weight.mul_(2)
    assert not torch.equal(logits(model), first)
    assert table.states is not states
    second = logits(model)
    table.weight.data.mul_(2)  # as fused optimisers write: no version is counted up
    assert not torch.equal(logits(model), second)
    model.double()
    assert logits(model).dtype == torch.float64


def test_grouped_queries_have_a_narrower_prefix() -> None:
    adapter = attach(llama(), Prefix(tokens=5))
    assert adapter.num_parameters == 5 * 3 * 2 * 2 * 8  # tokens, layers, k and v, heads, width


@pytest.mark.parametrize(("layers", "width", "tokens", "expected"), [(24, 1024, 5, 245_760), (24, 1024, 10, 491_520)])
def test_parameters_of_the_paper(layers: int, width: int, tokens: int, expected: int) -> None:
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=16, vocab_size=8, intermediate_size=8
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert attach(model, Prefix(tokens=tokens)).num_parameters == expected


def test_models_that_cannot_are_refused() -> None:
    with torch.device("meta"):
        picture = ViTForImageClassification(ViTConfig(num_hidden_layers=1))
    with pytest.raises(TargetError) as error:
        attach(picture, Prefix())
    assert (error.value.code, error.value.field) == ("no_attention_cache", "model")
    with pytest.raises(TargetError) as error:
        attach(picture, Prompt())
    assert (error.value.code, error.value.field) == ("no_embeddings", "model")
    model = llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError) as error:
        attach(model, Prefix())
    assert (error.value.code, error.value.field) == ("attention_implementation", "model")


@every_method
def test_a_copy_of_the_model_has_a_prefix_of_its_own(method: str) -> None:
    model = filled(llama, method)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "table" in n).mul_(2)
    assert torch.equal(logits(twin), before)
    assert not torch.equal(logits(model), before)


@decoders
@every_method
def test_a_call_with_other_values_leaves_the_model_as_it_is(make: Any, method: str) -> None:
    model = filled(make, method)
    before = logits(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    moved = {name: value * torch.rand_like(value) for name, value in trained.items()}
    ids = torch.tensor(PROMPTS[:1])
    found = functional_call(model, moved, (ids,)).logits
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for n, p in model.named_parameters() if n in trained)
    model.load_state_dict(moved, strict=False)
    torch.testing.assert_close(found, model(ids).logits)


@decoders
@every_method
def test_gradients_of_single_examples_add_up(make: Any, method: str) -> None:
    model = filled(make, method)
    model.config._attn_implementation = "eager"  # torch has no batching rule for the other
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.tensor([PROMPTS[0], PROMPTS[1][:3]])

    def loss(values: Any, one: Any) -> Any:
        return functional_call(model, values, (one,), {"use_cache": False}).logits.square().sum()

    single = vmap(grad(loss), in_dims=(None, 0))(trained, ids[:, None])
    model(ids, use_cache=False).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(single[name].sum(0), parameter.grad)


@every_method
def test_a_model_that_has_learnt_a_step_can_be_copied_and_stored(method: str) -> None:
    model = filled(llama, method)
    model(torch.tensor(PROMPTS[:1])).logits.sum().backward()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(logits(twin), logits(model))


def test_positions_that_were_never_learnt_are_refused() -> None:
    model = gpt2()  # 32 positions
    attach(model, Prefix(tokens=16))
    model(torch.ones(1, 16, dtype=torch.long))
    with pytest.raises(AdapterStateError) as error:
        model(torch.ones(1, 17, dtype=torch.long))
    assert (error.value.code, error.value.field) == ("too_many_positions", "max_length")


@pytest.mark.filterwarnings("ignore")
def test_positions_that_count_from_the_padding(tmp_path: Path) -> None:
    """Count from RoBERTa's first position, 2; peft gets there through the cache."""
    config = RobertaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        num_labels=3,
        max_position_embeddings=40,
    )

    def roberta() -> Any:
        torch.manual_seed(0)
        return RobertaForSequenceClassification(config).eval()

    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    theirs = peft.get_peft_model(roberta(), settings).eval()
    torch.nn.init.normal_(theirs.prompt_encoder["default"].embedding.weight)
    theirs.save_pretrained(tmp_path)
    ours, ids = roberta(), torch.arange(3, 21).view(2, 9)
    load(ours, tmp_path)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-6)


@every_method
def test_a_window_hides_the_prefix_from_those_far_away(method: str) -> None:
    def windowed() -> Any:
        config = MistralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
            sliding_window=6,
        )
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()

    model = filled(windowed, method)
    for prompt in PROMPTS:
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
        )
        assert found[0, len(prompt) :].tolist() == slowly(model, prompt, 9)
