"""Losses are those of the libraries that people know, on the same weights and rows."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loralab.tasks.batches import collate
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.forward import answer_loss
from loralab.tasks.kinds.registry import kind_named

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = [(5, 9, 3), (7, 2, 8, 4, 6), (11,)]


def bert(problem: str, labels: int) -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, num_labels=labels, problem_type=problem, **SIZES)
    return BertForSequenceClassification(config).eval().double()


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, decoder_start_token_id=0, **sizes)).eval().double()


def bart() -> Any:
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=30, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, **heads, **ids)
    return BartForConditionalGeneration(config).eval().double()


def batch_of(kind: str, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    return collate(examples, pad_id=0, kind=kind)


def mean_loss(model: nn.Module, kind: str, examples: Sequence[Example]) -> float:
    """The mean over all labels, as a training step takes it."""
    total, count = answer_loss(model, batch_of(kind, examples), kind)
    assert count == sum(kind_named(kind).count(example) for example in examples)
    return float(total.detach()) / count


@pytest.mark.parametrize("make", [t5, bart])
def test_the_loss_of_an_encoder_decoder_is_transformers_own(make: Any) -> None:
    model = make()
    targets = [(4, 5, 1), (6, 1), (8, 8, 9, 10, 1)]
    examples = [Example(n, ids, own, second=own) for n, (ids, own) in enumerate(zip(TEXTS, targets, strict=True))]
    batch = batch_of("seq2seq", examples)
    assert batch["labels"][1].tolist() == [6, 1, IGNORED, IGNORED, IGNORED]
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert mean_loss(model, "seq2seq", examples) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_several_labels_is_transformers_own() -> None:
    model, hot = bert("multi_label_classification", 3), [(1, 0, 1), (0, 0, 0), (1, 1, 1)]
    examples = [Example(n, ids, own) for n, (ids, own) in enumerate(zip(TEXTS, hot, strict=True))]
    batch = {name: t.double() if name == "labels" else t for name, t in batch_of("multi-label", examples).items()}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert mean_loss(model, "multi-label", examples) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_number_is_transformers_own() -> None:
    model = bert("regression", 1)
    examples = [Example(n, ids, (own,)) for n, (ids, own) in enumerate(zip(TEXTS, (0.25, -3.5, 4.0), strict=True))]
    batch = {name: t.double() if name == "labels" else t for name, t in batch_of("regression", examples).items()}
    with torch.no_grad():
        expected = float(model(**batch).loss)
    assert mean_loss(model, "regression", examples) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_scored_pairs_is_the_squared_difference_of_the_cosine_of_mean_vectors() -> None:
    torch.manual_seed(0)
    model: Any = BertModel(BertConfig(vocab_size=30, **SIZES), add_pooling_layer=False).eval().double()
    scores = (0.2, 0.9, -0.5)
    others = [(3, 4), (7, 2, 8, 4), (12, 13, 14)]
    examples = [
        Example(n, ids, (own,), second=other)
        for n, (ids, own, other) in enumerate(zip(TEXTS, scores, others, strict=True))
    ]
    with torch.no_grad():
        vectors = [
            [model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in texts] for texts in (TEXTS, others)
        ]
        cosines = torch.stack([F.cosine_similarity(a, b, dim=0) for a, b in zip(*vectors, strict=True)])
        expected = float(F.mse_loss(cosines, torch.tensor(scores, dtype=torch.double)))
    assert mean_loss(model, "scored-pairs", examples) == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_a_reranker_is_the_cross_entropy_of_one_logit() -> None:
    model = bert("regression", 1)
    examples = [Example(n, ids, (own,)) for n, (ids, own) in enumerate(zip(TEXTS, (1.0, 0.0, 0.5), strict=True))]
    batch = batch_of("reranker", examples)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
    expected = float(nn.BCEWithLogitsLoss()(logits, batch["labels"].double()))
    assert mean_loss(model, "reranker", examples) == pytest.approx(expected, rel=1e-6)


def test_what_is_left_of_several_jobs_is_a_jobs_own() -> None:
    kind = kind_named("multi-label")
    examples = [Example(0, (5,), (1, 0)), Example(1, (6,), (0, 1, 1))]
    batch = batch_of("multi-label", examples)
    assert batch["labels"].tolist() == [[1, 0, 0], [0, 1, 1]]
    logits = torch.tensor([[0.3, -0.4, 9.0], [0.1, 0.2, -0.7]])
    alone = kind.summed(logits[:1, :2], torch.tensor([[1.0, 0.0]]))
    assert float(kind.summed(*kind.of_job(logits[:1], batch["labels"][:1], 2))) == pytest.approx(float(alone))
    assert math.isfinite(float(alone))
