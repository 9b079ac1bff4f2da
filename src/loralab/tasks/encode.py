"""Row -> numbers: token ids and label mask, template, end of text, truncation; or a picture.

The text up to the answer and the answer are tokenised separately, so training sees exactly the
ids that generation will see. The end-of-text token is always learnt, also where it doubles as
padding: labels are masked by position, never by id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loralab.errors import ConfigError, DataError, nearest, some
from loralab.tasks.catalog import LABELLED, Task
from loralab.tasks.formats import FORMATS, Row
from loralab.tasks.template import render

IGNORED = -100
Ids = tuple[int, ...]
OWN_KINDS = {"image-label": "image-classification", "tokens-tags": "token-classification",
             "pair": "sentence-encoder"}  # fmt: skip
SUITED: dict[str, tuple[str, ...]] = {  # kind of model -> formats that it learns from
    "causal-lm": tuple(form for form in FORMATS if form not in OWN_KINDS),
    "sequence-classification": LABELLED,
    **{kind: (form,) for form, kind in OWN_KINDS.items()},
}


@dataclass(frozen=True, slots=True)
class Example:
    """One row as numbers.

    `labels` are as long as `input_ids` for a causal model (unshifted) and for tags of words, -100
    where no loss is taken; for a classifier they are the one class index, for a pair the row
    itself. `token_types` tell the two texts of a classified pair apart, where the tokenizer does;
    `second` is the other text of a pair to encode; `words` are those that the labels of tags
    belong to, where they are not -100; `image` a picture (pictures.py), not decoded.
    """

    row: int
    input_ids: Ids
    labels: Ids
    token_types: Ids = ()
    second: Ids = ()
    words: Ids = ()
    image: Any = None

    @property
    def length(self) -> int:
        """Tokens of all texts; a picture counts as one."""
        return len(self.input_ids) + len(self.second) or 1


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples of a split; rows whose answer did not fit at all, or lost its end.

    `notes` say what else of the rows is not learnt, a line each.
    """

    examples: list[Example]
    dropped: Ids = ()
    shortened: Ids = ()
    notes: tuple[str, ...] = ()


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
    """The rows of a split as examples of at most `max_length` tokens; pictures as they are.

    A row whose answer does not fit at all is dropped, one whose answer does not fit whole is
    shortened; both are reported. Plain texts are cut into consecutive pieces instead.

    Raises:
        DataError: the format does not suit the model, or no row is left.
    """
    if max_length < 2 or loss_on not in ("answer", "all"):
        raise ConfigError(
            f"max_length must be at least 2, loss_on answer or all; got {max_length}, {loss_on!r}"
        )
    chosen = task.splits[split] if rows is None else rows
    require_suited(task, kind)
    if kind != "causal-lm":
        return _ENCODERS[kind](task, chosen, tokenizer, max_length)
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


def require_suited(task: Task, kind: str) -> None:
    """A kind of model learns from its own formats only.

    Raises:
        ConfigError: there is no such kind.
        DataError: the rows are of another format.
    """
    if kind not in SUITED:
        raise ConfigError(f"unknown kind of model {kind!r} ({some(SUITED)}){nearest(kind, SUITED)}")
    if task.format not in SUITED[kind]:
        columns = " or ".join(", ".join(FORMATS[form][0]) for form in SUITED[kind])
        hint = OWN_KINDS.get(task.format)
        remedy = f"; such rows are for {hint}" if hint else ""
        raise DataError(
            f"{task.name} has {task.format} rows ({', '.join(FORMATS[task.format][0])}); "
            f"{kind} needs {columns}{remedy}"
        )


def prompts(task: Task, split: str, tokenizer: Any) -> list[Ids]:
    """What the model sees of each row before it answers."""
    return [prompt_ids(task, row, tokenizer) for row in task.splits[split]]


def prompt_ids(task: Task, row: Row, tokenizer: Any) -> Ids:
    """What the model sees of one row before it answers: all of it, for a plain text."""
    if task.format == "text":
        return _ids(tokenizer, row["text"], special=True)
    return sum((segment.ids for segment in _segments(task, row, tokenizer)[:-1]), ())


def chat_ids(tokenizer: Any, prompt: str, *, system: str | None = None) -> Ids:
    """A question that is no row, as `generate` asks it."""
    first = [{"role": "system", "content": system}] if system else []
    return _opening(tokenizer, [*first, {"role": "user", "content": prompt}])


def conversation_ids(tokenizer: Any, turns: Sequence[dict[str, str]]) -> Ids:
    """The tokens of a conversation and the opening of its next answer, as training has them.

    Raises:
        DataError: the chat template refuses it.
    """
    if tokenizer.chat_template:
        return _opening(tokenizer, list(turns))
    # without a template an end of text stands behind every earlier answer
    whole = [*turns, {"role": "assistant", "content": ""}]
    return sum((segment.ids for segment in _earlier(tokenizer, whole)), ())


def answer(row: Row) -> str:
    """The reference answer of a row: tags are joined by spaces."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    if "tags" in row:
        return " ".join(row["tags"])
    columns = ("label", "completion", "output", "text_b")
    return str(next((row[c] for c in columns if c in row), ""))


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
    """Check on the first train row that an answer is written as it is, and ended, after its prompt.

    Raises:
        DataError: there is no end of text, or the template leaves the answer out or changes it.
    """
    require_suited(task, "causal-lm")
    _require_eos(tokenizer)
    if task.format == "text" or not task.splits["train"]:
        return
    row = task.splits["train"][0]
    chat = messages(task, row)
    if answer(row).strip() not in _remainder(tokenizer, chat):
        raise DataError(
            f"the chat template does not write the answer {answer(row)[:40]!r} as it is after its "
            "prompt; it cannot be learnt with this tokenizer"
        )


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
    last = Segment(_last_turn(tokenizer, chat), True)
    asked = _opening(tokenizer, chat[:-1])
    if sum(message["role"] == "assistant" for message in chat) == 1:
        return [Segment(asked, False), last]
    earlier = _earlier(tokenizer, chat)
    if tokenizer.chat_template and sum((s.ids for s in earlier), ()) != asked:
        # the template rewrites earlier turns: only the last one stands as generation will see it
        return [Segment(asked, False), last]
    return [*earlier, last]


def _opening(tokenizer: Any, chat: list[dict[str, str]]) -> Ids:
    """A conversation and the opening of its next answer, as one text."""
    return _ids(tokenizer, _template(tokenizer, chat, prompt=True), special=True)


def _earlier(tokenizer: Any, chat: list[dict[str, str]]) -> list[Segment]:
    """All before the last answer, piece by piece: prompt, answer, prompt, answer, prompt."""
    segments, written = [], ""
    for turn in (i for i, message in enumerate(chat) if message["role"] == "assistant"):
        prompt = _template(tokenizer, chat[:turn], prompt=True)
        new = _ids(tokenizer, prompt[len(written) :], special=not written)
        segments.append(Segment(new, False))
        if turn == len(chat) - 1:
            break
        text = _remainder(tokenizer, chat[: turn + 1])
        segments.append(Segment(_ended(tokenizer, text), True))
        written = prompt + (text.rstrip() if tokenizer.chat_template else text)
    return segments


def _last_turn(tokenizer: Any, chat: list[dict[str, str]]) -> Ids:
    """The last answer and its end."""
    return _ended(tokenizer, _remainder(tokenizer, chat))


def _remainder(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """What the template writes after the prompt of the last answer; else the answer alone."""
    if not tokenizer.chat_template:
        return chat[-1]["content"]
    prompt = _template(tokenizer, chat[:-1], prompt=True)
    whole = _template(tokenizer, chat)
    return whole[len(prompt) :] if whole.startswith(prompt) else chat[-1]["content"]


def _ended(tokenizer: Any, text: str) -> Ids:
    """The tokens of an answer up to its end of turn; the end of text if the template has none."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        named = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        added = tokenizer.added_tokens_decoder.items()
        ends |= named | {number for number, token in added if token.special}
        ids = _ids(tokenizer, text.rstrip())  # a line end after the end of turn is not learnt
        if ids and ids[-1] in ends:
            return ids
    ids = _ids(tokenizer, text)
    return ids if ids and ids[-1] in ends else (*ids, tokenizer.eos_token_id)


def _template(tokenizer: Any, chat: list[dict[str, str]], *, prompt: bool = False) -> str:
    """A conversation as text; `prompt` opens the next answer."""
    if not tokenizer.chat_template:
        return "".join(_open(message["content"]) for message in chat)
    try:
        template, tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map
        return render(template, chat, prompt=prompt, tokens=tokens)
    except Exception as error:  # jinja's own errors, and whatever a template raises
        start = chat[0]["content"][:40] if chat else ""
        raise DataError(f"the chat template refuses the row {start!r}: {error}") from None


def _open(text: str) -> str:
    """A plain prompt ends in white space, so that the answer begins a new token."""
    return text if text[-1:].isspace() else text + "\n"


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> Ids:
    """Tokens of a piece; `special` adds the tokenizer's own start, unless a template wrote it."""
    if not text:
        return ()
    special = special and not tokenizer.chat_template
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text; the answer follows here
    return tuple(ids)


def _require_eos(tokenizer: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; a model would never stop")


def _texts(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Pieces that share one token, so that each token but the first is predicted exactly once."""
    examples = []
    for index, row in enumerate(rows):
        ids = (*_ids(tokenizer, row["text"], special=True), tokenizer.eos_token_id)
        for start in range(0, len(ids) - 1, max_length - 1):
            piece = ids[start : start + max_length]
            examples.append(Example(index, piece, piece))
    if not examples:
        raise DataError("every text is empty once it is tokenised; there is nothing to predict")
    return Encoded(examples=examples)


def _classified(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    examples, shortened = [], []
    for index, row in enumerate(rows):
        texts = [row[c] for c in ("text", "text_a", "text_b") if c in row]
        cut, short = _cut(tokenizer, texts, max_length)
        if short:
            shortened.append(index)
        ids, types = cut["input_ids"], cut.get("token_type_ids") or ()
        label = (task.labels.index(row["label"]),)
        types = tuple(types) if any(types) else ()  # all 0 is what a model assumes
        examples.append(Example(index, tuple(ids), label, token_types=types))
    return Encoded(examples=examples, shortened=tuple(shortened))


def _cut(tokenizer: Any, texts: Sequence[Any], max_length: int, **options: Any) -> tuple[Any, bool]:
    """Texts as one input of at most `max_length` tokens; whether something was cut off."""
    full = len(tokenizer(*texts, verbose=False, **options)["input_ids"])
    cut = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False, **options)
    return cut, full > len(cut["input_ids"])


def _tagged(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """The tag of a word stands on its first piece."""
    numbers = {tag: index for index, tag in enumerate(task.labels)}
    examples, shortened = [], []
    for index, row in enumerate(rows):
        cut, short = _cut(tokenizer, [row["tokens"]], max_length, is_split_into_words=True)
        if short:
            shortened.append(index)
        words = [None, *cut.word_ids()]
        labels = tuple(
            IGNORED if word is None or word == before else numbers[row["tags"][word]]
            for before, word in pairwise(words)
        )
        kept = tuple(w for w, label in zip(cut.word_ids(), labels, strict=True) if label != IGNORED)
        examples.append(Example(index, tuple(cut["input_ids"]), labels, words=kept))
    return Encoded(examples=examples, shortened=tuple(shortened))


def _pairs(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Two texts that mean the same, each on its own."""
    examples, shortened = [], []
    for index, row in enumerate(rows):
        texts = [_cut(tokenizer, [row[column]], max_length) for column in ("text_a", "text_b")]
        if any(short for _, short in texts):
            shortened.append(index)
        first, second = (tuple(cut["input_ids"]) for cut, _ in texts)
        examples.append(Example(index, first, (index,), second=second))
    return Encoded(examples=examples, shortened=tuple(shortened))


def _pictured(task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    numbers = {label: index for index, label in enumerate(task.labels)}
    return Encoded(
        examples=[
            Example(index, (), (numbers[row["label"]],), image=row["image"])
            for index, row in enumerate(rows)
        ]
    )


_ENCODERS = {
    "sequence-classification": _classified, "token-classification": _tagged,
    "sentence-encoder": _pairs, "image-classification": _pictured,
}  # fmt: skip
