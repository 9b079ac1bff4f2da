"""Fields beside those that are read: without effect, or changing what the row means.

A kind of field is known by the words of its name. It is harmless where all its values ask for what
is done anyway: nothing, a weight of 1, "learn this". Otherwise it is refused, since training
without it would teach something else than the data says.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from loralab.tasks.formats import is_empty

MESSAGE_FIELD = "a field of a message"
MARK_FIELDS = ("train", "training", "learn", "loss", "loss_mask", "weight")  # of an answer: whether it is learnt
MARKS = {"0": False, "false": False, "1": True, "true": True}
WITHOUT_ANSWER = ("text", "pair")  # without an answer: any other column may be it
AMOUNTS = ("text-score", "pair-score", "query-passage", "query-candidates")
LABELLED = ("text-label", "pair-label", "image-label", "tokens-tags", "text-labels", "pair-labels", *AMOUNTS)
ROWS_THAT_ANSWER = ("messages", "prompt-completion", "instruction")
GENERATIVE = (*ROWS_THAT_ANSWER, MESSAGE_FIELD)
TEXTS = ("text-label", "pair-label", "text-labels", "pair-labels", "text-score", "pair-score")
PROMPTED = (*ROWS_THAT_ANSWER, *TEXTS)


@dataclass(frozen=True, kw_only=True)
class ColumnKind:
    """Fields that change the meaning of a row.

    Args:
        words: of a name that is of this kind, one of them; a whole name goes before its words.
        reason: why the field is refused, after its name.
        formats: that the kind matters to.
        neutral: values, in small letters, that ask for nothing else than what is done.
        learnt: whether it is about learning, and so without effect on what is never learnt.
        canonical: the column that such a field is read as, if it is mapped to it.
    """

    words: str
    reason: str
    formats: tuple[str, ...] = (*GENERATIVE, *LABELLED, *WITHOUT_ANSWER)
    neutral: tuple[str, ...] = ()
    learnt: bool = False
    canonical: str = ""


MEDIA = "image images picture pictures photo photos pixel audio audios speech video videos"
MEDIA += " attachment attachments"
COLUMN_KINDS = (
    ColumnKind(
        words="tools functions",
        canonical="tools",
        reason="tells of tools, which are read from a column tools beside an answer",
    ),
    ColumnKind(
        words="tool toolcalls function",
        reason="tells of calls of tools, which are read from tool_calls of an assistant's message",
    ),
    ColumnKind(
        words="reasoning reason thinking think thought thoughts rationale cot scratchpad monologue",
        formats=GENERATIVE,
        reason="holds reasoning, which is read from reasoning_content of an assistant's message",
    ),
    ColumnKind(
        words="finish_reason stop_reason",
        formats=GENERATIVE,
        neutral=("stop", "end_turn", "stop_sequence", "eos"),
        reason="says that the answer was cut off, and it would be learnt with an end",
    ),
    ColumnKind(
        words="prefix partial truncated",
        formats=(MESSAGE_FIELD,),
        neutral=("0", "false"),
        reason="says that the answer is not whole, and it would be learnt with an end",
    ),
    ColumnKind(
        words="end_turn",
        formats=(MESSAGE_FIELD,),
        neutral=("1", "true"),
        reason="says that the turn goes on, and every answer is learnt with its end",
    ),
    ColumnKind(
        words="channel recipient",
        formats=(MESSAGE_FIELD,),
        neutral=("final", "all"),
        reason="says that the message is not an answer, which is not supported yet",
    ),
    ColumnKind(
        words="chat_template chat_template_kwargs",
        formats=PROMPTED,
        reason="says how to write the row, and every row is written with the model's template",
    ),
    ColumnKind(
        words="weight weights",
        neutral=("1", "true"),
        learnt=True,
        reason="weighs what is learnt, and answers of a chat can be marked with 0 or 1 alone",
    ),
    ColumnKind(
        words="mask masked ignore ignored skip exclude excluded deleted discard discarded drop "
        "dropped removed invalid undesirable",
        neutral=("0", "false"),
        learnt=True,
        reason="says what to leave unlearnt, which is read from train, learn, loss or weight of a message",
    ),
    ColumnKind(
        words="train training trainable learn loss keep kept include included valid",
        neutral=("1", "true"),
        learnt=True,
        reason="says whether to learn this, which is read from an assistant's message",
    ),
    ColumnKind(words=MEDIA, reason="holds more than text, which is not supported yet beside other columns"),
    ColumnKind(
        words="chosen rejected preferred dispreferred preference",
        reason="tells better answers from worse ones; preferences cannot be learnt",
    ),
    ColumnKind(
        words="label labels score scores reward rewards rating ratings correct accepted approved "
        "desirable thumbs stars grade grades verdict votes upvotes passed",
        formats=GENERATIVE,
        neutral=("true",),
        reason="judges the answers, which would all be learnt as if they were good",
    ),
    ColumnKind(
        words="score scores label labels",
        formats=LABELLED,
        reason="stands beside what is learnt, and would not be learnt",
    ),
    ColumnKind(
        words="system sys sysprompt preamble",
        formats=(*PROMPTED, *WITHOUT_ANSWER),
        canonical="system",
        reason="is a system prompt, which is read from the column system, or as a message of that role",
    ),
    ColumnKind(
        words="developer instructions",
        formats=ROWS_THAT_ANSWER,
        canonical="system",
        reason="tells how to answer, which is read from the column system, or as a message of that role",
    ),
    ColumnKind(
        words="history previous",
        formats=("prompt-completion", "instruction"),
        canonical="history",
        reason="is a part of the question, and is read from the column history, as pairs of question and answer",
    ),
    ColumnKind(
        words="history previous context contexts passage passages document documents choices options",
        formats=(*PROMPTED, MESSAGE_FIELD),
        reason="is a part of the question, which would be asked without it",
    ),
    ColumnKind(
        words="input inputs instruction",
        formats=("prompt-completion", *TEXTS),
        reason="is a part of the question, which would be asked without it",
    ),
    ColumnKind(
        words="question query text_a text_b text2 text_2 sentence2 sentence_2",
        formats=("text-label", "text-labels", "text-score"),
        reason="is another text, and one is read beside a label; two are text_a and text_b",
    ),
)


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


PLACES = word_set("url urls uri path file filename")
IDENTIFIERS = word_set("id ids idx index uuid guid")
BOOKKEEPING = PLACES | IDENTIFIERS
BOOKKEEPING |= word_set("link links source sources src origin dataset date dates time timestamp")
BOOKKEEPING |= word_set("datetime created updated hash md5 sha sha1 sha256 checksum digest license")
BOOKKEEPING |= word_set("licence version row line lineno meta metadata length len count")
WHOLE_NAMES = word_set("num_tokens n_tokens num_chars n_chars num_tools n_tools tool_choice parallel_tool_calls")
OF_TOOLS = re.compile(r"unnamed: \d+|(__)?index_level_\d+(__)?")  # an index that pandas writes
CLASSES = word_set("label class category topic intent target sentiment emotion")
MIN_REPEATED_ROWS = 10  # rows, from which on equal identifiers are a sign that they are classes


def reason_to_refuse(name: str, values: Iterable[Any], form: str, *, learnt: bool = True) -> str:
    """Say why a field that is not read would change the meaning of the rows; "" if it would not.

    Args:
        name: the field's.
        values: all that it has.
        form: the format of the rows, or `MESSAGE_FIELD`.
        learnt: whether it stands beside something that is learnt.
    """
    kinds = kinds_of(name, form)
    if not kinds:
        return ""
    fine = set(kinds[0].neutral).intersection(*(kind.neutral for kind in kinds))
    if not learnt and all(kind.learnt for kind in kinds):
        fine = {"0", "1", "false", "true"}
    return "" if all(is_empty(v) or _small(v) in fine for v in values) else kinds[0].reason


def canonical_of(name: str, form: str) -> str:
    """Return the column that a field of rows could be read as; "" if none."""
    return next((kind.canonical for kind in kinds_of(name, form) if kind.canonical), "")


@lru_cache(maxsize=1024)  # asked for every field of every message
def kinds_of(name: str, form: str) -> tuple[ColumnKind, ...]:
    """Return the kinds that a field is of, beside such rows; `loss_mask` is of two that contradict."""
    words = words_of(name)
    if _keeps_books(words) and not (word_set(MEDIA) & set(words) and words[-1] in PLACES):
        return ()
    able = [kind for kind in COLUMN_KINDS if form in kind.formats]
    whole = tuple(kind for kind in able if "_".join(words) in word_set(kind.words))
    return whole or tuple(kind for kind in able if word_set(kind.words) & set(words))


def is_bookkeeping(name: str, values: Sequence[Any]) -> bool:
    """Tell if a column beside a text alone is an identifier, a source, a date and the like.

    Identifiers that are the same in many rows are not: they may be classes.
    """
    words = words_of(name)
    if OF_TOOLS.fullmatch(name.lower()):
        numbers = [_small(value) for value in values]
        return len(set(numbers)) == len(numbers) and all(map(str.isdigit, numbers))
    if len(words) > 1 and words[-1] in IDENTIFIERS:
        few = len(values) >= MIN_REPEATED_ROWS and len(set(map(_small, values))) * 2 < len(values)
        return not few and not CLASSES & set(words)
    return _keeps_books(words)


def mark_of(value: Any) -> bool | None:
    """Return whether a mark says to learn an answer; None if it says something between."""
    return MARKS.get(_small(value))


def are_truths(values: Iterable[Any]) -> bool:
    """Tell if values are true in some rows and false in others."""
    different = {_small(value) for value in values}
    return len(different) > 1 and different <= {"0", "1", "false", "true"}


def words_of(name: str) -> list[str]:
    """Return the words of a name, in small letters: "toolCalls" -> tool, calls."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return [word for word in re.split(r"[\W_]+", apart.lower()) if word]


def _keeps_books(words: Sequence[str]) -> bool:
    if not words:
        return False
    return (
        words[-1] in BOOKKEEPING
        or "_".join(words) in WHOLE_NAMES
        or (len(words) == 2 and words[-1] == "at")  # created_at
    )


def _small(value: Any) -> str:
    """Return a value as it is compared: 1.0 is 1, TRUE is true."""
    if isinstance(value, dict | list):
        return "..."  # may be nested too deep to be written
    return str(value).strip().lower().removesuffix(".0")
