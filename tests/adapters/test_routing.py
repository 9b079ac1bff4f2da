"""Rows of a batch through adapters of a program's own choice."""

from typing import Any

import pytest
import torch
from adapters.test_several import METHODS, filled
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import bert, fill, llama
from torch import Tensor

import loralab
from loralab import LoRA, attach
from loralab.errors import AdapterStateError, ConfigError

ROUTED = [name for name in METHODS if name not in ("prefix", "prompt")]
ROWS = torch.randint(3, 50, (6, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows).logits


@pytest.fixture(scope="module")
def model() -> Any:
    found = llama()
    for name in METHODS:
        filled(found, name)
    return found


@pytest.fixture(scope="module")
def solo() -> dict[str | None, Tensor]:
    found: dict[str | None, Tensor] = {None: logits(llama(), ROWS)}
    for name in ROUTED:
        own = llama()
        filled(own, name)
        found[name] = logits(own, ROWS)
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([None, *ROUTED]), min_size=6, max_size=6))
def test_every_row_is_as_alone_in_any_order(
    model: Any, solo: dict[str | None, Tensor], names: list[str | None]
) -> None:
    before = logits(model, ROWS)
    with loralab.routed(model, names):
        found = logits(model, ROWS)
    for row, name in enumerate(names):
        assert torch.allclose(found[row], solo[name][row], atol=2e-5), name
    assert torch.equal(logits(model, ROWS), before)


def test_text_is_generated_as_alone(model: Any) -> None:
    names = ["narrow", None, "wide", "narrow"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with loralab.routed(model, names):
        found = model.generate(ROWS[:4], **options)
    for row, name in enumerate(names):
        own = llama()
        if name is not None:
            filled(own, name)
        assert torch.equal(found[row], own.generate(ROWS[row : row + 1], **options)[0])


def test_classifiers_with_heads_of_their_own() -> None:
    model = bert()
    alone = {}
    for number, name in enumerate(("one", "two")):
        for own in (model, bert()):
            torch.manual_seed(number)
            fill(attach(own, LoRA(rank=2, modules_to_save=["classifier"]), name=name))
            if own is not model:
                alone[name] = logits(own, ROWS)
    with loralab.routed(model, ["one", "two", "one", "two", "two", "one"]):
        found = logits(model, ROWS)
    for row, name in enumerate(["one", "two", "one", "two", "two", "one"]):
        assert torch.allclose(found[row], alone[name][row], atol=2e-5)


def test_only_the_acting_one_learns_from_a_routed_batch() -> None:
    model = llama()
    one, two = filled(model, "narrow"), filled(model, "wide")
    with loralab.routed(model, ["narrow", "wide", "narrow", None, "wide", "wide"]):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
    assert all(p.grad is None for p in one.parameters())
    assert any(p.grad.any() for p in two.parameters())


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ([], "invalid_names"),
        ("narrow", "invalid_names"),
        (["narow"] * 6, "unknown_adapter"),
        (["prefix"] * 6, "cannot_route"),
        ([3] * 6, "unknown_adapter"),
    ],
)
def test_names_that_cannot_be_routed(model: Any, names: Any, code: str) -> None:
    with pytest.raises((AdapterStateError, ConfigError)) as error, loralab.routed(model, names):
        pass
    assert error.value.code == code


@pytest.mark.parametrize("count", [1, 2, 5, 9, 54])
def test_another_number_of_rows_is_refused(model: Any, count: int) -> None:
    before = logits(model, ROWS)
    with pytest.raises(AdapterStateError) as error, loralab.routed(model, ["narrow"] * count):
        logits(model, ROWS)
    assert (error.value.code, error.value.field) == ("rows_differ", "names")
    assert torch.equal(logits(model, ROWS), before)
