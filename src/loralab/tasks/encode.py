"""Row -> numbers: token ids and label mask, template, end of text, truncation; or a picture.

The text up to the answer and the answer are tokenised separately, so training sees exactly the
ids that generation will see. A conversation whose earlier answers read otherwise in later prompts
is cut into one example an answer. The end-of-text token is always learnt, also where it doubles
as padding: labels are masked by position, never by id.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from loralab.errors import ConfigError, DataError, format_value, join_limited
from loralab.tasks.answered import Answered
from loralab.tasks.catalog import Task
from loralab.tasks.chat_options import DEFAULT, ChatOptions
from loralab.tasks.chats import Conversation, conversation_of, last_learnt, require_choice, unread
from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import FORMATS, Row
from loralab.tasks.pictured import Segment, marks_in, with_pictures
from loralab.tasks.pictures import PictureFile
from loralab.tasks.placed import MARK
from loralab.tasks.segments import ended, opening, samples, token_ids
from loralab.tasks.turns import NOTHING, Said, last_turn, write

CALLED = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "f", "arguments": {}}}
CALLING = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]})


def encode(
    task: Task,
    split: str,
    tokenizer: Any,
    *,
    kind: str,
    max_length: int,
    loss_on: str = "answer",
    rows: Sequence[Row] | None = None,
) -> Encoded:
    """Return the rows of a split as examples of at most `max_length` tokens; pictures as they are.

    A row whose answer does not fit at all is dropped, one whose answer does not fit whole is
    shortened; both are reported. Plain texts are cut into consecutive pieces instead.

    Raises:
        DataError: the format does not suit the model, or no row is left.
    """
    if max_length < 2 or loss_on not in ("answer", "all"):
        raise ConfigError(
            f"max_length must be at least 2, loss_on answer or all; got {max_length}, {loss_on!r}",
            code="out_of_range",
            field="max_length" if max_length < 2 else "loss_on",
        )
    from loralab.tasks.kinds.registry import kind_named

    chosen = task.splits[split] if rows is None else rows
    require_suited(task, kind)
    _require_conversations(task, kind)
    return kind_named(kind).encode(task, split, chosen, tokenizer, max_length=max_length, loss_on=loss_on)


def _require_conversations(task: Task, kind: str) -> None:
    """Refuse choices of turns for a kind of model that reads no conversations.

    Raises:
        ConfigError: they would have no effect.
    """
    from loralab.tasks.kinds.registry import kind_named

    if "messages" in kind_named(kind).formats or task.chat == DEFAULT:
        return
    option = "thoughts" if task.chat.learn is None else "learn"
    raise ConfigError(
        f"--{option} chooses what is learnt of conversations, and a {kind} model reads none; leave it out",
        code="no_effect",
        field=option,
    )


def answered(task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str) -> Encoded:
    """Return conversations, or whatever has an answer, as a language model learns them; or pieces of texts.

    Raises:
        DataError: no row is left.
    """
    _require_eos(tokenizer)
    if task.format == "text":
        return _texts(rows, tokenizer, max_length)
    require_choice(task, loss_on)
    found = Answered(max_length=max_length, loss_on=loss_on, options=task.chat)
    for index, row in enumerate(rows):
        with _placed(task, split, index):
            chat = conversation(task, row, tokenizer)
            pieces = samples(tokenizer, chat)
            if pieces:
                pieces = with_pictures(tokenizer, pieces, row.get("images", ()), marks_in(chat.asked))
            found.take(index, pieces, chat.answers)
    encoded = found.encoded(task.name, split)
    return replace(encoded, notes=(*encoded.notes, *unread(rows, tokenizer)))


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse what does not turn text into tokens, or pictures into numbers.

    Raises:
        ConfigError: it is not a tokenizer, nor what stands in its place for pictures.
    """
    if not (hasattr(tokenizer, "eos_token_id") and hasattr(tokenizer, "pad_token_id")):
        raise ConfigError(
            f"tokenizer must be a tokenizer of transformers, found {format_value(tokenizer)}",
            code="not_a_tokenizer",
            field="tokenizer",
        )


def require_suited(task: Task, kind: str) -> None:
    """Refuse formats that a kind of model cannot learn from.

    Raises:
        ConfigError: there is no such kind.
        DataError: the rows are of another format.
    """
    from loralab.tasks.kinds.registry import kind_named, kinds_for

    own = kind_named(kind)
    if task.format in own.formats:
        if not own.sees and any("images" in row for rows in task.splits.values() for row in rows):
            raise DataError(
                f"{task.name} has rows with pictures, which a {kind} model does not read; take a model that does, or "
                "map their column away (--map images=, --map image=)",
                code="pictures_unread",
                field="images",
            )
        return
    columns = " or ".join(", ".join(FORMATS[form][0]) for form in own.formats)
    others = [other.name for other in kinds_for(task.format)]
    raise DataError(
        f"{task.name} has {task.format} rows ({', '.join(FORMATS[task.format][0])}); {kind} needs {columns}; such "
        f"rows are for {join_limited(others)}",
        code="format_unsuited",
        field="data",
    )


def prompts(task: Task, split: str, tokenizer: Any) -> list[Ids]:
    """Return what the model sees of each row before it answers."""
    return [prompt_ids(task, row, tokenizer) for row in task.splits[split]]


def prompt_ids(task: Task, row: Row, tokenizer: Any) -> Ids:
    """Return what the model sees of one row before it answers: all of it, for a plain text."""
    if task.format == "text":
        return token_ids(tokenizer, row["text"], special=True)
    return asked(task, row, tokenizer).ids


def asked(task: Task, row: Row, tokenizer: Any) -> Segment:
    """Return what the model sees of a row with an answer before that, with its pictures."""
    chat = conversation(task, row, tokenizer)
    return _opened(tokenizer, chat.asked, row.get("images", ()), chat.said)


def question_ids(tokenizer: Any, prompt: str, pictures: Sequence[PictureFile], *, system: str | None = None) -> Segment:
    """Return a question that is no row, behind some pictures."""
    first = [{"role": "system", "content": system}] if system else []
    return _opened(tokenizer, [*first, {"role": "user", "content": MARK * len(pictures) + prompt}], pictures)


def _opened(tokenizer: Any, chat: Sequence[Any], pictures: Sequence[PictureFile], said: Said = NOTHING) -> Segment:
    ids = opening(tokenizer, chat, said.tools, said.kwargs)
    if not pictures:
        return Segment(ids, False)
    text = write(tokenizer, chat, prompt=True, said=said)
    [[found]] = with_pictures(tokenizer, [[Segment(ids, False, text)]], pictures, marks_in(chat))
    return found


def chat_ids(tokenizer: Any, prompt: str, *, system: str | None = None) -> Ids:
    """Return a question that is no row, as `generate` asks it."""
    first = [{"role": "system", "content": system}] if system else []
    return opening(tokenizer, [*first, {"role": "user", "content": prompt}])


def answer(row: Row, chat: ChatOptions = DEFAULT) -> str:
    """Return the reference answer of a row: of a conversation the last that is learnt; tags and labels joined."""
    if "messages" in row:
        last = row["messages"][last_learnt(row["messages"], chat)]
        return str(last["content"]) or json.dumps([call["function"] for call in last.get("tool_calls", ())])
    if "tags" in row:
        return " ".join(row["tags"])
    if "labels" in row:
        return ", ".join(row["labels"])
    if "positive" in row:
        return " | ".join(row["positive"])
    columns = ("label", "score", "completion", "output", "text_b")
    return str(next((row[c] for c in columns if c in row), ""))


def answers(task: Task, split: str) -> list[str]:
    """Return the reference answers of a split."""
    return [answer(row, task.chat) for row in task.splits[split]]


def answer_ids(task: Task, row: Row, tokenizer: Any, text: str) -> Ids:
    """Return the tokens of an answer as they stand after the row's prompt, end token included."""
    chat = conversation(task, row, tokenizer)
    asked = [*chat.asked, {"role": "assistant", "content": text}]
    return ended(tokenizer, last_turn(tokenizer, asked, chat.said).target)


def written_answer(task: Task, row: Row, tokenizer: Any) -> str:
    """Return the reference answer of a row as it is written after the row's prompt.

    That may have the beginning of a thought already, or the template one of its own.
    """
    chat = conversation(task, row, tokenizer)
    last = chat.messages[len(chat.asked)]
    target = last_turn(tokenizer, [*chat.asked, last], chat.said).target
    if last.keys() == {"role", "content"} and target.lstrip().startswith(last["content"].strip()):
        return str(last["content"])
    ids = ended(tokenizer, target)[:-1]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def stop_ids(tokenizer: Any) -> Ids:
    """Return the ids that end an answer: the end of text, and the template's end of turn."""
    _require_eos(tokenizer)
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        stops.append(ended(tokenizer, write(tokenizer, turn))[-1])
        with suppress(DataError):  # a template may refuse calls, and one without them ends nothing by them
            called = last_turn(tokenizer, CALLING, Said(tools=[CALLED]))
            stops.append(ended(tokenizer, called.target)[-1])
    return tuple(dict.fromkeys(stops))


def round_trip(task: Task, tokenizer: Any, kind: str = "causal-lm") -> None:
    """Check the first train row, before all are encoded: `encode` checks each in the same way.

    Raises:
        DataError: there is no end of text, or an answer cannot be learnt with the template.
    """
    require_suited(task, kind)
    _require_eos(tokenizer)
    if task.format == "text" or not task.splits["train"]:
        return
    with _placed(task, "train", 0):
        samples(tokenizer, conversation(task, task.splits["train"][0], tokenizer))


def conversation(task: Task, row: Row, tokenizer: Any) -> Conversation:
    """Return a row as the tokenizer's chat template reads it, with the answers that are learnt.

    Raises:
        DataError: the template cannot write what the row holds.
    """
    return conversation_of(row, messages(task, row), task.chat, tokenizer)


def messages(task: Task, row: Row) -> list[dict[str, Any]]:
    """Return a row as a conversation that ends in the answer."""
    if task.format == "messages":
        return list(row["messages"])
    found = [{"role": "system", "content": row["system"]}] if "system" in row else []
    for asked, reply in row.get("history", ()):
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return [*found, {"role": "user", "content": question(task, row)}, {"role": "assistant", "content": answer(row)}]


def question(task: Task, row: Row) -> str:
    """Return what a row with one answer asks."""
    if task.format == "prompt-completion":
        return str(row["prompt"])
    if task.format == "instruction":
        return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return "\n\n".join([task.instruction, *(row[part] for part in ("text", "text_a", "text_b") if part in row)])


@contextmanager
def _placed(task: Task, split: str, index: int) -> Iterator[None]:
    """Say of which row an error is."""
    try:
        yield
    except DataError as error:
        place = f"{task.name}, {split} row {index + 1}"
        raise DataError(f"{place}: {error}", code=error.code, field=error.field) from None


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token; a model would never stop", code="no_end_of_text", field="tokenizer"
        )


def _texts(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Return pieces that share one token, so that each token but the first is predicted exactly once."""
    examples = []
    for index, row in enumerate(rows):
        ids = (*token_ids(tokenizer, row["text"], special=True), tokenizer.eos_token_id)
        for start in range(0, len(ids) - 1, max_length - 1):
            piece = ids[start : start + max_length]
            examples.append(Example(index, piece, piece))
    if not examples:
        raise DataError(
            "every text is empty once it is tokenised; there is nothing to predict", code="missing_value", field="text"
        )
    return Encoded(examples=examples)


def cut_texts(tokenizer: Any, texts: Sequence[Any], max_length: int, **options: Any) -> tuple[Any, bool]:
    """Return texts as one input of at most `max_length` tokens; whether something was cut off."""
    full = len(tokenizer(*texts, verbose=False, **options)["input_ids"])
    cut = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False, **options)
    return cut, full > len(cut["input_ids"])
