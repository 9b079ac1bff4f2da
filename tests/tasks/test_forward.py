"""The loss of every kind of model, against a computation by hand; what each batch holds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
)

from loralab.errors import ConfigError, DataError, ModelError
from loralab.models.pictures import Pictures
from loralab.tasks import forward
from loralab.tasks.batches import collate
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.forward import SHARPNESS, answer_loss, embed, places, require_known, require_places
from loralab.tasks.metrics import entities, entity_f1
from loralab.tasks.pictures import from_levels

BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "num_labels": 3,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_labels": 3,
}
PICTURES = Pictures(size=28)


def seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).double().eval()


def test_tags_are_learnt_on_the_first_piece_of_each_word() -> None:
    model = seeded(BertForTokenClassification, BertConfig(**BERT))
    rows = [Example(0, (1, 5, 6, 7), (IGNORED, 2, IGNORED, 0)), Example(1, (1, 9), (IGNORED, 1))]
    batch = collate(rows, pad_id=0, kind="token-classification")
    loss, count = answer_loss(model, batch, "token-classification")
    assert count == 3
    want = torch.zeros((), dtype=torch.float64)
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0]
        labels = torch.tensor(row.labels)
        want = want + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Dinov2ForImageClassification, Dinov2Config(mlp_ratio=2, **VISION)),
        (ViTForImageClassification, ViTConfig(intermediate_size=24, **VISION)),
    ],
)
def test_pictures_have_one_label_each(kind: Any, config: Any) -> None:
    import numpy

    model = seeded(kind, config)
    levels = [numpy.full((20, 30), 40 * n, dtype=numpy.uint8) for n in range(3)]
    rows = [Example(n, (), (n,), image=from_levels(array, str(n))) for n, array in enumerate(levels)]
    batch = collate(rows, pad_id=0, kind="image-classification", pictures=PICTURES)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    loss, count = answer_loss(model, batch, "image-classification")
    want = F.cross_entropy(model(batch["pixel_values"].double()).logits, torch.arange(3), reduction="sum")
    assert count == 3
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


def test_pairs_are_told_apart_within_the_batch() -> None:
    model = seeded(BertModel, BertConfig(**BERT))
    rows = [Example(0, (1, 5, 6), (0,), second=(1, 7)), Example(1, (1, 9), (1,), second=(1, 8, 3, 4))]
    batch = collate(rows, pad_id=0, kind="sentence-encoder")
    loss, count = answer_loss(model, batch, "sentence-encoder")

    def vector(ids: tuple[int, ...]) -> torch.Tensor:
        states = model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
        return states / states.norm()

    first = torch.stack([vector(row.input_ids) for row in rows])
    second = torch.stack([vector(row.second) for row in rows])
    want = F.cross_entropy(SHARPNESS * first @ second.T, torch.arange(2), reduction="sum")
    assert count == 2
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embed(model, batch).double(), first, rtol=1e-4, atol=1e-6)


def test_the_two_texts_of_a_classified_pair_are_told_apart() -> None:
    model = seeded(BertForSequenceClassification, BertConfig(**BERT))
    plain = Example(0, (1, 5, 2, 6, 2), (1,))
    typed = Example(0, (1, 5, 2, 6, 2), (1,), token_types=(0, 0, 0, 1, 1))
    losses = [
        answer_loss(model, collate([row], pad_id=0, kind="sequence-classification"), "sequence-classification")[0]
        for row in (plain, typed)
    ]
    logits = model(torch.tensor([typed.input_ids]), token_type_ids=torch.tensor([typed.token_types])).logits
    want = F.cross_entropy(logits, torch.tensor([1]))
    torch.testing.assert_close(losses[1].double(), want, rtol=1e-5, atol=1e-6)
    assert losses[0] != losses[1]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        collate([Example(0, (1,), (1,))], pad_id=0, kind="image-segmentation")
    assert (error.value.code, error.value.field) == ("unknown_kind", "kind")


def test_entities_by_hand() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]
    assert entities(tags) == {("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("PER", 5, 6)}
    right, cut, other = [["B-A", "I-A", "O"]], [["B-A", "O", "O"]], [["B-B", "I-B", "O"]]
    assert entity_f1(right, right) == 1.0
    assert entity_f1(right, cut) == entity_f1(right, other) == 0.0
    assert entity_f1([["B-A", "O", "B-B"]], [["B-A", "O", "O"]]) == pytest.approx(2 / 3)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), most=st.integers(1, 8))
def test_groups_to_be_scored_hold_everything_once_and_few_tokens(lengths: list[int], most: int) -> None:
    groups = forward._groups(lengths, most, 100)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= most
        assert len(group) * max(lengths[i] for i in group) <= 100 or len(group) == 1
        assert [lengths[i] for i in group] == sorted(lengths[i] for i in group)


LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "config", "alone"),
    [
        (LlamaForCausalLM, LlamaConfig(**LLAMA), True),
        (Gemma2ForCausalLM, Gemma2Config(**LLAMA, final_logit_softcapping=3.0), False),
        (GraniteForCausalLM, GraniteConfig(**LLAMA, logits_scaling=2.0), False),
    ],
)
def test_logits_in_chunks_are_the_logits(kind: Any, config: Any, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "CHUNK", 3)
    model = seeded(kind, config)
    rows = [(5, 6, 7, 8, 9, 3), (4, 3, 2), (9, 9)]
    labels = [(IGNORED, 6, 7, 8, 9, 3), (IGNORED, IGNORED, 2), (IGNORED, IGNORED)]
    batch = collate([Example(0, *pair) for pair in zip(rows, labels, strict=True)], pad_id=0, kind="causal-lm")
    head = forward.lone_head(model, batch)
    assert (head is not None) == alone
    with torch.no_grad():
        expected, targets, places = forward.labelled(model, batch)
        losses, found, logits = forward.answers(model, batch, head)
    assert found.tolist() == places.tolist() == [0, 0, 0, 0, 0, 1]
    exact = F.cross_entropy(expected.float(), targets, reduction="none")
    torch.testing.assert_close(losses, exact)
    some = torch.tensor([0, 5])
    torch.testing.assert_close(logits(some), expected[some])


def test_rows_without_a_label_have_no_loss() -> None:
    model = seeded(LlamaForCausalLM, LlamaConfig(**LLAMA))
    rows = [Example(0, (5, 6), (IGNORED, IGNORED))]
    batch = collate(rows, pad_id=0, kind="causal-lm")
    for head in (None, forward.lone_head(model, batch)):
        losses, found, _ = forward.answers(model, batch, head)
        assert losses.shape == found.shape == (0,)


# what a model can take


class Numbers:
    """A tokenizer of numbers."""

    def convert_ids_to_tokens(self, number: int) -> str:
        return f"[{number}]"


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_tokens_without_a_row_are_named_with_the_rows_that_there_are(kind: str) -> None:
    model: Any = (
        seeded(LlamaForCausalLM, LlamaConfig(**LLAMA)) if kind == "causal" else seeded(BertModel, BertConfig(**BERT))
    )
    require_known(model, Numbers(), [(1, 39), (), (0,)])
    with pytest.raises(ModelError) as caught:
        require_known(model, Numbers(), [(1, 40), (57, 40)])
    assert caught.value.code == "token_without_row"
    for part in ("'[40]' (40)", "'[57]' (57)", "39", "resize_token_embeddings(58)"):
        assert part in str(caught.value)


def test_tokens_without_a_row_of_the_head_are_refused_too() -> None:
    model = seeded(LlamaForCausalLM, LlamaConfig(**LLAMA))
    model.set_output_embeddings(torch.nn.Linear(16, 30, bias=False))
    with pytest.raises(ModelError):
        require_known(model, Numbers(), [(30,)])


def test_places_are_as_many_as_the_model_can_read_and_not_more() -> None:
    positions = {"max_position_embeddings": 12, "pad_token_id": 1}
    for config, kind, expected in (
        (RobertaConfig(**BERT | positions), RobertaModel, 10),
        (BertConfig(**BERT | positions), BertModel, 12),
    ):
        model = seeded(kind, config)
        assert places(model) == expected
        fitting = Example(0, (2,) * expected, (0,))
        require_places(model, [fitting])
        model(torch.tensor([fitting.input_ids]))
        with pytest.raises(DataError) as caught:
            require_places(model, [fitting, Example(1, (2,), (0,), second=(2,) * (expected + 1))])
        assert (caught.value.code, caught.value.field) == ("row_beyond_places", "max_length")
        assert f"--max-length {expected}" in str(caught.value)
