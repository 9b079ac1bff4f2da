"""Rows with pictures from training to a merged model: equal to transformers and peft on the same inputs."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from multimodal import FAMILIES, picture, saved
from tiny import fill
from torch.nn import functional as F

import loralab
from loralab.errors import ConfigError, DataError, LoralabError
from loralab.models.processors import tokenizer_of
from loralab.tasks.encode import encode
from loralab.tasks.examples import IGNORED
from loralab.tasks.forward import answer_loss
from loralab.tasks.kinds.image_text import WITH_PICTURES
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.placed import MARK
from loralab.training.fast.forward_path import fastest_path
from loralab.training.plan import plan
from loralab.training.settings import Evaluation, Training

KIND = "image-text-to-text"
COLORS = ("red", "blue", "green")
every_family = pytest.mark.parametrize("name", FAMILIES)
pytestmark = [
    pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
SETTINGS: dict[str, Any] = {"precision": "fp32", "batch_size": 2, "max_steps": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows with a picture, with two, and without."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, color in enumerate(COLORS):
        picture(color, (40 + 8 * number, 30)).save(folder / f"{color}.png")
    found: list[dict[str, Any]] = [
        {"prompt": f"What colour {n}?", "completion": f"{color} {n}", "image": f"{color}.png"}
        for n in range(3)
        for color in COLORS
    ]
    found += [{"prompt": f"Which {n}?", "completion": "both", "images": ["red.png", "blue.png"]} for n in range(2)]
    found += [{"prompt": f"How many legs {n}?", "completion": f"four {n}"} for n in range(4)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: saved(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def peft_name(key: str) -> str:
    for side in ("A", "B"):
        key = key.replace(f".lora_{side}", f".lora_{side}.default.weight")
    return f"base_model.model.{key}"


def plain_loss(model: Any, processor: Any, row: dict[str, Any], labels: tuple[float, ...]) -> torch.Tensor:
    """Return the loss of a row through the processor's own template and call."""
    shown = [one.open().convert("RGB") for one in row.get("images", ())]
    parts = [{"type": "image"}] * len(shown) + [{"type": "text", "text": row["prompt"].lstrip(MARK)}]
    chat = [{"role": "user", "content": parts}]
    chat += [{"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}]
    options = {"images": [shown]} if shown else {}
    options |= {"add_special_tokens": False, "return_mm_token_type_ids": True, "return_tensors": "pt"}
    made = processor(text=[processor.apply_chat_template(chat)], **options)
    targets = torch.full_like(made["input_ids"][0], IGNORED)
    targets[: len(labels)] = torch.tensor(labels)
    logits = model(**made, use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits, targets[1:], ignore_index=IGNORED, reduction="sum")


@every_family
def test_loss_and_gradients_are_those_of_transformers_and_peft(name: str, rows: Path) -> None:
    theirs, processor = FAMILIES[name]()
    words = tokenizer_of(processor)
    task = loralab.read(str(rows))
    examples = encode(task, "train", words, kind=KIND, max_length=512).examples
    assert len({bool(example.image) for example in examples}) == 2  # with pictures and without
    adapter = fill(loralab.attach(FAMILIES[name]()[0], loralab.LoRA(rank=4, target_modules=["all-linear", "towers"])))
    reference = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(adapter.modules)))
    state = reference.state_dict()
    with torch.no_grad():
        for key, own in adapter.named_parameters().items():
            state[peft_name(key)].copy_(own)
    path = fastest_path(adapter, KIND, pad_id=words.pad_token_id, pictures=words, examples=examples)
    with path.activated():
        loss = path.loss(examples)
        loss.backward()
    reference.train()
    splits = task.splits["train"]
    total = sum(plain_loss(reference, processor, splits[one.row], one.labels) for one in examples)
    assert isinstance(total, torch.Tensor)
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    found = dict(reference.named_parameters())
    for key, own in adapter.named_parameters().items():
        other = found[peft_name(key)].grad
        if other is None:  # a layer of the tower that the model does not use
            assert own.grad is None or not own.grad.any()
        else:
            torch.testing.assert_close(own.grad, other, rtol=1e-4, atol=1e-5)
    assert sum(found[peft_name(key)].grad is not None for key in adapter.named_parameters()) > len(adapter.modules)


@every_family
def test_a_run_is_certified_merged_and_answers(name: str, rows: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    base = str(folders[name])
    run = loralab.train(model=base, data=str(rows), output_dir=tmp_path / "run", training=Training(**SETTINGS))
    assert run.certificate is not None and run.certificate.passed
    assert sum(sample[0] >= WITH_PICTURES for sample in run.sample) == sum(
        "images" in r for r in run.task.splits["validation"][:8]
    )
    assert loralab.verify(tmp_path / "run").passed
    merged = loralab.merge(tmp_path / "run", tmp_path / "merged")
    assert merged.passed and merged.prompts == len(run.sample)  # the rows' own, with their pictures
    scoring = Evaluation(split="all", generate=True, max_new_tokens=4, precision="fp32")
    asked: dict[str, Any] = {"data": str(rows), "evaluation": scoring}
    apart = loralab.evaluate(**asked, adapter=tmp_path / "run")
    whole = loralab.evaluate(**asked, model=str(tmp_path / "merged"))
    assert whole.metrics["loss"] == pytest.approx(apart.metrics["loss"], rel=1e-5)
    assert [p.answer for p in whole.predictions] == [p.answer for p in apart.predictions]
    assert any(p.prompt.startswith("<image>") for p in apart.predictions)
    images = [rows.parent / "red.png"]
    said: dict[str, Any] = {"max_new_tokens": 6, "images": images, "precision": "fp32"}
    [one] = loralab.generate("What?", adapters=[tmp_path / "run"], with_base=False, **said)
    [two] = loralab.generate("What?", model=str(tmp_path / "merged"), **said)
    assert list(one["answers"].values()) == list(two["answers"].values())


@every_family
def test_answers_are_those_of_the_models_own_generate(name: str, rows: Path, folders: dict[str, Path]) -> None:
    model, processor = FAMILIES[name]()
    image = rows.parent / "blue.png"
    [ours] = loralab.generate("What colour?", model=str(folders[name]), images=[image], max_new_tokens=8)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    made = processor(text=[text], images=[[picture("blue", (48, 30))]], add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**made, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, made["input_ids"].shape[1] :]
    stops = [processor.tokenizer.eos_token_id]
    end = next((place for place, token in enumerate(ids.tolist()) if token in stops), len(ids))
    theirs = processor.tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert ours["answers"]["base"] in theirs or theirs in ours["answers"]["base"]
    assert ours["answers"]["base"][:3] == theirs[:3]


def test_a_picture_changes_the_answer(rows: Path, folders: dict[str, Path]) -> None:
    words = tokenizer_of(FAMILIES["llava"]()[1])
    task = loralab.read(str(rows))
    examples = [e for e in encode(task, "train", words, kind=KIND, max_length=512).examples if e.image]
    model = FAMILIES["llava"]()[0]
    other = next(e for e in examples if e.image != examples[0].image and len(e.image) == len(examples[0].image))
    kind = kind_named(KIND)
    options: dict[str, Any] = {"pad_id": 0, "pictures": words, "longest": 0}
    one = kind.collate(examples[:1], **options)
    two = {**one, "pixel_values": kind.collate([other], **options)["pixel_values"]}
    assert answer_loss(model, one, KIND)[0] != answer_loss(model, two, KIND)[0]


def test_it_goes_on_where_it_was_interrupted(rows: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    from loralab.adapters.folder import TENSORS

    given: dict[str, Any] = {"model": str(folders["idefics3"]), "data": str(rows)}
    training = Training(**{**SETTINGS, "max_steps": 4, "save_every": 1})
    loralab.train(**given, output_dir=tmp_path / "whole", training=training)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loralab.train(**given, output_dir=tmp_path / "cut", training=training, listener=stop)
    loralab.train(**given, output_dir=tmp_path / "cut", training=training, resume=True)
    assert (tmp_path / "cut" / TENSORS).read_bytes() == (tmp_path / "whole" / TENSORS).read_bytes()


def test_towers_learn_from_pictures_and_from_nothing_else(rows: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(folders["gemma3"]), "training": Training(**SETTINGS)}
    method = loralab.LoRA(rank=2, target_modules=("all-linear", "towers"))
    run = loralab.train(**given, data=str(rows), method=method, output_dir=tmp_path / "run")
    moved = {path for path, module in run.adapter.modules.items() if module.delta().any()}
    assert any("vision_tower" in path for path in moved)
    texts = [{"prompt": f"How many {n}?", "completion": f"four {n}"} for n in range(9)]
    for target in (("all-linear", "towers"), "towers"):
        method = loralab.LoRA(rank=2, target_modules=target)
        with pytest.raises(ConfigError) as error:
            loralab.train(**given, data=texts, method=method, output_dir=tmp_path / "texts")
        assert (error.value.code, error.value.field) == ("towers_without_pictures", "target_modules")
    assert not (tmp_path / "texts").exists()


@every_family
def test_texts_alone_train_the_language_part(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    texts = [{"prompt": f"How many {n}?", "completion": f"four {n}"} for n in range(9)]
    run = loralab.train(
        model=str(folders[name]), data=texts, output_dir=tmp_path / "run", training=Training(**SETTINGS)
    )
    assert run.base.kind == KIND
    assert run.adapter.left_out
    assert all(sample[0] < WITH_PICTURES for sample in run.sample)
    assert loralab.merge(tmp_path / "run", tmp_path / "merged")


def test_a_live_model_takes_its_processor(rows: Path, tmp_path: Path) -> None:
    model, processor = FAMILIES["idefics3"]()
    run = loralab.train(
        model=model, tokenizer=processor, data=str(rows), output_dir=tmp_path / "run", training=Training(**SETTINGS)
    )
    assert run.certificate is not None and run.certificate.passed
    assert any(sample[0] >= WITH_PICTURES for sample in run.sample)


def test_a_plan_counts_the_tokens_of_pictures(rows: Path, folders: dict[str, Path]) -> None:
    made = plan(model=str(folders["idefics3"]), data=str(rows), training=Training(**SETTINGS))
    assert made.longest_row > 60
    assert any("pictures in" in note for note in made.notes)
    assert made.peak_bytes > 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ([{"text": f"a {n}", "label": "xy"[n % 2]} for n in range(20)], None),
        ([{"text_a": f"a {n}", "text_b": f"b {n}"} for n in range(9)], "kind_unsupported"),
        ([{"tokens": [f"a{n}"], "tags": ["O" if n % 2 else "B"]} for n in range(9)], "kind_unsupported"),
    ],
)
def test_other_rows_are_read_or_refused(
    data: list[dict[str, Any]], code: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": str(folders["llava"]), "data": data, "output_dir": tmp_path / "run"}
    if code is None:
        run = loralab.train(**given, training=Training(**SETTINGS))
        assert "accuracy" in run.scores["validation"].metrics
        return
    with pytest.raises(LoralabError) as error:
        loralab.train(**given, training=Training(**SETTINGS))
    assert (error.value.code, error.value.field) == (code, "model")


def test_a_text_model_takes_no_pictures(rows: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        loralab.train(model=str(tiny_llama_folder), data=str(rows), output_dir=tmp_path / "run")
    assert (error.value.code, error.value.field) == ("pictures_unread", "images")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError) as asked:
        loralab.generate("What?", model=str(tiny_llama_folder), images=[rows.parent / "red.png"])
    assert (asked.value.code, asked.value.field) == ("pictures_unread", "image")
    with pytest.raises(DataError) as strange:
        loralab.generate("What\ufdd0?", model=str(tiny_llama_folder))
    assert strange.value.code == "not_a_character"
