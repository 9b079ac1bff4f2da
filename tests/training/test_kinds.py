"""Words, pictures and pairs through train(): it learns, reloads the same, and evaluates."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    ErnieConfig,
    ErnieForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from loralab.adapters.methods import BitFit, Bottleneck, FullFineTune, LinearProbe, LoRA
from loralab.artefacts.certificate import certify
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.merge import merge
from loralab.errors import DataError, InputError, ModelError
from loralab.models.load import load
from loralab.training.evaluation import evaluate
from loralab.training.plan import plan
from loralab.training.request import Request
from loralab.training.run import Run, run_request
from loralab.training.settings import Evaluation, Training

WORDS = ["good", "bad", "fine", "poor", "great", "awful"]
SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "batch_size": 8,
    "max_length": 32,
    "max_steps": 60,
    "learning_rate": 5e-3,
    "evaluation_rows": 50,
}


@pytest.fixture(scope="module")
def encoder(save_tiny: Any) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=101,
        max_position_embeddings=64,
    )
    found: Path = save_tiny("bert-kinds", BertModel(config), False)
    return found


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("vision")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write dark and light pictures in folders of that name."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = numpy.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 150)):
        (folder / name).mkdir()
        for number in range(30):
            noise = draw.integers(low, low + 100, (20, 24), numpy.uint8)
            Image.fromarray(noise).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows in which numbers are names and words are nothing."""
    file = tmp_path_factory.mktemp("tags") / "tags.jsonl"
    rows = []
    for n in range(60):
        words = [str(n % 60), WORDS[n % 6], str((7 * n) % 60), WORDS[(n + 2) % 6]]
        tags = ["B-N", "O", "B-N", "O"]
        rows.append({"tokens": words, "tags": tags})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"text_a": f"{n} good film", "text_b": f"a {n}"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def started(model: Path, data: Path, place: Path, method: Any = None, **more: Any) -> Run:
    settings = Training(**{**SETTINGS, **more})
    request = Request.of(str(model), str(data), method or LoRA(rank=4), settings, None)
    return run_request(request, place)


def reloaded_equal(run: Run) -> None:
    base, live = run.base, load_with_base(run.output_dir)
    want = logits_of(base.model, run.sample, base.kind, base.tokenizer)
    found = logits_of(live.base.model, run.sample, base.kind, live.base.tokenizer)
    assert torch.equal(found, want)


def test_words_are_tagged(encoder: Path, tagged: Path, tmp_path: Path) -> None:
    run = started(encoder, tagged, tmp_path / "run")
    assert run.base.kind == "token-classification"
    assert run.scores["validation"].metrics["entity_f1"] > 0.95
    reloaded_equal(run)
    scores = evaluate(data=str(tagged), adapter=run.output_dir, evaluation=Evaluation(limit=3))
    assert scores.predictions[0].answer.split() == ["B-N", "O", "B-N", "O"]
    certificate = merge(run.output_dir, tmp_path / "merged")
    assert certificate.passed


METHODS = [LoRA(rank=4), LinearProbe(), FullFineTune(), BitFit(), Bottleneck(width=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_pictures_are_classified(method: Any, vision: Path, pictures: Path, tmp_path: Path) -> None:
    run = started(vision, pictures, tmp_path / "run", method)
    assert run.base.kind == "image-classification"
    assert run.scores["validation"].metrics["accuracy"] > 0.9
    reloaded_equal(run)
    if isinstance(method, LoRA):
        certificate = certify(
            run.output_dir, run.base.model, run.sample, kind=run.base.kind, tokenizer=run.base.tokenizer
        )
        assert certificate.max_logit_difference == 0
        assert merge(run.output_dir, tmp_path / "merged").passed


def test_pictures_of_one_class_are_scored_against_all(vision: Path, pictures: Path, tmp_path: Path) -> None:
    run = started(vision, pictures, tmp_path / "run")
    for name, low in (("light", 150), ("grey", 75)):
        (tmp_path / name / name).mkdir(parents=True)
        for number in range(5):
            levels = numpy.full((20, 24), low + 10 * number, numpy.uint8)
            Image.fromarray(levels).save(tmp_path / name / name / f"{number}.png")
    scores = evaluate(data=str(tmp_path / "light"), adapter=run.output_dir)
    assert (scores.rows, scores.split, scores.metrics["accuracy"]) == (5, "all", 1.0)
    with pytest.raises(DataError) as error:
        evaluate(data=str(tmp_path / "grey"), adapter=run.output_dir)
    assert error.value.code == "unknown_labels"


def test_words_of_some_tags_are_scored_against_all(encoder: Path, tagged: Path, tmp_path: Path) -> None:
    run = started(encoder, tagged, tmp_path / "run")
    for name, tag in (("some", "B-N"), ("other", "B-X")):
        row = json.dumps({"tokens": ["7"], "tags": [tag]})
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n")
    scores = evaluate(data=str(tmp_path / "some.jsonl"), adapter=run.output_dir)
    assert (scores.rows, scores.split, scores.metrics["accuracy"]) == (1, "all", 1.0)
    with pytest.raises(DataError) as error:
        evaluate(data=str(tmp_path / "other.jsonl"), adapter=run.output_dir)
    assert (error.value.code, error.value.field) == ("unknown_labels", "tags")


def test_the_size_of_pictures_is_kept(vision: Path, pictures: Path, tmp_path: Path) -> None:
    run = started(vision, pictures, tmp_path / "run", max_steps=3, image_size=42)
    live = load_with_base(run.output_dir)
    assert live.base.tokenizer.size == 42
    with pytest.raises(InputError) as error:
        started(vision, pictures, tmp_path / "other", image_size=30)
    assert (error.value.code, error.value.field) == ("invalid_value", "image_size")


def test_partners_are_found(encoder: Path, paired: Path, tmp_path: Path) -> None:
    run = started(encoder, paired, tmp_path / "run", max_steps=80)
    assert run.base.kind == "sentence-encoder"
    fresh = load(str(encoder), kind="sentence-encoder")
    from loralab.tasks.catalog import find
    from loralab.tasks.score import evaluate as score

    before = score(fresh.model, fresh.tokenizer, find(str(paired)), "validation", kind="sentence-encoder")
    assert run.scores["validation"].metrics["loss"] < before.metrics["loss"]
    reloaded_equal(run)


@pytest.mark.parametrize("data", ["tagged", "pictures", "paired"])
def test_a_plan_for_every_kind(data: str, encoder: Path, vision: Path, request: pytest.FixtureRequest) -> None:
    model = vision if data == "pictures" else encoder
    made = plan(
        model=str(model), data=str(request.getfixturevalue(data)), method=LoRA(rank=2), training=Training(**SETTINGS)
    )
    assert made.peak_bytes > 0
    assert made.seconds > 0
    assert made.tokens_per_step >= SETTINGS["batch_size"] * 0.9


def test_what_a_model_cannot_learn_from_is_refused(
    tiny_llama_folder: Path, encoder: Path, vision: Path, pictures: Path, paired: Path, sums: Path, tmp_path: Path
) -> None:
    for model, data in (
        (tiny_llama_folder, pictures),
        (encoder, pictures),
        (vision, sums),
        (tiny_llama_folder, paired),
    ):
        with pytest.raises(ModelError):
            started(model, data, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def ended_folder(save_tiny: Any, name: str, model: Any) -> Path:
    """Return a model with a tokenizer that ends each text, and pads with another token."""
    folder: Path = save_tiny(name, model, False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(folder)
    return folder


FAMILIES: dict[str, Any] = {
    "ernie": lambda: ErnieForMaskedLM(
        ErnieConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=101,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    ),
    "xlnet": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=101, d_model=32, n_layer=1, n_head=4, d_inner=48, pad_token_id=0)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=101,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    ),
}
NEW = {
    "ernie": {"classifier", "ernie.pooler"},
    "xlnet": {"logits_proj", "sequence_summary"},
    "t5": {"classification_head"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_new_in_a_classifier_is_trained_and_kept(
    family: str, save_tiny: Any, labelled: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = ended_folder(save_tiny, family, FAMILIES[family]())
    run = started(model, labelled, tmp_path / "run", max_steps=3)
    assert run.base.kind == "sequence-classification"
    assert set(run.adapter.saved) == NEW[family]
    for name, saved in run.adapter.saved.items():
        assert any(
            not torch.equal(a, b) for a, b in zip(saved.trained.parameters(), saved.base.parameters(), strict=True)
        ), name
    reloaded_equal(run)
    evaluated = evaluate(data=str(labelled), adapter=run.output_dir, evaluation=Evaluation(limit=3))
    assert evaluated.rows == 3
