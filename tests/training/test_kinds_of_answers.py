"""Kinds beside classes through train(): encoder-decoders, several labels, amounts, scored pairs, rerankers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from loralab.adapters.methods import LoRA
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.merge import merge
from loralab.errors import AdapterFileError, ConfigError, InputError, ModelError
from loralab.models.given import Given
from loralab.models.load import load
from loralab.tasks.formats import Row
from loralab.training.evaluation import evaluate, generate
from loralab.training.request import Request
from loralab.training.run import Run, run_request
from loralab.training.settings import Evaluation, Training

SETTINGS: dict[str, Any] = {"precision": "fp32", "batch_size": 8, "max_length": 32, "max_steps": 3}
Rows = Callable[[str, Sequence[Row]], Path]


@pytest.fixture(scope="module")
def encoder(save_tiny: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    found: Path = save_tiny("bert-answers", BertModel(BertConfig(vocab_size=101, **sizes)), False)
    return found


@pytest.fixture(scope="module")
def encoder_decoder(save_tiny: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "pad_token_id": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=101, decoder_start_token_id=1, eos_token_id=2, **sizes))
    folder: Path = save_tiny("t5-answers", model, False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def write(name: str, given: Sequence[Row]) -> Path:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        return file

    return write


def run_on(model: Path, data: Path, place: Path, **more: Any) -> Run:
    settings = Training(**{**SETTINGS, **more})
    return run_request(Request.of(str(model), str(data), LoRA(rank=4), settings, None), place)


def reloaded_equal(run: Run) -> None:
    base, live = run.base, load_with_base(run.output_dir)
    want = logits_of(base.model, run.sample, base.kind, base.tokenizer)
    assert torch.equal(logits_of(live.base.model, run.sample, live.base.kind, live.base.tokenizer), want)


def test_an_encoder_decoder_is_trained_asked_and_merged(encoder_decoder: Path, rows: Rows, tmp_path: Path) -> None:
    data = rows("sums", [{"prompt": f"{n} good", "completion": f"{n} film"} for n in range(60)])
    run = run_on(encoder_decoder, data, tmp_path / "run")
    assert (run.base.kind, run.scores["validation"].main) == ("seq2seq", "loss")
    reloaded_equal(run)
    asked = Evaluation(generate=True, max_new_tokens=4, limit=3)
    scores = evaluate(data=str(data), adapter=run.output_dir, evaluation=asked)
    assert {"loss", "perplexity", "bleu", "rouge_l", "exact_match"} == set(scores.metrics)
    (found,) = generate("3 good", adapters=[run.output_dir], max_new_tokens=4)
    assert set(found["answers"]) == {"base", str(run.output_dir)}
    config = json.loads((run.output_dir / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert merge(run.output_dir, tmp_path / "merged").passed
    alone = load(str(tmp_path / "merged"))
    prompt = run.sample[0]
    ours = logits_of(run.base.model, [prompt], "seq2seq")
    assert torch.allclose(logits_of(alone.model, [prompt], "seq2seq"), ours, atol=1e-4)


def test_an_encoder_decoder_writes_its_labels_where_it_is_asked_to(
    encoder_decoder: Path, rows: Rows, tmp_path: Path
) -> None:
    data = rows("labels", [{"text": f"{n} film", "label": ["good", "bad"][n % 2]} for n in range(60)])
    run = run_on(encoder_decoder, data, tmp_path / "run", kind="seq2seq")
    assert run.base.kind == "seq2seq" and "accuracy" in run.scores["validation"].metrics
    scores = evaluate(data=str(data), adapter=run.output_dir)
    assert {one.answer for one in scores.predictions} <= {"good", "bad"} and "perplexity" in scores.metrics


def test_several_labels_a_number_pairs_and_passages_are_learnt(encoder: Path, rows: Rows, tmp_path: Path) -> None:
    words = ["good", "bad", "fine"]
    given: list[tuple[str, list[Row], str, str, set[str]]] = [
        (
            "multi-label",
            [{"text": f"{n} film", "labels": words[: n % 4]} for n in range(60)],
            "multi-label",
            "micro_f1",
            {"macro_f1", "exact_match"},
        ),
        (
            "regression",
            [{"text": f"{n} film", "label": n / 7} for n in range(60)],
            "regression",
            "loss",
            {"rmse", "pearson", "spearman"},
        ),
        (
            "scored-pairs",
            [{"text_a": f"{n} good", "text_b": f"{n % 5} film", "score": n % 5} for n in range(60)],
            "sentence-encoder",
            "spearman",
            {"pearson"},
        ),
        (
            "reranker",
            [{"query": f"{n}", "positive": f"{n} good", "negative": [f"{n + 1} bad", "film"]} for n in range(60)],
            "reranker",
            "ndcg",
            {"mrr", "map", "average_precision"},
        ),
    ]
    for kind, own, recorded, main, others in given:
        run = run_on(encoder, rows(kind, own), tmp_path / f"run-{kind}")
        scores = run.scores["validation"]
        assert (run.base.kind, scores.main) == (kind, main)
        assert set(scores.metrics) == {"loss", main, *others}
        record = json.loads((run.output_dir / "loralab.json").read_text())
        assert record["base"]["kind"] == recorded
        reloaded_equal(run)
        again = evaluate(data=str(tmp_path / f"{kind}.jsonl"), adapter=run.output_dir)
        assert set(again.metrics) == set(scores.metrics) and len(scores.row_losses) == scores.rows


DIVIDED: list[tuple[str, Callable[[int], Row]]] = [
    ("scored-pairs", lambda n: {"text_a": f"{n} good", "text_b": f"{n} film", "score": n % 5}),
    ("reranker", lambda n: {"query": f"{n} good", "passage": f"{n} film", "label": n % 5}),
]


@pytest.mark.parametrize(("kind", "row"), DIVIDED)
def test_scores_of_other_data_are_divided_as_in_the_training(
    kind: str, row: Callable[[int], Row], encoder: Path, rows: Rows, tmp_path: Path
) -> None:
    run = run_on(encoder, rows("learnt", [row(n) for n in range(60)]), tmp_path / "run")
    low = rows("low", [row(n) for n in range(60) if n % 5 < 2])
    one, high = rows("one", [row(1), row(6)]), rows("high", [row(1), row(6), row(9)])
    everything = Evaluation(split="all")
    alone, beside = (evaluate(data=str(data), adapter=run.output_dir, evaluation=everything) for data in (one, high))
    assert list(alone.row_losses) == pytest.approx(beside.row_losses[:2], rel=1e-5)
    assert alone.notes != beside.notes  # each names its own largest score
    file = run.output_dir / "loralab.json"
    record = json.loads(file.read_text())
    assert record["task"]["scale"] == 4.0
    scaled = evaluate(data=str(low), adapter=run.output_dir).metrics["loss"]
    del record["task"]["scale"]
    file.write_text(json.dumps(record))
    assert evaluate(data=str(low), adapter=run.output_dir).metrics["loss"] != pytest.approx(scaled, rel=1e-3)


def test_rows_of_another_kind_than_the_adapters_are_refused_by_name(encoder: Path, rows: Rows, tmp_path: Path) -> None:
    ranked = rows("ranked", [{"query": f"{n} good", "passage": "film", "label": n % 2} for n in range(60)])
    scored = rows("scored", [{"text_a": f"{n}", "text_b": "film", "score": n / 3} for n in range(30)])
    classed = rows("classed", [{"text": f"{n} film", "label": ["good", "bad"][n % 2]} for n in range(30)])
    amounts = run_on(encoder, scored, tmp_path / "amounts", kind="regression")
    for adapter, data in ((run_on(encoder, ranked, tmp_path / "ranking"), scored), (amounts, classed)):
        with pytest.raises(AdapterFileError) as error:
            evaluate(data=str(data), adapter=adapter.output_dir)
        assert (error.value.code, error.value.field) == ("other_kind", "adapter")


def test_a_merged_model_says_what_its_outputs_are(encoder: Path, rows: Rows, tmp_path: Path) -> None:
    data = rows("multi", [{"text": f"{n} film", "labels": ["good", "bad"][: n % 3]} for n in range(60)])
    run = run_on(encoder, data, tmp_path / "run")
    assert merge(run.output_dir, tmp_path / "merged").passed
    found = load(str(tmp_path / "merged"))
    assert found.kind == "multi-label" and found.model.config.problem_type == "multi_label_classification"
    plain = Evaluation(precision="fp32")
    again = evaluate(data=str(data), model=str(tmp_path / "merged"), evaluation=plain)
    ours = evaluate(data=str(data), adapter=run.output_dir)
    assert again.metrics == pytest.approx(ours.metrics, abs=1e-5)


WRONG = [
    ([{"text": f"{n}", "label": n % 2} for n in range(30)], "regression", "format_unsuited", "kind"),
    ([{"text": f"{n}", "label": n % 2} for n in range(30)], "regresion", "unknown_kind", "kind"),
    ([{"text_a": f"{n}", "text_b": "a", "score": n / 3} for n in range(30)], "causal-lm", "format_unsuited", "kind"),
    ([{"query": f"{n}", "passage": "a", "label": -1 if n else 1} for n in range(30)], None, "out_of_range", "label"),
]


@pytest.mark.parametrize(("given", "kind", "code", "field"), WRONG)
def test_a_kind_that_rows_do_not_teach_is_refused(
    given: list[Row], kind: str | None, code: str, field: str, encoder: Path, rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        run_on(encoder, rows("wrong", given), tmp_path / "run", kind=kind)
    assert (error.value.code, error.value.field) == (code, field)
    assert not (tmp_path / "run").exists()


def test_what_an_encoder_decoder_does_not_read_or_write_is_refused(
    encoder_decoder: Path, rows: Rows, tmp_path: Path
) -> None:
    data = rows("sums", [{"prompt": f"{n} good", "completion": f"{n} film"} for n in range(30)])
    with pytest.raises(ConfigError) as error:
        run_on(encoder_decoder, data, tmp_path / "run", loss_on="all")
    assert (error.value.code, error.value.field) == ("no_effect", "loss_on")
    reply = {"role": "assistant", "content": "b"}
    chats = rows("chats", [{"messages": [{"role": "user", "content": f"{n}"}, reply]} for n in range(30)])
    with pytest.raises(ModelError) as refused:
        run_on(encoder_decoder, chats, tmp_path / "run")
    assert refused.value.code == "seq2seq_unsupported"


def test_a_live_model_learns_what_its_rows_are() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = BertModel(BertConfig(vocab_size=101, **sizes), add_pooling_layer=False)
    one = BertForSequenceClassification(BertConfig(vocab_size=101, num_labels=1, **sizes))
    several = BertForSequenceClassification(BertConfig(vocab_size=101, num_labels=3, **sizes))
    for model, form, kind in (
        (encoder, "pair", ""),
        (encoder, "pair-score", "scored-pairs"),
        (one, "text-score", ""),
        (one, "query-passage", "reranker"),
        (several, "text-label", ""),
        (several, "text-labels", "multi-label"),
    ):
        assert Given(model, None).kind_for(form) == kind
