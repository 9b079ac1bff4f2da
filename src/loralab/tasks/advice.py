"""Options to type: which columns could be which, as a sample of their values allows.

Nothing is read by these guesses; they are only proposed, in an error.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

from loralab.tasks.beside import MEDIA, PLACES, word_set, words_of
from loralab.tasks.formats import FORMATS, Numbered, is_conversation, is_empty
from loralab.tasks.labels import amount
from loralab.values import is_joinable, join_pairs

SAMPLED_ROWS = 1000  # rows
MAX_CLASS_VALUES = 20  # values, that any column of classes may have
MAX_LABEL_LENGTH = 60  # characters on average
ANSWERS = word_set("answer answers response responses output outputs completion target summary")
ANSWERS |= word_set("reply ref reference translation solution highlights chosen")
QUESTIONS = word_set("prompt question query input instruction source")
FORMATS_BY_PREFERENCE = ("messages", "tokens-tags", "text-label", "prompt-completion", "pair", "text")
KIND_OF = {"messages": "conversation", "tokens": "list", "tags": "list", "labels": "list"}
CHOSEN_FIRST = ("label", "completion", "output")  # the answer, before what is left is the question


@dataclass(frozen=True)
class Profile:
    """The kind of values that a column has.

    `kind` is conversation, list, text, number (whole), amount (not whole), class (texts and numbers,
    truth values), or other.
    """

    name: str
    kind: str
    different: int
    filled: int
    length: float

    @property
    def may_be_label(self) -> bool:
        few = self.different <= max(MAX_CLASS_VALUES, self.filled // 2)
        return self.kind in ("text", "number", "class") and few and self.length <= MAX_LABEL_LENGTH

    @property
    def may_be_text(self) -> bool:
        return self.kind == "text"


def profile(name: str, rows: Numbered) -> Profile:
    """Look at the first rows of a column."""
    values = [v for _, row in rows[:SAMPLED_ROWS] if not is_empty(v := row.get(name))]
    scalars = {str(v) for v in values if isinstance(v, str | int | float)}
    length = sum(map(len, scalars)) / max(1, len(scalars))
    return Profile(name, _kind(values), len(scalars), len(values), length)


def _kind(values: Sequence[Any]) -> str:
    if values and all(map(is_conversation, values)):
        return "conversation"
    if values and all(isinstance(value, list) for value in values):
        plain = all(isinstance(one, str | int) for value in values for one in value)
        return "list" if plain else "other"
    if not values or not all(isinstance(value, str | int | float) for value in values):
        return "other"
    amounts = [number for value in values if (number := amount(value)) is not None]
    if len(amounts) == len(values):
        return "number" if all(number.is_integer() for number in amounts) else "amount"
    return "text" if all(isinstance(value, str) for value in values) else "class"


def mapping_option(mapping: Mapping[str, str]) -> str:
    """Return the mapping as one option to type, or as Python where a name in it cannot be typed."""
    pairs = {name: own for name, own in mapping.items() if own and name != own}
    pairs |= {name: own for name, own in mapping.items() if not own}
    if all(is_joinable(name) for pair in pairs.items() for name in pair if name):
        return f"--map {quote(join_pairs(pairs))}"
    return f"mapping={pairs!r} in Python"


def without_columns(mapping: Mapping[str, str], columns: Iterable[str]) -> dict[str, str]:
    """Return the mapping that leaves some columns out as well."""
    left_out = dict.fromkeys(columns, "")
    return {name: own for name, own in mapping.items() if own not in left_out} | left_out


def answers_beside(mapping: Mapping[str, str], texts: Mapping[str, str], other: Profile) -> str:
    """Describe how a column could be the answer to a text, or to a pair of texts, that has none.

    Args:
        mapping: what the user has typed already.
        texts: canonical column -> the source's own.
    """
    ways = []
    if other.may_be_label:
        typed = mapping_option({**mapping, "label": other.name})
        ways.append(f"{typed} if {other.name!r} is the label")
    if other.kind in ("amount", "number"):
        typed = mapping_option({**mapping, "score": other.name})
        ways.append(f"{typed} if {other.name!r} is a number to learn")
    if other.may_be_text and "text" in texts:
        rest = {name: own for name, own in mapping.items() if name != "text"}
        first, last = (texts["text"], other.name)
        if QUESTIONS & set(words_of(other.name)[-1:]):
            first, last = last, first
        typed = mapping_option({**rest, "prompt": first, "completion": last})
        ways.append(f"{typed} if {last!r} is the answer to {first!r}")
    return " or ".join(ways)


def mappings_for(
    mapping: Mapping[str, str], known: Mapping[str, str], free: Sequence[Profile]
) -> Iterator[dict[str, str]]:
    """Yield mappings that make a format of the columns, the likelier ones first.

    Args:
        mapping: what the user has typed already.
        known: canonical column -> the source's own, where it is there.
        free: the other columns.
    """
    begun = [form for form, (needed, _) in FORMATS.items() if known.keys() & set(needed)]
    whole = sorted(FORMATS_BY_PREFERENCE, key=lambda form: form != "prompt-completion" or not _answers(free))
    for forms in (begun, whole):
        found = [{**mapping, **assigned} for f in forms if (assigned := _assigned(f, known, free))]
        yield from found
        if found:
            return


def _answers(free: Sequence[Profile]) -> bool:
    return any(ANSWERS & set(words_of(other.name)) for other in free)


def _assigned(form: str, known: Mapping[str, str], free: Sequence[Profile]) -> dict[str, str]:
    """Return a column for each that the format lacks, none where one cannot be had."""
    needed, _ = FORMATS[form]
    missing = [column for column in needed if column not in known]
    taken = {known[column] for column in needed if column in known}
    found: dict[str, str] = {}
    for column in sorted(missing, key=lambda name: name not in CHOSEN_FIRST):
        fitting = [p for p in free if p.name not in taken and _fits(column, p)]
        if not fitting:
            return {}
        found[column] = min(fitting, key=lambda other: _distance(column, other)).name
        taken.add(found[column])
    return {column: found[column] for column in missing}


def _fits(column: str, other: Profile) -> bool:
    if column == "label":
        return other.may_be_label
    if column == "score":
        return other.kind == "amount"
    if column in KIND_OF:
        return other.kind == KIND_OF[column]
    words = words_of(other.name)
    pictured = word_set(MEDIA) & set(words) and words[-1] in word_set(MEDIA) | PLACES
    return bool(pictured) if column == "image" else other.may_be_text and not pictured


def _distance(column: str, other: Profile) -> tuple[bool, float]:
    """Return how badly a column fits: labels are few and short, answers are named so, inputs are long."""
    answer = bool(ANSWERS & set(words_of(other.name)))
    if column == "label":
        return False, other.different + other.length
    if column in CHOSEN_FIRST:
        return not answer, 0
    return answer, 0
