"""The fingerprint is of the base alone."""

import torch
from tiny import Make, bert, fill, llama

from loralab.adapters.attach import attach
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.methods import LoRA


def test_an_adapter_does_not_count_merged_or_not(make: Make) -> None:
    model = make()
    expected = fingerprint(model)
    adapter = fill(attach(model, LoRA()))
    assert fingerprint(model) == expected
    adapter.merge()
    assert fingerprint(model) == expected


def test_another_model_has_another() -> None:
    model = llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1
    assert fingerprint(model) != before
    assert fingerprint(bert()) != before


def test_a_head_that_is_trained_in_full_does_not_count() -> None:
    one, other = bert(), bert()
    torch.nn.init.normal_(other.classifier.weight)
    head = frozenset({"classifier"})
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, head) == fingerprint(other, head)
    attach(one, LoRA(modules_to_save=["classifier"]))
    assert fingerprint(one) == fingerprint(other, head)
