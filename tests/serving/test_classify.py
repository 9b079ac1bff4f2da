"""Classes from the engine are those that evaluate() finds with the adapter alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Saver
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, Dinov2Config, Dinov2Model

from loralab.adapters.methods import LoRA, Method, Prefix
from loralab.errors import AdapterNotFoundError, DataError, ModelError
from loralab.models.load import load
from loralab.serving.encoder_engine import EncoderEngine
from loralab.serving.encoder_requests import EncoderRequests
from loralab.serving.opening import open_engine
from loralab.serving.request import Ranked
from loralab.serving.settings import ServeSettings
from loralab.serving.text_engine import TextEngine
from loralab.training.evaluation import evaluate
from loralab.training.run import train
from loralab.training.settings import Evaluation, Training

WORDS = "film good bad fine poor great awful review".split()  # noqa: SIM905


@dataclass
class Taught:
    """Adapters for two tasks on one base, and the files of the tasks."""

    engine: TextEngine | EncoderEngine
    store: Path
    files: dict[str, Path]

    def classes(self, name: str, inputs: list[Any]) -> list[Ranked]:
        future = self.engine.classify(inputs, adapter=name)
        self.engine.run_until_idle()
        return future.result()


def write_task(file: Path, labels: list[str]) -> Path:
    rows = ["text,label"]
    for n in range(60):
        text = " ".join(WORDS[(n * (j + 3)) % len(WORDS)] for j in range(2 + n % 4))
        rows.append(f"{n} {text},{labels[n % len(labels)]}")
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def taught(model: Path, folder: Path, methods: dict[str, Method]) -> Taught:
    labels = {"two": ["good", "bad"], "three": ["poor", "great review", "b"]}
    files = {name: write_task(folder / f"{name}.csv", own) for name, own in labels.items()}
    store = folder / "store"
    for name, method in methods.items():
        train(
            model=str(model),
            data=str(files[name.split("-")[0]]),
            output_dir=store / name,
            method=method,
            training=Training(max_steps=3, learning_rate=0.05, precision="fp32"),
        )
    settings = ServeSettings(precision="fp32", cache_memory="4MB", max_batch=5)
    engine = open_engine(model=str(model), store=store, settings=settings)
    return Taught(engine=engine, store=store, files=files)


@pytest.fixture(scope="module")
def language(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    methods: dict[str, Method] = {"two": LoRA(rank=2), "three": LoRA(rank=3), "two-prefix": Prefix(tokens=4)}
    made = taught(tiny_llama_folder, tmp_path_factory.mktemp("language"), methods)
    yield made
    made.engine.stop()


@pytest.fixture(scope="module")
def encoder(tiny_bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    methods: dict[str, Method] = {"two": LoRA(rank=2), "three": LoRA(rank=3)}
    made = taught(tiny_bert_folder, tmp_path_factory.mktemp("encoder"), methods)
    yield made
    made.engine.stop()


@pytest.mark.parametrize("side", ["language", "encoder"])
def test_classes_are_those_of_an_evaluation(side: str, request: pytest.FixtureRequest) -> None:
    made: Taught = request.getfixturevalue(side)
    for name in sorted(path.name for path in made.store.iterdir() if path.is_dir()):
        scores = evaluate(
            data=str(made.files[name.split("-")[0]]),
            adapter=made.store / name,
            evaluation=Evaluation(split="train", limit=12, precision="fp32"),
        )
        texts = [own.prompt for own in scores.predictions]
        found = made.classes(name, texts)
        assert [own.label for own in found] == [own.answer for own in scores.predictions]
        for own in found:
            assert sum(own.probabilities.values()) == pytest.approx(1)
            assert next(iter(own.probabilities)) == own.label


def test_several_requests_share_the_batches(encoder: Taught) -> None:
    texts = [f"{n} good film" for n in range(7)]
    alone = {name: encoder.classes(name, texts) for name in ("two", "three")}
    futures = {name: encoder.engine.classify(texts, adapter=name) for name in ("two", "three")}
    encoder.engine.run_until_idle()
    for name, future in futures.items():
        for own, other in zip(future.result(), alone[name], strict=True):
            assert own.label == other.label
            assert own.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_what_was_asked_before_is_answered_alike(language: Taught) -> None:
    texts = ["good " * count for count in range(1, 20)]  # some end where a block of the cache does
    first, second = (language.classes("three", texts) for _ in range(2))
    for own, other in zip(second, first, strict=True):
        assert own.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@pytest.mark.parametrize("side", ["language", "encoder"])
def test_what_nobody_waits_for_is_given_up(side: str, request: pytest.FixtureRequest) -> None:
    made: Taught = request.getfixturevalue(side)
    future = made.engine.classify([f"{n} good film" for n in range(30)], adapter="three")
    made.engine._load_some()
    made.engine.step()
    future.cancel()
    made.engine.step()
    assert made.engine.running == made.engine.waiting == 0
    assert not any(made.engine._users.values())


def test_what_is_wrong_is_said(language: Taught, encoder: Taught) -> None:
    with pytest.raises(DataError) as error:
        language.engine.classify([], adapter="two")
    assert (error.value.code, error.value.field) == ("invalid_value", "input")
    with pytest.raises(DataError) as error:
        language.engine.classify(["a"], adapter=None)
    assert error.value.code == "no_labels"
    with pytest.raises(DataError) as error:
        encoder.engine.classify([b"x"], adapter="two")
    assert (error.value.code, error.value.field) == ("invalid_value", "input")
    with pytest.raises(DataError) as error:
        encoder.engine.classify(["good " * 300], adapter="two")
    assert (error.value.code, error.value.field) == ("context_length_exceeded", "input")
    with pytest.raises(AdapterNotFoundError) as error:
        encoder.engine.classify(["a"], adapter="tow")
    assert (error.value.code, error.value.field) == ("unknown_adapter", "name")
    assert encoder.engine.capabilities(encoder.engine.store.entry("two")) == [
        "classify",
        "embeddings",
        "score",
        "rerank",
    ]
    assert language.engine.capabilities(None) == ["completions", "chat"]


def test_pictures_are_put_into_classes(save_tiny: Saver, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    model = tmp_path / "model"
    Dinov2Model(config).save_pretrained(model)
    for label, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "data" / label).mkdir(parents=True)
        for n in range(8):
            shade = tuple(min(255, c + n) for c in colour)
            Image.new("RGB", (28, 28), shade).save(tmp_path / "data" / label / f"{n}.png")
    store = tmp_path / "store"
    train(
        model=str(model),
        data=str(tmp_path / "data"),
        output_dir=store / "colours",
        method=LoRA(rank=2),
        training=Training(max_steps=20, learning_rate=0.01, precision="fp32"),
    )
    settings = ServeSettings(precision="fp32")
    engine = open_engine(model=str(model), store=store, settings=settings)
    pictures = [picture((200, 3, 3)), picture((3, 3, 200))]
    future = engine.classify(pictures, adapter="colours")
    engine.run_until_idle()
    assert [own.label for own in future.result()] == ["red", "blue"]
    with pytest.raises(DataError) as error:
        engine.classify([b"no picture"], adapter="colours")
    assert (error.value.code, error.value.field) == ("not_a_picture", "image")


def picture(colour: tuple[int, int, int]) -> bytes:
    out = BytesIO()
    Image.new("RGB", (28, 28), colour).save(out, format="PNG")
    return out.getvalue()


def test_a_token_that_the_encoder_has_no_row_for_is_named(save_tiny: Saver) -> None:
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=90,
        id2label={0: "good", 1: "bad"},
        label2id={"good": 0, "bad": 1},
    )
    base = load(str(save_tiny("odd", BertForSequenceClassification(config), False)))
    base.tokenizer.add_tokens(["<odd>"])
    builder = EncoderRequests(base, 64, "")
    assert builder.classification(["good film"], None)
    with pytest.raises(ModelError) as caught:
        builder.classification(["good <odd> film"], None)
    assert caught.value.code == "token_without_row" and "<odd>" in str(caught.value)


def test_labels_that_may_all_hold_have_chances_of_their_own(save_tiny: Saver, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    problem = "multi_label_classification"
    config = BertConfig(**sizes, vocab_size=90, num_labels=3, problem_type=problem, initializer_range=0.3)
    folder = save_tiny("several", BertForSequenceClassification(config), False)
    engine = open_engine(model=str(folder), store=tmp_path, settings=ServeSettings(precision="fp32"))
    future = engine.classify(["good film"], adapter=None)
    engine.run_until_idle()
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**engine.base.tokenizer("good film", return_tensors="pt")).logits[0]
    found = future.result()[0].probabilities
    assert [found[f"LABEL_{n}"] for n in range(3)] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
