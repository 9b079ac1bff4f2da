"""Choices of what is learnt of a chat: which answers, which of their thoughts, and how the template is told."""

from typing import Any

import pytest
from chat_templates import QWEN3
from rowfiles import ASSISTANT, USER

from loralab.errors import ConfigError, DataError, LoralabError
from loralab.tasks.catalog import Task
from loralab.tasks.chat_options import ChatOptions
from loralab.tasks.encode import encode, prompt_ids, prompts
from loralab.tasks.examples import IGNORED


def task_of(*chats: list[dict[str, Any]], **options: Any) -> Task:
    rows = [{"messages": chat} for chat in chats]
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    return Task(name="rows", format="messages", splits=splits, chat=ChatOptions(**options))


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


CHAT = [USER, answer("yes", learn=False), USER, answer("no"), USER, answer("good")]


def learnt(task: Task, tokenizer: Any, **options: Any) -> list[str]:
    """The learnt text of each example."""
    options = {"kind": "causal-lm", "max_length": 500} | options
    examples = encode(task, "train", tokenizer, **options).examples
    return [tokenizer.decode([n for n in e.labels if n != IGNORED]).replace("<|im_end|>", ".") for e in examples]


@pytest.mark.parametrize("template", [True, False])
def test_the_choice_of_answers(template: bool, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not template:
        monkeypatch.setattr(bytes_tokenizer, "chat_template", None)
    cases = {None: ["no.good."], "marked": ["no.good."], "all": ["yes.no.good."], "last": ["good."]}
    for learn, expected in cases.items():
        assert learnt(task_of(CHAT, learn=learn), bytes_tokenizer) == expected
    whole = encode(task_of(CHAT, learn="all"), "train", bytes_tokenizer, kind="causal-lm", max_length=500).examples
    some = encode(task_of(CHAT), "train", bytes_tokenizer, kind="causal-lm", max_length=500)
    assert some.examples[0].input_ids == whole[0].input_ids
    assert any("2 of 3 answers" in note for note in some.notes)


def test_the_last_answer_that_is_learnt_is_the_one_that_is_asked_for(bytes_tokenizer: Any) -> None:
    chat = [USER, answer("yes"), USER, answer("no", learn=False)]
    task = task_of(chat)
    assert learnt(task, bytes_tokenizer) == ["yes."]
    assert prompts(task, "test", bytes_tokenizer) == prompts(task_of(chat[:2]), "test", bytes_tokenizer)


def test_rows_without_a_marked_answer_are_counted_and_refused_alone(bytes_tokenizer: Any) -> None:
    nothing = [USER, answer("yes", learn=False)]
    encoded = encode(task_of(nothing, CHAT), "train", bytes_tokenizer, kind="causal-lm", max_length=500)
    assert [example.row for example in encoded.examples] == [1]
    assert not encoded.dropped and "1 rows have none" in encoded.notes[0]
    with pytest.raises(DataError) as caught:
        learnt(task_of(nothing), bytes_tokenizer)
    assert (caught.value.code, caught.value.field) == ("nothing_marked", "learn")


@pytest.mark.parametrize(
    ("options", "more", "code"),
    [
        ({"learn": "marked"}, {}, "nothing_marked"),
        ({"learn": "last"}, {"loss_on": "all"}, "contradicting_options"),
        ({"thoughts": "mask"}, {"loss_on": "all"}, "contradicting_options"),
    ],
)
def test_choices_that_cannot_be_followed_are_refused(
    options: dict[str, Any], more: dict[str, Any], code: str, bytes_tokenizer: Any
) -> None:
    with pytest.raises(LoralabError) as caught:
        learnt(task_of([USER, ASSISTANT], **options), bytes_tokenizer, **more)
    assert caught.value.code == code
    with pytest.raises(DataError) as caught:
        learnt(task_of(CHAT), bytes_tokenizer, loss_on="all")
    assert caught.value.code == "contradicting_options"
    assert learnt(task_of(CHAT, learn="all"), bytes_tokenizer, loss_on="all")


@pytest.mark.parametrize("options", [{"learn": "first"}, {"thoughts": "hide"}])
def test_choices_have_known_values(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ChatOptions(**options)
    assert (caught.value.code, caught.value.field) == ("invalid_choice", next(iter(options)))


def test_a_task_is_encoded_with_choices_of_the_caller(bytes_tokenizer: Any) -> None:
    (example,) = task_of(CHAT).encode(bytes_tokenizer, learn="last")
    assert bytes_tokenizer.decode([n for n in example.labels if n != IGNORED]) == "good<|im_end|>"


def test_thoughts_inside_the_answer_are_kept_masked_or_dropped(bytes_tokenizer: Any) -> None:
    chat = [USER, answer("<think>\nso\n</think>\n\nyes"), USER, answer("no")]
    cases = {"keep": "<think>\nso\n</think>\n\nyes.no.", "mask": "yes.no.", "drop": "yes.no."}
    for thoughts, expected in cases.items():
        assert learnt(task_of(chat, thoughts=thoughts), bytes_tokenizer) == [expected]
    masked, kept = (
        encode(task_of(chat, thoughts=t), "train", bytes_tokenizer, kind="causal-lm", max_length=500).examples[0]
        for t in ("mask", "keep")
    )
    assert masked.input_ids == kept.input_ids
    for content, code in (("<think>\nso", "thought_left_open"), ("<think>\nso\n</think>", "no_answer")):
        with pytest.raises(DataError) as caught:
            learnt(task_of([USER, answer(content)], thoughts="drop"), bytes_tokenizer)
        assert caught.value.code == code


def test_a_row_tells_the_template_values_of_its_variables(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", QWEN3)
    rows = [{"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False, "unknown": 1}}]
    task = Task(name="rows", format="messages", splits={"train": rows})
    asked = bytes_tokenizer.decode(prompt_ids(task, rows[0], bytes_tokenizer))
    assert asked.endswith("<think>\n\n</think>\n\n")
    assert learnt(task, bytes_tokenizer) == ["answer."]
    encoded = encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=500)
    assert encoded.notes == ("not used by the chat template: chat_template_kwargs.unknown",)


def test_without_a_template_what_only_one_can_write_is_refused(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", None)
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for message in (answer("a", reasoning_content="so"), answer("", tool_calls=[call])):
        with pytest.raises(DataError) as caught:
            learnt(task_of([USER, message]), bytes_tokenizer)
        assert caught.value.code == "needs_chat_template"


SILENT = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_message_that_the_template_leaves_out_is_refused(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", SILENT)
    with pytest.raises(DataError) as caught:
        learnt(task_of([{"role": "system", "content": "be kind"}, USER, ASSISTANT]), bytes_tokenizer)
    assert caught.value.code == "message_not_written"


def test_what_a_row_writes_in_the_words_of_the_template_is_not_written_twice(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", QWEN3)
    wrapped = {"role": "tool", "content": "<tool_response>\n{}\n</tool_response>"}
    call = answer("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    chats = [[USER, call, result, ASSISTANT] for result in (wrapped, {"role": "tool", "content": "{}"})]
    one, other = (prompts(task_of(chat), "test", bytes_tokenizer) for chat in chats)
    assert one == other
    system = {"role": "system", "content": "<tools>{}</tools>"}
    row = {"messages": [system, USER, ASSISTANT], "tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(DataError) as caught:
        prompt_ids(Task(name="rows", format="messages", splits={}), row, bytes_tokenizer)
    assert (caught.value.code, caught.value.field) == ("tools_twice", "tools")


@pytest.mark.parametrize(("options", "field"), [({"learn": "last"}, "learn"), ({"thoughts": "mask"}, "thoughts")])
def test_choices_of_turns_are_refused_where_none_are_read(
    options: dict[str, str], field: str, bytes_tokenizer: Any
) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    task = Task(name="rows", format="text-label", splits=splits, labels=("x", "y"), chat=ChatOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as refused:
        encode(task, "train", bytes_tokenizer, kind="sequence-classification", max_length=50)
    assert (refused.value.code, refused.value.field) == ("no_effect", field)
