"""Training sees the ids that generation sees, learns the answer and its end, and cuts openly."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralab.errors import ConfigError, DataError
from loralab.tasks.catalog import Task
from loralab.tasks.encode import answer_ids, answers, chat_ids, encode, prompts, round_trip, stop_ids
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.formats import Row

TaskOf = Callable[..., Task]
PAIR = {"prompt": "good film ?", "completion": "yes"}
LABELLED = [{"text": "good film", "label": "good"}, {"text": "awful film", "label": "bad"}]
CHATTY = (  # ends a turn with plain text, so that only the end-of-text token stops it
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
FORGETFUL = (  # rewrites earlier answers, as templates do that drop the thoughts of old turns
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}(gone)"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(*contents: str) -> Row:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns}


def only(task: Task, tokenizer: Any, max_length: int = 200, **options: Any) -> Example:
    """The first example of train."""
    options = {"kind": "causal-lm", "max_length": max_length} | options
    return encode(task, "train", tokenizer, **options).examples[0]


def learnt(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORED]


def sentences() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(
        lambda text: text.strip() and "<|" not in text
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=sentences(), completion=sentences(), chat=st.booleans())
def test_an_example_is_the_generation_prompt_and_then_the_answer(
    prompt: str, completion: str, chat: bool, bytes_tokenizer: Any, task_of: TaskOf
) -> None:
    task = task_of("prompt-completion", [{"prompt": prompt, "completion": completion}])
    with pytest.MonkeyPatch.context() as patch:
        if not chat:
            patch.setattr(bytes_tokenizer, "chat_template", None)
        example = only(task, bytes_tokenizer)
        asked = prompts(task, "train", bytes_tokenizer)[0]
    assert example.input_ids[: len(asked)] == asked
    assert example.labels[: len(asked)] == (IGNORED,) * len(asked)
    rest = example.input_ids[len(asked) :]
    assert example.labels[len(asked) :] == rest
    assert bytes_tokenizer.decode(rest) == completion + "<|im_end|>"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(sentences(), sentences()), min_size=2, max_size=4))
def test_every_turn_is_learnt_after_the_ids_that_a_chat_would_have(
    turns: list[tuple[str, str]], bytes_tokenizer: Any, task_of: TaskOf
) -> None:
    row = conversation(*(content for turn in turns for content in turn))
    task = task_of("messages", [row])
    examples = encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=2000).examples
    asked = prompts(task, "train", bytes_tokenizer)[0]
    assert examples[-1].input_ids[: len(asked)] == asked
    text = bytes_tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    assert list(asked) == bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = sum(learnt(example).count(bytes_tokenizer.eos_token_id) for example in examples)
    assert ends == len(turns)
    # several examples where the pieces are not the chat's ids
    assert len(examples) in (len(turns), 1)


def test_all_turns_are_learnt_and_the_text_is_the_templates(bytes_tokenizer: Any, task_of: TaskOf) -> None:
    row = conversation("is it good?", "yes", "sure?", " no")
    example = only(task_of("messages", [row]), bytes_tokenizer)
    whole = bytes_tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert bytes_tokenizer.decode(example.input_ids) == whole.removesuffix("\n")
    assert bytes_tokenizer.decode(learnt(example)) == "yes<|im_end|> no<|im_end|>"


def test_where_a_template_rewrites_old_turns_each_answer_is_an_example(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", FORGETFUL)
    one = conversation("is it good?", "yes", "sure?", "no")
    task = task_of("messages", [one, conversation("is it?", "yes")])
    encoded = encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=200)
    assert [example.row for example in encoded.examples] == [0, 0, 1]
    first, second, _ = encoded.examples
    asked = [
        prompts(task_of("messages", [{"messages": chat}]), "train", bytes_tokenizer)[0]
        for chat in (one["messages"][:2], one["messages"])
    ]
    for example, ids, answer in zip((first, second), asked, ("yes", "no"), strict=True):
        assert example.input_ids[: len(ids)] == ids
        assert example.labels[: len(ids)] == (IGNORED,) * len(ids)
        assert bytes_tokenizer.decode(learnt(example)) == f"{answer}<|im_end|>"
    assert "(gone)" in bytes_tokenizer.decode(asked[1])
    (note,) = encoded.notes
    assert "1 conversations of 2 answers" in note
    assert not encoded.dropped and not encoded.shortened


def test_of_answers_that_are_examples_those_that_do_not_fit_are_counted(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", FORGETFUL)
    long = conversation("is it good?", "yes", "sure? " * 50, "no", "why?", "it is bad")
    rows = [long, conversation("good?" * 99, "yes", "sure?", "no"), conversation("a?", "b")]
    encoded = encode(task_of("messages", rows), "train", bytes_tokenizer, kind="causal-lm", max_length=100)
    assert [example.row for example in encoded.examples] == [0, 2]
    assert (encoded.shortened, encoded.dropped) == ((0,), (1,))
    (note,) = encoded.notes
    assert "2 conversations of 5 answers" in note and "4 of them do not fit" in note


def test_loss_on_all_learns_no_token_twice_in_the_same_place(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", FORGETFUL)
    task = task_of("messages", [conversation("is it good?", "yes", "sure?", "no", "why?", "so")])
    examples = encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=300, loss_on="all").examples
    assert examples[0].labels == examples[0].input_ids
    seen: set[tuple[int, ...]] = set()
    for example in examples:
        for end, label in enumerate(example.labels, 1):
            start = example.input_ids[:end]
            assert (label == IGNORED) == (start in seen)
            assert label in (IGNORED, start[-1])
        seen |= {example.input_ids[:end] for end in range(1, len(example.input_ids) + 1)}


def test_without_a_template_every_answer_of_a_conversation_is_ended(plain_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("messages", [conversation("good", "yes", "bad", "no")])
    example = only(task, plain_tokenizer)
    words = plain_tokenizer.convert_ids_to_tokens(list(example.input_ids))
    assert words == ["good", "yes", "</s>", "bad", "no", "</s>"]
    assert plain_tokenizer.convert_ids_to_tokens(learnt(example)) == ["yes", "</s>", "no", "</s>"]
    assert prompts(task, "train", plain_tokenizer)[0] == example.input_ids[:4]


@pytest.mark.parametrize(("prompt", "read"), [("is it?", "is it?\n"), ("is it? ", "is it? ")])
def test_a_plain_prompt_ends_in_white_space(
    prompt: str, read: str, bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", None)
    task = task_of("prompt-completion", [PAIR | {"prompt": prompt}])
    assert bytes_tokenizer.decode(prompts(task, "train", bytes_tokenizer)[0]) == read


def test_a_turn_that_plain_text_ends_is_ended_by_the_end_of_text(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", CHATTY)
    example = only(task_of("prompt-completion", [PAIR]), bytes_tokenizer)
    assert learnt(example)[-1] == bytes_tokenizer.eos_token_id
    assert stop_ids(bytes_tokenizer) == (bytes_tokenizer.eos_token_id,)


@pytest.mark.parametrize("name", ["chat_tokenizer", "plain_tokenizer"])
@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("prompt-completion", PAIR),
        ("instruction", {"instruction": "is this good ?", "input": "fine", "output": "yes"}),
        ("text-label", LABELLED[0]),
        ("pair-label", {"text_a": "good", "text_b": "bad", "label": "no"}),
        ("messages", conversation("good film ?", "yes")),
    ],
)
def test_the_end_is_learnt_also_where_it_doubles_as_padding(
    name: str, form: str, row: Row, task_of: TaskOf, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    task = task_of(form, [row])
    example = only(task, tokenizer)
    assert learnt(example)[-1] == tokenizer.eos_token_id == example.input_ids[-1]
    assert tokenizer.decode(learnt(example)[:-1]) == answers(task, "train")[0]
    round_trip(task, tokenizer)


def test_what_is_asked_is_instruction_and_texts_with_blank_lines(bytes_tokenizer: Any, task_of: TaskOf) -> None:
    cases = [
        ("text-label", {"text": "fine", "label": "a"}, "good or bad\n\nfine"),
        ("pair-label", {"text_a": "x", "text_b": "y", "label": "a"}, "good or bad\n\nx\n\ny"),
        ("instruction", {"instruction": "x", "input": "y", "output": "z"}, "x\n\ny"),
        ("instruction", {"instruction": "x", "output": "z"}, "x"),
    ]
    for form, row, question in cases:
        asked = prompts(task_of(form, [row]), "train", bytes_tokenizer)[0]
        expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert bytes_tokenizer.decode(asked) == expected
        assert asked == chat_ids(bytes_tokenizer, question)


def test_a_question_may_come_with_a_system_message(bytes_tokenizer: Any) -> None:
    asked = bytes_tokenizer.decode(chat_ids(bytes_tokenizer, "hi", system="be kind"))
    assert asked.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi")


def test_an_answer_that_already_ends_is_not_ended_twice(plain_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("prompt-completion", [PAIR | {"completion": "yes </s>"}])
    assert learnt(only(task, plain_tokenizer)).count(plain_tokenizer.eos_token_id) == 1


def test_answer_ids_are_what_training_learns(chat_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("text-label", LABELLED)
    own = answer_ids(task, LABELLED[0], chat_tokenizer, "good")
    assert list(own) == learnt(only(task, chat_tokenizer))


def test_loss_on_all_learns_every_token(chat_tokenizer: Any, task_of: TaskOf) -> None:
    example = only(task_of("prompt-completion", [PAIR]), chat_tokenizer, loss_on="all")
    assert example.labels == example.input_ids


# what does not fit


def counting(*answer_lengths: int) -> list[Row]:
    words = list(map(str, range(60)))
    return [{"prompt": "good film ?", "completion": " ".join(words[:n])} for n in answer_lengths]


def test_what_does_not_fit_is_shortened_or_dropped_and_reported(plain_tokenizer: Any, task_of: TaskOf) -> None:
    rows = [*counting(2, 9), {"prompt": " ".join(["good"] * 9), "completion": "yes"}]
    encoded = encode(task_of("prompt-completion", rows), "train", plain_tokenizer, kind="causal-lm", max_length=7)
    assert (encoded.shortened, encoded.dropped) == ((1,), (2,))
    assert [example.row for example in encoded.examples] == [0, 1]
    assert [len(example.input_ids) for example in encoded.examples] == [6, 7]
    assert plain_tokenizer.eos_token_id not in encoded.examples[1].labels


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), room=st.integers(5, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_every_row_is_an_example_or_reported(
    lengths: list[int], room: int, plain_tokenizer: Any, task_of: TaskOf
) -> None:
    task = task_of("prompt-completion", counting(*lengths))
    encoded = encode(task, "train", plain_tokenizer, kind="causal-lm", max_length=room)
    rows = {example.row for example in encoded.examples} | set(encoded.dropped)
    assert rows == set(range(len(lengths)))
    for example in encoded.examples:
        assert len(example.input_ids) == len(example.labels) <= room and learnt(example)
        whole = plain_tokenizer.eos_token_id in example.labels
        assert whole != (example.row in encoded.shortened)


def test_answers_that_are_all_cut_off_say_how_long_the_longest_is(plain_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("prompt-completion", counting(3, 5))
    with pytest.raises(DataError) as caught:
        encode(task, "train", plain_tokenizer, kind="causal-lm", max_length=3)
    said = str(caught.value)
    assert "all 2 train rows are cut off at 3 tokens (rows 1, 2)" in said
    needed = int(said.rsplit(" ", 1)[1])
    assert "--max-length" in said
    encoded = encode(task, "train", plain_tokenizer, kind="causal-lm", max_length=needed)
    assert not encoded.dropped and not encoded.shortened


@given(length=st.integers(1, 30), room=st.integers(2, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_pieces_of_a_text_predict_each_token_but_the_first_once(
    length: int, room: int, plain_tokenizer: Any, task_of: TaskOf
) -> None:
    task = task_of("text", [{"text": " ".join(map(str, range(length)))}])
    examples = encode(task, "train", plain_tokenizer, kind="causal-lm", max_length=room).examples
    assert all(2 <= len(example.input_ids) <= room for example in examples)
    predicted = [token for example in examples for token in example.labels[1:]]
    ids = plain_tokenizer(task.splits["train"][0]["text"])["input_ids"]
    assert predicted == [*ids[1:], plain_tokenizer.eos_token_id]


def test_a_classifier_reads_text_and_class_and_reports_what_is_cut(plain_tokenizer: Any, task_of: TaskOf) -> None:
    rows = [*LABELLED, {"text": "good " * 9, "label": "good"}]
    encoded = encode(
        task_of("text-label", rows), "train", plain_tokenizer, kind="sequence-classification", max_length=4
    )
    assert [example.labels for example in encoded.examples] == [(1,), (0,), (1,)]
    assert encoded.shortened == (2,) and len(encoded.examples[2].input_ids) == 4


# refusals


def test_generation_data_is_refused_by_a_classifier(chat_tokenizer: Any, task_of: TaskOf) -> None:
    with pytest.raises(DataError) as error:
        only(task_of("prompt-completion", [PAIR]), chat_tokenizer, kind="sequence-classification")
    assert (error.value.code, error.value.field) == ("format_unsuited", "data")


@pytest.mark.parametrize("wrong", [{"kind": "vision"}, {"loss_on": "question"}, {"max_length": 1}])
def test_a_wrong_option_is_refused(wrong: dict[str, Any], chat_tokenizer: Any, task_of: TaskOf) -> None:
    with pytest.raises(ConfigError):
        only(task_of("prompt-completion", [PAIR]), chat_tokenizer, **wrong)


def test_a_tokenizer_without_an_end_is_refused(chat_tokenizer: Any, task_of: TaskOf) -> None:
    chat_tokenizer.eos_token = None
    task = task_of("prompt-completion", [PAIR])
    for check in (
        lambda: only(task, chat_tokenizer),
        lambda: round_trip(task, chat_tokenizer),
        lambda: stop_ids(chat_tokenizer),
    ):
        with pytest.raises(DataError) as error:
            check()
        assert (error.value.code, error.value.field) == ("no_end_of_text", "tokenizer")


def test_a_template_that_drops_or_changes_the_answer_is_refused(chat_tokenizer: Any, task_of: TaskOf) -> None:
    task = task_of("prompt-completion", [PAIR])
    for content in ("", "{{ m['content'] | upper }}"):
        chat_tokenizer.chat_template = (
            "{% for m in messages %}<s>" + content + "</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
        )
        with pytest.raises(DataError) as error:
            round_trip(task, chat_tokenizer)
        assert (error.value.code, error.value.field) == ("answer_not_written", "chat_template")


def test_a_row_that_the_template_refuses_is_quoted(chat_tokenizer: Any, task_of: TaskOf) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError) as error:
        only(task_of("prompt-completion", [PAIR]), chat_tokenizer)
    assert (error.value.code, error.value.field) == ("template_refuses_row", "chat_template")
