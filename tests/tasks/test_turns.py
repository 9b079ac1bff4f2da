"""Of chat templates of every shape: what is learnt is what generation would have to write."""

import re
from collections.abc import Callable
from datetime import datetime
from itertools import groupby
from typing import Any

import pytest

from loralab.errors import DataError
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode, prompt_ids, stop_ids, written_answer
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.template import render
from loralab.tasks.turns import last_turn, turns

TaskOf = Callable[..., Task]
END = "<|im_end|>"
MESSAGE = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
CUT = "m.content.split('</think>')[-1]"


def each(body: str, opening: str, before: str = "") -> str:
    """A template: something, every message, the opening of an answer."""
    loop = f"{{% for m in messages %}}{body}{{% endfor %}}"
    return f"{before}{loop}{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"


HEADER = "<|im_start|>assistant\n"
LAST_ASKED = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
)
THINKER = (  # splits an answer into its thought and the rest; earlier answers lose their thoughts
    "{% set text, thought = m.content, '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + text + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endif %}"
)
ROLE_OR_CUT = (
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + " + CUT + " + '<|im_end|>\n' }}"
    "{% else %}{{ " + MESSAGE + " }}{% endif %}"
)
ALWAYS = "{% for m in messages %}{{ " + MESSAGE + " }}{% endfor %}{{ '" + HEADER + "' }}"
TEMPLATES = {
    "chatml": each("{{ " + MESSAGE + " }}", HEADER),
    "always opens": ALWAYS,
    "llama 3": each(
        "{{ '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|im_end|>' }}",
        "<|header|>assistant<|/header|>\n\n",
        "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M:%S.%f') + '\n' }}",
    ),
    "default system": each(
        "{{ " + MESSAGE + " }}",
        HEADER,
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}",
    ),
    "empty thought, written": each(THINKER, HEADER, LAST_ASKED),
    "empty thought, asked with": each(THINKER, HEADER + "<think>\n\n</think>\n\n", LAST_ASKED),
    "empty thought, asked with alone": each("{{ " + MESSAGE + " }}", HEADER + "<think>\n\n</think>\n\n"),
    "thought opened": each(THINKER, HEADER + "<think>\n", LAST_ASKED),
    "thought opened and cut": each(ROLE_OR_CUT, HEADER + "<think>\n"),
    "thought opened in all": each(
        "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n' + m.content + "
        "'<|im_end|>\n' }}{% else %}{{ " + MESSAGE + " }}{% endif %}",
        HEADER + "<think>\n",
    ),
    "thought cut": each(ROLE_OR_CUT, HEADER),
    "model and user": each(
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + m.content | trim + "
        "'<end>\n' }}",
        "<turn>model\n",
    ),
    "inst": (
        "{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, "
        "messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if loop.last and system %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
    "no end of turn": each(
        "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{{ '\n<think>' + ("
        "m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content "
        "else '') + '</think>\n' + " + CUT + ".strip() }}{% else %}{{ '\n' + m.content }}"
        "{% endif %}",
        "<|assistant|>",
    ),
    "channels": each(
        "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant<|channel|>final<|message|>' + "
        "m.content + '<|im_end|>' }}{% else %}{{ '<|im_start|>' + m.role + '<|message|>' + "
        "m.content + '<|im_end|>' }}{% endif %}",
        "<|im_start|>assistant",
    ),
    "another empty thought": each(
        "{{ '<turn>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}",
        "<turn>assistant\n<|channel>thought\n<channel|>",
    ),
    "thought ended": each(
        "{% if m.role == 'assistant' %}{{ '<|assistant|></think>' + (m.content.split('</think>', 1)"
        "[1] if '</think>' in m.content else m.content) + '<|im_end|>' }}"
        "{% else %}{{ '<|user|>' + m.content }}{% endif %}",
        "<|assistant|></think>",
    ),
    "blank lines in a thought": each(
        "{% if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n\n' + "
        "m.content.strip() + '\n<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + "
        + CUT
        + ".strip() + '\n<|im_end|>\n' }}{% endif %}",
        HEADER + "<think>\n\n",
    ),
    "a line more": each("{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}", "<|assistant|>\n"),
    "no opening": each("{{ " + MESSAGE + " }}", ""),
}
PLAIN, THOUGHT = "answer {}", "<think>\nreason {}\n</think>\n\nanswer {}"
EMPTY, BARE = "<think>\n\n</think>\n\nanswer {}", "reason {}\n</think>\n\nanswer {}"
REFUSED = {  # all other answers are learnt
    ("empty thought, asked with", THOUGHT): "second_thought",
    ("empty thought, asked with", BARE): "second_thought",
    ("empty thought, asked with alone", THOUGHT): "second_thought",
    ("empty thought, asked with alone", BARE): "second_thought",
    ("thought opened and cut", PLAIN): "thought_left_open",
    ("thought opened in all", PLAIN): "thought_left_open",
    ("thought cut", BARE): "answer_not_written",
    ("another empty thought", THOUGHT): "second_thought",
    ("another empty thought", EMPTY): "second_thought",
    ("thought ended", THOUGHT): "second_thought",
    ("thought ended", BARE): "second_thought",
    ("blank lines in a thought", PLAIN): "thought_left_open",
}


def conversation(answer: str, turns: int, system: bool) -> dict[str, Any]:
    chat = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        chat.append({"role": "user", "content": f"question {turn}"})
        chat.append({"role": "assistant", "content": answer.replace("{}", str(turn))})
    return {"messages": chat}


def runs(example: Example) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ids before each run of learnt ones, and the run."""
    found, start = [], 0
    for learnt, labels in groupby(example.labels, lambda label: label != IGNORED):
        end = start + len(list(labels))
        if learnt:
            found.append((example.input_ids[:start], example.input_ids[start:end]))
        start = end
    return found


def cases() -> list[tuple[str, str, int, bool]]:
    return [
        (name, answer, turns, system)
        for name in TEMPLATES
        for answer in (PLAIN, THOUGHT, EMPTY, BARE)
        for turns, system in ((1, False), (3, False), (3, True))
        if not (name == "model and user" and system)
    ]


@pytest.mark.parametrize(("name", "answer", "turns", "system"), cases())
def test_an_answer_is_learnt_once_after_what_generation_is_shown_and_with_at_most_one_thought(
    name: str,
    answer: str,
    turns: int,
    system: bool,
    bytes_tokenizer: Any,
    task_of: TaskOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bytes_tokenizer, "chat_template", TEMPLATES[name])
    row = conversation(answer, turns, system)
    task = task_of("messages", [row])
    if code := REFUSED.get((name, answer)):
        with pytest.raises(DataError) as caught:
            encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=2000)
        assert (caught.value.code, caught.value.field) == (code, "chat_template")
        return
    examples = encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=2000).examples
    assert {example.row for example in examples} == {0}
    learnt = [run for example in examples for run in runs(example)]
    places = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    for (before, target), place in zip(learnt, places, strict=True):
        asked = prompt_ids(task, {"messages": row["messages"][: place + 1]}, bytes_tokenizer)
        opening, text = bytes_tokenizer.decode(asked), bytes_tokenizer.decode(target)
        if "Today" not in opening:  # which says the time, to the microsecond
            assert before == asked
        assert text.endswith(END) and text.count(END) == 1
        whole = opening + text
        own = row["messages"][place]["content"]
        if name == "thought ended":  # the prompt says no more of an empty thought
            own = own.removeprefix("<think>")
        assert squeezed(own) in squeezed(whole)
        whole = whole[whole.rindex("question") :]  # earlier thoughts are those of earlier answers
        marks = re.findall("</?think>", whole)
        ended = name == "thought ended" or answer == BARE
        assert marks in ([], ["<think>", "</think>"], ["</think>"] * ended)


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_a_template_that_always_opens_an_answer_ends_one_as_others_do(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    usual, stops = last_turn(bytes_tokenizer, chat), stop_ids(bytes_tokenizer)
    monkeypatch.setattr(bytes_tokenizer, "chat_template", ALWAYS)
    assert last_turn(bytes_tokenizer, chat) == usual
    assert stop_ids(bytes_tokenizer) == stops


@pytest.mark.parametrize("text", ["the tag <think> begins a thought", "a </think> b", "<think> no"])
def test_a_template_that_knows_no_thoughts_leaves_them_alone(text: str, bytes_tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
    assert last_turn(bytes_tokenizer, chat).target == text + END + "\n"


@pytest.mark.parametrize("answer", ["s", "a", "e", "assistant", "yes"])
@pytest.mark.parametrize("content", ["", "{{ m.content | upper }}", "{{ m.content[:-1] }}"])
@pytest.mark.parametrize("opening", ["<s>", "<s>assistant\n", ""])
def test_an_answer_that_is_dropped_or_changed_is_refused_also_where_it_is_short(
    answer: str, content: str, opening: str, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "<s>{% if m.role == 'assistant' %}assistant\n{% endif %}" + content + "</s>"
    monkeypatch.setattr(bytes_tokenizer, "chat_template", each(body, opening))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    with pytest.raises(DataError) as caught:
        turns(bytes_tokenizer, chat)
    assert caught.value.code == "answer_not_written"


def test_an_opening_that_no_whole_conversation_has_is_refused_or_taken_from_the_answer(
    bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = each("{{ " + MESSAGE + " }}", HEADER + "<|mind|>")
    monkeypatch.setattr(bytes_tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(DataError) as caught:
        last_turn(bytes_tokenizer, chat)
    assert caught.value.code == "prompt_not_continued" and "<|mind|>" in str(caught.value)
    chat[1]["content"] = "<|mind|>hm<|/mind|>yes"
    found = last_turn(bytes_tokenizer, chat)
    assert found.target == "hm<|/mind|>yes" + END + "\n"


def test_a_refusal_says_which_row_and_quotes_the_opening(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = TEMPLATES["thought opened and cut"]
    monkeypatch.setattr(bytes_tokenizer, "chat_template", template)
    good = {"prompt": "q", "completion": THOUGHT}
    task = task_of("prompt-completion", [good, good, {"prompt": "q", "completion": "no thought"}])
    with pytest.raises(DataError) as caught:
        encode(task, "train", bytes_tokenizer, kind="causal-lm", max_length=2000)
    for part in ("train row 3", "<think>", "no thought"):
        assert part in str(caught.value)


def test_the_reference_of_what_is_generated_is_what_generation_would_write(
    bytes_tokenizer: Any, task_of: TaskOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        ("chatml", PLAIN, PLAIN),
        ("chatml", THOUGHT, THOUGHT),
        ("thought opened and cut", THOUGHT, THOUGHT.removeprefix("<think>\n")),
        ("empty thought, written", PLAIN, EMPTY),
    ]
    for name, answer, expected in cases:
        monkeypatch.setattr(bytes_tokenizer, "chat_template", TEMPLATES[name])
        row = {"prompt": "q", "completion": answer}
        task = task_of("prompt-completion", [row])
        assert written_answer(task, row, bytes_tokenizer) == expected


def test_a_template_is_told_the_time_that_it_is_rendered_at() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    text = render("{{ strftime_now('%Y-%m-%d %S') }}", [], prompt=False, tokens={}, now=now)
    assert text == "2026-01-02 05"
