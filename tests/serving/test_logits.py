"""Changed logits equal those of transformers' processors, or of a loop over the vocabulary."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving.conftest import World
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from loralab.errors import ConfigError, DataError
from loralab.serving.logits import LogitsProcessor
from loralab.serving.request import Sampling
from loralab.serving.sampling import SamplerState, choose_tokens
from loralab.serving.text_engine import TextEngine

WORDS = 12
IDS = st.lists(st.integers(0, WORDS - 1), max_size=10)


def logits_of(seed: int) -> torch.Tensor:
    return 3 * torch.randn(WORDS, generator=torch.Generator().manual_seed(seed))


def changed(sampling: Sampling, row: torch.Tensor, prompt: list[int], written: list[int], ends: Any = ()) -> Any:
    processor = LogitsProcessor(sampling, prompt, ends)
    for token in written:
        processor.note(token)
    before = row.clone()
    found = processor(row)
    assert torch.equal(row, before)  # log-probabilities are told of these
    return found


@given(IDS, IDS, st.floats(0.1, 3), st.integers(0, 99))
def test_repetition_is_penalised_as_in_transformers(
    prompt: list[int], written: list[int], penalty: float, seed: int
) -> None:
    row, ids = logits_of(seed), torch.tensor([prompt + written]).long()
    reference = RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None].clone())[0] if ids.numel() else row
    found = changed(Sampling(repetition_penalty=penalty), row, prompt, written)
    assert torch.allclose(found, reference)


@given(st.dictionaries(st.integers(0, WORDS - 1), st.floats(-100, 100), min_size=1), st.integers(0, 99))
def test_bias_is_added_as_in_transformers(bias: dict[int, float], seed: int) -> None:
    row = logits_of(seed)
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    reference = processor(torch.zeros(1, 1).long(), row[None].clone())[0]
    assert torch.allclose(changed(Sampling(logit_bias=bias), row, [], []), reference)


@given(IDS, st.integers(1, 6), st.integers(0, 99))
def test_no_end_comes_before_min_tokens_as_in_transformers(written: list[int], least: int, seed: int) -> None:
    row, ends = logits_of(seed), [2, 7]
    processor = MinNewTokensLengthLogitsProcessor(3, least, ends, device="cpu")
    reference = processor(torch.zeros(1, 3 + len(written)).long(), row[None].clone())[0]
    assert torch.equal(changed(Sampling(min_tokens=least), row, [0] * 3, written, ends), reference)


@given(IDS, IDS, st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 99))
def test_presence_and_frequency_count_the_answer_alone(
    prompt: list[int], written: list[int], presence: float, frequency: float, seed: int
) -> None:
    row, counts = logits_of(seed), Counter(written)
    reference = [float(v) - frequency * counts[t] - presence * (t in counts) for t, v in enumerate(row)]
    found = changed(Sampling(presence_penalty=presence, frequency_penalty=frequency), row, prompt, written)
    assert found.tolist() == pytest.approx(reference, abs=1e-5)


def test_the_order_is_bias_then_repetition_then_counts() -> None:
    sampling = Sampling(
        logit_bias={1: 2.0}, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, min_tokens=3
    )
    found = changed(sampling, torch.tensor([1.0, 2.0, -1.0, 5.0]), [2], [1, 1], [3])
    assert found.tolist() == [1.0, (2 + 2) / 2 - 0.5 * 2 - 0.25, -2.0, -float("inf")]


def test_only_the_rows_that_ask_for_it_change() -> None:
    logits = torch.stack([logits_of(seed) for seed in range(6)])
    best = logits.argmax(dim=-1).tolist()
    own = Sampling(temperature=0, logit_bias={0: 100.0})
    draws = [SamplerState(Sampling(temperature=0)) for _ in best]
    draws[4] = SamplerState(own, LogitsProcessor(own))
    assert choose_tokens(logits, draws) == [*best[:4], 0, best[5]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", float("nan")),
        ("min_p", -0.1),
        ("min_tokens", 17),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop_token_ids", (1,) * 1025),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(**{field: value})
    assert error.value.field == field


def test_a_mixed_batch_writes_what_generate_writes(opened: Callable[..., TextEngine], world: World) -> None:
    model, engine = world.solo("lora"), opened()
    prompt, new = [5, 9, 5, 31, 9], 12
    plain = Sampling(max_tokens=new, temperature=0, ignore_eos=True)
    bias = {7: 3.0, 11: -4.0}
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"repetition_penalty": 1.6}, {"repetition_penalty": 1.6}),
        ({"logit_bias": bias}, {"sequence_bias": [[[token], value] for token, value in bias.items()]}),
        ({}, {}),
    ]
    answers = [engine.submit(prompt, adapter="lora", sampling=replace(plain, **own)) for own, _ in asked]
    engine.run_until_idle()
    ids = torch.tensor([prompt])
    found = [answer.result().tokens for answer in answers]
    for (_, options), tokens in zip(asked, found, strict=True):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=10**6,
            pad_token_id=0,
            **options,
        )
        assert tokens == tuple(out[0, len(prompt) :].tolist())
    assert len(set(found)) == 3


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(opened: Callable[..., TextEngine]) -> None:
    engine, prompt = opened(), [5, 9, 5, 31, 9]
    plain = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    whole = engine.generate([prompt], adapters=["lora"], sampling=plain)[0]
    stop = whole.tokens[5]
    first = whole.tokens.index(stop)
    own = engine.generate([prompt], adapters=["lora"], sampling=replace(plain, stop_token_ids=(stop,)))[0]
    assert (own.tokens, own.finished.reason) == (whole.tokens[:first], "stop")
    assert own.finished.completion_tokens == first + 1
    late = replace(plain, stop_token_ids=(stop,), min_tokens=first + 2)
    later = engine.generate([prompt], adapters=["lora"], sampling=late)[0]
    assert later.tokens[:first] == whole.tokens[:first]
    assert len(later.tokens) >= first + 2
    assert stop not in later.tokens


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_tokens_that_the_model_does_not_know_are_refused(field: str, opened: Callable[..., TextEngine]) -> None:
    given: Any = {10**6: 1.0} if field == "logit_bias" else (10**6,)
    with pytest.raises(DataError) as error:
        opened().submit([5], adapter=None, sampling=Sampling(**{field: given}))
    assert error.value.field == field
