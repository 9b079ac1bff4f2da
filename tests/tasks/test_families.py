"""Of the templates of model families: what is learnt of a chat is what generation would have to write, turn by turn.

The reference asks transformers' own renderer for each prompt, as a server would, and compares.
"""

from itertools import groupby
from typing import Any

import pytest
from chat_templates import FAMILIES, SPECIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loralab.errors import DataError
from loralab.tasks.encode import stop_ids
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.given import read

USER = [{"role": "user", "content": f"QUESTION{n} please?"} for n in range(3)]
THINKERS = ("qwen3", "harmony", "r1", "smollm3")
WITH_CALLS = ("qwen3", "llama3", "mistral", "harmony")
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Tell it.", "parameters": SCHEMA}}
ARGUMENTS = {"city": "Paris", "days": 3}
CALL = {"id": "abc123xyz", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "content": "SUNNY", "tool_call_id": "abc123xyz", "name": "get_weather"}


@pytest.fixture(scope="module")
def inner() -> Tokenizer:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL],
    )
    found.train_from_iterator(["the answer is good\n\n", "a question, please?", "<think>\n</think>\n\n"] * 20, trainer)
    return found


def tokenizer_of(inner: Tokenizer, family: str) -> Any:
    template, end, _ = FAMILIES[family]
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=end, pad_token=end)
    fast.chat_template = template
    return fast


def answer(number: int, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": f"ANSWER{number} good.", **fields}


def learnt_runs(examples: list[Example]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ids before each run of learnt ones, and the run."""
    found = []
    for example in examples:
        start = 0
        for learnt, labels in groupby(example.labels, lambda label: label != IGNORED):
            end = start + len(list(labels))
            if learnt:
                found.append((example.input_ids[:start], example.input_ids[start:end]))
            start = end
    return found


def encoded(tokenizer: Any, row: dict[str, Any], **options: Any) -> list[Example]:
    """The examples of one row alone."""
    task = read({name: [row] for name in ("train", "validation", "test")})
    return task.encode(tokenizer, "train", 5000, **options)


def asked_ids(tokenizer: Any, messages: list[dict[str, Any]], **more: Any) -> tuple[int, ...]:
    """The prompt of the next answer as a server renders it."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def plain(message: dict[str, Any], family: str) -> dict[str, Any]:
    """A message with its thought where the family's template reads it."""
    own = {"harmony": "thinking", "qwen3": "reasoning_content"}.get(family)
    thought = message.get("reasoning_content")
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    if thought is None:
        return rest
    if own:
        return {**rest, own: thought}
    return {**rest, "content": f"<think>\n{thought}\n</think>\n\n{rest['content']}"}


def check_turns(family: str, tokenizer: Any, row: dict[str, Any], **options: Any) -> list[str]:
    """Compare each learnt run with its prompt; return the learnt texts."""
    examples = encoded(tokenizer, row, **options)
    runs = learnt_runs(examples)
    messages = [plain(message, family) for message in row["messages"]]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    tools = {"tools": row["tools"]} if "tools" in row else {}
    ends = {FAMILIES[family][1], FAMILIES[family][2]}
    assert len(runs) == len(places)
    texts = []
    for (before, target), place in zip(runs, places, strict=True):
        assert before == asked_ids(tokenizer, messages[:place], **tools)
        assert target[-1] in stop_ids(tokenizer)
        texts.append(tokenizer.decode(target))
        assert texts[-1].endswith(tuple(ends - {""}))
        for said in ("QUESTION", "SUNNY", "SYSTEM"):
            assert said not in texts[-1]
    return texts


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "r1"])
@pytest.mark.parametrize("system", [False, True])
def test_every_answer_follows_the_prompt_that_generation_sees(family: str, system: bool, inner: Tokenizer) -> None:
    tokenizer = tokenizer_of(inner, family)
    chat = [message for n in range(3) for message in (USER[n], answer(n))]
    told = [{"role": "system", "content": "SYSTEM be kind."}] if system else []
    texts = check_turns(family, tokenizer, {"messages": [*told, *chat]})
    assert [f"ANSWER{n} good." in text for n, text in enumerate(texts)] == [True] * 3
    assert [text.count("ANSWER") for text in texts] == [1] * 3


@pytest.mark.parametrize("family", THINKERS)
@pytest.mark.parametrize("inside", [False, True])
def test_the_thought_of_every_answer_is_learnt_once(family: str, inside: bool, inner: Tokenizer) -> None:
    if inside and family == "harmony":
        pytest.skip("its thoughts are no part of the content")
    tokenizer = tokenizer_of(inner, family)
    answers = [answer(n, reasoning_content=f"BECAUSE{n}") for n in range(2)]
    if inside:
        answers = [plain(a, "r1") for a in answers]
    row = {"messages": [USER[0], answers[0], USER[1], answers[1]]}
    texts = check_turns(family, tokenizer, row)
    for number, text in enumerate(texts):
        assert text.count(f"BECAUSE{number}") == text.count(f"ANSWER{number}") == 1
        assert text.index("BECAUSE") < text.index("ANSWER")
        assert text.count("</think>") == (family != "harmony")
        assert text.count("<think>") == (family not in ("harmony", "r1"))  # r1's prompt opens it


@pytest.mark.parametrize("family", WITH_CALLS)
def test_calls_are_learnt_and_results_are_not(family: str, inner: Tokenizer) -> None:
    tokenizer = tokenizer_of(inner, family)
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    row = {"tools": [TOOL], "messages": [USER[0], calling, RESULT, answer(0), USER[1], answer(1)]}
    texts = check_turns(family, tokenizer, row)
    assert "get_weather" in texts[0] and "Paris" in texts[0] and "ANSWER0" in texts[1]
    assert texts[0].endswith(FAMILIES[family][2])
    whole = "".join(tokenizer.decode(example.input_ids) for example in encoded(tokenizer, row))
    assert "SUNNY" in whole


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(WITH_CALLS)))
def test_a_template_without_tools_is_refused_by_name(family: str, inner: Tokenizer) -> None:
    tokenizer = tokenizer_of(inner, family)
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(DataError) as caught:
        encoded(tokenizer, {"tools": [TOOL], "messages": [USER[0], calling, RESULT, answer(0)]})
    assert caught.value.code in (
        "tools_not_written",
        "part_not_written",
        "template_refuses_row",
        "thought_left_open",
        "answer_not_written",
    )
    assert caught.value.field in ("tools", "chat_template")


@pytest.mark.parametrize("family", THINKERS)
def test_masked_thoughts_are_read_and_dropped_ones_are_not(family: str, inner: Tokenizer) -> None:
    tokenizer = tokenizer_of(inner, family)
    row = {"messages": [USER[0], answer(0, reasoning_content="BECAUSE0")]}
    (kept,) = encoded(tokenizer, row)
    (masked,) = encoded(tokenizer, row, thoughts="mask")
    assert masked.input_ids == kept.input_ids
    learnt = tokenizer.decode([label for label in masked.labels if label != IGNORED])
    assert "BECAUSE" not in learnt and "think" not in learnt and "analysis" not in learnt
    assert "ANSWER0 good." in learnt and learnt.endswith(FAMILIES[family][1])
    if family == "r1":  # its prompt opens a thought, which an answer without one would leave open
        with pytest.raises(DataError) as caught:
            encoded(tokenizer, row, thoughts="drop")
        assert caught.value.code == "thought_left_open"
        return
    (dropped,) = encoded(tokenizer, row, thoughts="drop")
    assert dropped == encoded(tokenizer, {"messages": [USER[0], answer(0)]})[0]


@pytest.mark.parametrize("family", ["llama3", "gemma3", "mistral", "phi4"])
def test_a_template_without_thoughts_refuses_those_beside_the_answer(family: str, inner: Tokenizer) -> None:
    tokenizer = tokenizer_of(inner, family)
    row = {"messages": [USER[0], answer(0, reasoning_content="BECAUSE0")]}
    with pytest.raises(DataError) as caught:
        encoded(tokenizer, row)
    assert (caught.value.code, caught.value.field) == ("thought_not_written", "reasoning_content")
    assert encoded(tokenizer, row, thoughts="drop") == encoded(tokenizer, {"messages": [USER[0], answer(0)]})


@pytest.mark.parametrize("family", ["qwen3", "harmony"])
def test_answers_between_calls_share_a_sample_as_long_as_later_prompts_repeat_them(
    family: str, inner: Tokenizer
) -> None:
    tokenizer = tokenizer_of(inner, family)
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "BECAUSE0"}
    last = answer(0, reasoning_content="BECAUSE1")
    row = {"tools": [TOOL], "messages": [USER[0], calling, RESULT, last, USER[1], answer(1)]}
    texts = check_turns(family, tokenizer, row)
    assert "BECAUSE0" in texts[0] and "BECAUSE1" in texts[1]
    assert len(encoded(tokenizer, row)) == 2
