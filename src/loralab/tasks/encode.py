"""Row -> token ids and label mask: template, end of text, truncation.

The text up to the answer and the answer are tokenised separately, so training sees exactly the
ids that generation will see. The end-of-text token is always learnt, also where it doubles as
padding: labels are masked by position, never by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loralab.errors import ConfigError, DataError, some
from loralab.tasks.catalog import LABELLED, Task
from loralab.tasks.read import Row

IGNORED = -100
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as numbers.

    `labels` are as long as `input_ids` for a causal model, unshifted, -100 where no loss is
    taken; for a classifier they are the one class index.
    """

    row: int
    input_ids: Ids
    labels: Ids


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples of a split; rows whose answer did not fit at all, or lost its end."""

    examples: list[Example]
    dropped: Ids = ()
    shortened: Ids = ()


@dataclass(frozen=True)
class Segment:
    """A run of tokens that carries loss, or does not."""

    ids: Ids
    learnt: bool


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
    """The rows of a split as examples of at most `max_length` tokens.

    A row whose answer does not fit at all is dropped, one whose answer does not fit whole is
    shortened; both are reported. Plain texts are cut into consecutive pieces instead.

    Raises:
        DataError: the format does not suit the model, or no row is left.
    """
    chosen = task.splits[split] if rows is None else rows
    if kind == "sequence-classification":
        return _classified(task, chosen, tokenizer, max_length)
    if kind != "causal-lm":
        raise ConfigError(f"unknown kind of model {kind!r}")
    _require_eos(tokenizer)
    if task.format == "text":
        return _texts(chosen, tokenizer, max_length)
    examples, dropped, shortened, longest = [], [], [], 0
    for index, row in enumerate(chosen):
        segments = _segments(task, row, tokenizer)
        ids = sum((s.ids for s in segments), ())
        labels = sum((s.ids if s.learnt else (IGNORED,) * len(s.ids) for s in segments), ())
        longest = max(longest, len(ids))
        if all(label == IGNORED for label in labels[1:max_length]):
            dropped.append(index)
            continue
        if len(ids) > max_length:
            shortened.append(index)
        labels = ids if loss_on == "all" else labels
        examples.append(Example(index, ids[:max_length], labels[:max_length]))
    if not examples:
        raise DataError(
            f"{task.name}: the answers of all {len(dropped)} {split} rows are cut off at "
            f"{max_length} tokens (rows {some((str(i + 1) for i in dropped), 5)}); "
            f"the longest needs --max-length {longest}"
        )
    return Encoded(examples=examples, dropped=tuple(dropped), shortened=tuple(shortened))


def prompts(task: Task, split: str, tokenizer: Any) -> list[Ids]:
    """What the model sees of each row before it answers."""
    return [prompt_ids(task, row, tokenizer) for row in task.splits[split]]


def prompt_ids(task: Task, row: Row, tokenizer: Any) -> Ids:
    """What the model sees of one row before it answers: all of it, for a plain text."""
    if task.format == "text":
        return _ids(tokenizer, row["text"], special=True)
    return _prompt(tokenizer, messages(task, row)[:-1])


def chat_ids(tokenizer: Any, prompt: str, *, system: str | None = None) -> Ids:
    """A question that is no row, as `generate` asks it."""
    first = [{"role": "system", "content": system}] if system else []
    return _prompt(tokenizer, [*first, {"role": "user", "content": prompt}])


def answer(row: Row) -> str:
    """The reference answer of a row."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    return str(next((row[c] for c in ("label", "completion", "output") if c in row), ""))


def answers(task: Task, split: str) -> list[str]:
    """The reference answers of a split."""
    return [answer(row) for row in task.splits[split]]


def answer_ids(task: Task, row: Row, tokenizer: Any, text: str) -> Ids:
    """The tokens of an answer as they stand after the row's prompt, end token included."""
    chat = [*messages(task, row)[:-1], {"role": "assistant", "content": text}]
    return _last_turn(tokenizer, chat)


def stop_ids(tokenizer: Any) -> Ids:
    """The ids that end an answer: the end of text, and the template's end of turn."""
    _require_eos(tokenizer)
    stops = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        stops.append(_last_turn(tokenizer, turn)[-1])
    return tuple(dict.fromkeys(stops))


def round_trip(task: Task, tokenizer: Any) -> None:
    """Check on the first train row that training and generation see the same prompt, and an end.

    Raises:
        DataError: the template changes the prompt once there is an answer, or nothing ends it.
    """
    _require_eos(tokenizer)
    if task.format == "text" or not task.splits["train"]:
        return
    row = task.splits["train"][0]
    prompt = prompt_ids(task, row, tokenizer)
    learnt = _segments(task, row, tokenizer)
    whole = sum((segment.ids for segment in learnt), ())
    if whole[: len(prompt)] != prompt and task.format != "messages":
        raise DataError(
            "the chat template writes another prompt in training than in generation; "
            "the adapter would be asked something it has never seen"
        )
    if learnt[-1].ids[-1] not in stop_ids(tokenizer):
        raise DataError(f"the answers end in token {learnt[-1].ids[-1]}, which stops no generation")


def messages(task: Task, row: Row) -> list[dict[str, str]]:
    """A row as a conversation that ends in the answer."""
    if task.format == "messages":
        return list(row["messages"])
    return [
        {"role": "user", "content": _question(task, row)},
        {"role": "assistant", "content": answer(row)},
    ]


def _question(task: Task, row: Row) -> str:
    if task.format == "prompt-completion":
        return str(row["prompt"])
    if task.format == "instruction":
        return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    parts = ("text",) if task.format == "text-label" else ("text_a", "text_b")
    return "\n\n".join([task.instruction, *(row[part] for part in parts)])


def _segments(task: Task, row: Row, tokenizer: Any) -> list[Segment]:
    """A conversation cut where loss begins and ends: after every prompt of the assistant."""
    chat = messages(task, row)
    turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    if len(turns) > 1 and not _stable(tokenizer, chat, turns):
        turns = turns[-1:]  # the template rewrites earlier turns: only the last is as asked
    segments, written = [], ""
    for turn in turns[:-1]:
        prompt = _template(tokenizer, chat[:turn], prompt=True)
        upto = _template(tokenizer, chat[: turn + 1])
        segments.append(Segment(_new_ids(tokenizer, prompt, written), False))
        segments.append(Segment(_answer_part(tokenizer, upto[len(prompt) :]), True))
        written = prompt + upto[len(prompt) :]
    last = _prompt(tokenizer, chat[:-1], written)
    return [*segments, Segment(last, False), Segment(_last_turn(tokenizer, chat), True)]


def _stable(tokenizer: Any, chat: list[dict[str, str]], turns: list[int]) -> bool:
    """Whether every prefix of the conversation is written the same with and without its rest."""
    if not tokenizer.chat_template:
        return True
    whole = _template(tokenizer, chat)
    return all(
        whole.startswith(_template(tokenizer, chat[:turn], prompt=True))
        and whole.startswith(_template(tokenizer, chat[: turn + 1]).rstrip())
        for turn in turns
    )


def _prompt(tokenizer: Any, chat: list[dict[str, str]], written: str = "") -> Ids:
    """The conversation so far and the opening of the answer, less what is already written."""
    return _new_ids(tokenizer, _template(tokenizer, chat, prompt=True), written)


def _new_ids(tokenizer: Any, text: str, written: str) -> Ids:
    special = not tokenizer.chat_template and not written
    return _ids(tokenizer, text[len(written) :], special=special)


def _last_turn(tokenizer: Any, chat: list[dict[str, str]]) -> Ids:
    """The last answer and its end."""
    if not tokenizer.chat_template:
        return _answer_part(tokenizer, chat[-1]["content"])
    prompt = _template(tokenizer, chat[:-1], prompt=True)
    whole = _template(tokenizer, chat)
    text = whole[len(prompt) :] if whole.startswith(prompt) else chat[-1]["content"]
    return _answer_part(tokenizer, text)


def _answer_part(tokenizer: Any, text: str) -> Ids:
    """The tokens of an answer up to its end of turn; the end of text if the template has none."""
    ids = _ids(tokenizer, text.rstrip("\n") if tokenizer.chat_template else text)
    special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
    if ids and ids[-1] in special:
        return ids
    return (*ids, tokenizer.eos_token_id)


def _template(tokenizer: Any, chat: list[dict[str, str]], *, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        text = "".join(_open(message["content"]) for message in chat)
        return text if prompt else text.removesuffix("\n")
    try:
        written = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # jinja's own errors, and whatever a template raises
        raise DataError(f"the chat template refuses a row: {error}") from None
    return str(written)


def _open(text: str) -> str:
    """A plain prompt ends in white space, so that the answer begins a new token."""
    return text if text[-1:].isspace() else text + "\n"


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> Ids:
    if not text:
        return ()
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; the answer follows here
    return tuple(ids)


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; a model would never stop")


def _texts(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    examples = []
    for index, row in enumerate(rows):
        ids = (*_ids(tokenizer, row["text"], special=True), tokenizer.eos_token_id)
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:
                examples.append(Example(index, piece, piece))
    if not examples:
        raise DataError("every text is a single token; there is nothing to predict")
    return Encoded(examples=examples)


def _classified(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    if task.format not in LABELLED:
        raise DataError(
            f"{task.name} has {task.format} rows; a classifier needs text, label or "
            "text_a, text_b, label"
        )
    examples, shortened = [], []
    for index, row in enumerate(rows):
        texts = [row[c] for c in ("text", "text_a", "text_b") if c in row]
        full = len(tokenizer(*texts, verbose=False)["input_ids"])
        ids = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)["input_ids"]
        if full > len(ids):
            shortened.append(index)
        examples.append(Example(index, tuple(ids), (task.labels.index(row["label"]),)))
    return Encoded(examples=examples, shortened=tuple(shortened))
