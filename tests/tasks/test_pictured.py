"""Pictures as tokens: the ids are the processor's own, and nothing but answers is learnt."""

from typing import Any

import pytest
import torch
from multimodal import FAMILIES, picture

import loralab
from loralab.errors import DataError, ModelError
from loralab.models.processors import tokenizer_of
from loralab.tasks.catalog import Task
from loralab.tasks.encode import asked, encode
from loralab.tasks.examples import IGNORED, Encoded
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.pictured import reads_parts_alone

every_family = pytest.mark.parametrize("name", FAMILIES)
KIND = "image-text-to-text"


def task_of(*rows: dict[str, Any]) -> Task:
    splits = {name: list(rows) for name in ("train", "validation", "test")}
    return loralab.read(splits)


def encoded(tokenizer: Any, *rows: dict[str, Any], max_length: int = 512, **options: Any) -> Encoded:
    return encode(task_of(*rows), "train", tokenizer, kind=KIND, max_length=max_length, **options)


def chat(*turns: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Return messages of a role, a text and some pictures in front of it."""
    pictured = [(r, t, [{"type": "image"}] * n) for r, t, n in turns]
    return [{"role": r, "content": [*images, {"type": "text", "text": t}]} for r, t, images in pictured]


TWO = chat(("user", "What is it?", 1), ("assistant", "a house", 0), ("user", "And these?", 2), ("assistant", "dogs", 0))
PICTURES = [picture("red"), picture("blue", (60, 30)), picture("green", (30, 60))]


@every_family
def test_ids_are_those_of_the_processor(name: str) -> None:
    processor = FAMILIES[name]()[1]
    words = tokenizer_of(processor)
    [example] = encoded(words, {"messages": TWO, "images": PICTURES}).examples
    text = processor.apply_chat_template(TWO)
    ids = processor(text=[text], images=[PICTURES], add_special_tokens=False)["input_ids"][0]
    assert list(example.input_ids) == ids[: len(example.input_ids)]
    assert words.decode(ids[len(example.input_ids) :]).strip() == ""  # a line end that is not learnt


@every_family
def test_what_is_learnt_is_the_answers(name: str) -> None:
    words = tokenizer_of(FAMILIES[name]()[1])
    [example] = encoded(words, {"messages": TWO, "images": PICTURES}).examples
    learnt = words.decode([label for label in example.labels if label != IGNORED], skip_special_tokens=True)
    assert learnt.split() == ["a", "house", "dogs"] or learnt.replace(" ", "") == "ahousedogs"
    pictured = [place for place, kind in enumerate(example.token_types) if kind]
    assert pictured
    assert all(example.labels[place] == IGNORED for place in pictured)
    assert len(example.image) == 3


@every_family
def test_with_loss_on_all_pictures_are_not_learnt(name: str) -> None:
    words = tokenizer_of(FAMILIES[name]()[1])
    [example] = encoded(words, {"prompt": "a", "completion": "b", "image": PICTURES[0]}, loss_on="all").examples
    soft = [i for i, token in enumerate(example.input_ids) if token in words.processor.image_token_ids]
    assert soft and all(example.labels[i] == IGNORED for i in soft)
    assert sum(label != IGNORED for label in example.labels) > 10


@every_family
def test_what_is_asked_is_what_stands_before_the_answer(name: str) -> None:
    words = tokenizer_of(FAMILIES[name]()[1])
    task = task_of({"messages": TWO, "images": PICTURES})
    [example] = encode(task, "train", words, kind=KIND, max_length=512).examples
    found = asked(task, task.splits["train"][0], words)
    assert example.input_ids[: len(found.ids)] == found.ids
    assert example.token_types[: len(found.ids)] == found.types
    assert found.pictures == example.image


@every_family
def test_pictures_that_do_not_fit_leave_the_row_out(name: str) -> None:
    words = tokenizer_of(FAMILIES[name]()[1])
    rows = ({"prompt": "a", "completion": "b", "image": PICTURES[0]}, {"prompt": "a", "completion": "b"})
    [whole, short] = encoded(words, *rows).examples
    last = max(place for place, kind in enumerate(whole.token_types) if kind)
    found = encoded(words, *rows, max_length=max(last, len(short.input_ids)))
    assert found.dropped == (0,)
    assert [example.row for example in found.examples] == [1]


@every_family
def test_a_batch_has_the_inputs_of_the_processor(name: str) -> None:
    _, processor = FAMILIES[name]()
    words = tokenizer_of(processor)
    rows = [
        {"prompt": "What is it?", "completion": "a house", "image": PICTURES[0]},
        {"prompt": "Who?", "completion": "nobody"},
        {"prompt": "And these?", "completion": "dogs", "images": PICTURES[1:]},
    ]
    examples = encoded(words, *rows).examples
    batch = kind_named(KIND).collate(examples, pad_id=words.pad_token_id, pictures=words, longest=0)
    shown = [[one.open() for one in e.image] for e in examples if e.image]
    texts = [processor.image_token * len(own) for own in shown]
    theirs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
    for key in theirs.keys() - {"input_ids", "attention_mask", "token_type_ids"}:
        assert torch.equal(batch[key], theirs[key])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["token_type_ids"].shape


@every_family
def test_a_token_of_pictures_in_a_text_is_refused(name: str) -> None:
    words = tokenizer_of(FAMILIES[name]()[1])
    token = words.convert_ids_to_tokens(words.processor.image_token_ids[0])
    for row in (
        {"prompt": f"what is {token}?", "completion": "b"},
        {"prompt": "a", "completion": f"it is {token}"},
        {"prompt": "a", "completion": f"it is {token}", "image": PICTURES[0]},
    ):
        with pytest.raises(DataError) as error:
            encoded(words, row)
        assert error.value.code in ("picture_token_in_text", "pictures_and_places")
        assert error.value.field == "images"


def test_a_tokenizer_without_its_processor_reads_texts_alone() -> None:
    words = FAMILIES["llava"]()[1].tokenizer
    assert encoded(words, {"prompt": "a", "completion": "b"}).examples
    with pytest.raises(ModelError) as error:
        encoded(words, {"prompt": "a", "completion": "b", "image": PICTURES[0]})
    assert (error.value.code, error.value.field) == ("no_processor", "images")


def test_without_a_chat_template_a_picture_has_no_place() -> None:
    words = tokenizer_of(FAMILIES["llava"]()[1])
    words.chat_template = None
    with pytest.raises(DataError) as error:
        encoded(words, {"prompt": "a", "completion": "b", "image": PICTURES[0]})
    assert error.value.code == "needs_chat_template"


def test_a_template_that_writes_no_pictures_is_refused() -> None:
    words = tokenizer_of(FAMILIES["llava"]()[1])
    words.chat_template = words.chat_template.replace("<image>", "")
    with pytest.raises(DataError) as error:
        encoded(words, {"prompt": "a", "completion": "b", "image": PICTURES[0]})
    assert (error.value.code, error.value.field) == ("pictures_and_places", "images")


@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq"])
def test_other_kinds_read_no_pictures(kind: str) -> None:
    words = FAMILIES["llava"]()[1].tokenizer
    task = task_of({"prompt": "a", "completion": "b", "image": PICTURES[0]})
    with pytest.raises(DataError) as error:
        encode(task, "train", words, kind=kind, max_length=64)
    assert (error.value.code, error.value.field) == ("pictures_unread", "images")


def test_templates_that_need_lists_are_told() -> None:
    assert reads_parts_alone(FAMILIES["idefics3"]()[1].chat_template)
    assert not reads_parts_alone(FAMILIES["gemma3"]()[1].chat_template)
