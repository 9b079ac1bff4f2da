"""One spelling for each label, and no numbers that are amounts.

Files differ in how they write the same label: 0 and 0.0, true and True. Labels are compared over
all splits of a source, so that a class does not come apart.
"""

import re
from collections.abc import Iterable, Mapping

from loralab.errors import DataError, join_limited
from loralab.tasks.formats import Row

NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.0+)?")  # not 007, which is a name
AS_SCORE = "say --map score={} to learn them as numbers (regression)"
ABSENT = ("nan", "none", "null", "n/a", "na", "<na>", "?")
TRUTHS = {"false": "0", "true": "1"}
MAX_UNQUESTIONED_CLASSES = 20  # classes that are numbers, without a question
ROWS_EACH = 20  # of such classes, where there are more
MIN_FILLED_SHARE = 0.5  # of the numbers from the least to the greatest, where they count classes


def settled(source: str, splits: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Return the rows with one spelling for each label.

    Raises:
        DataError: the labels are amounts, which are not classes.
    """
    rows = [row for part in splits.values() for row in part if "label" in row]
    labels = sorted({row["label"] for row in rows})
    _require_classes(source, labels, len(rows))
    spelt = _spellings(labels)
    if not spelt:
        return dict(splits)
    return {
        split: [{**row, "label": spelt.get(row["label"], row["label"])} if "label" in row else row for row in part]
        for split, part in splits.items()
    }


def alike(splits: Mapping[str, list[Row]]) -> str:
    """Return a note that names labels that seem to be one class; "" if none do.

    They differ in small and capital letters alone, or are truth values beside 0 and 1.
    """
    labels = {row["label"] for part in splits.values() for row in part if "label" in row}
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        folded = label.casefold()
        groups.setdefault(TRUTHS.get(folded, folded), []).append(label)
    pairs = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return f"labels that are written alike and stay two classes: {join_limited(pairs)}" if pairs else ""


def absent(splits: Mapping[str, list[Row]]) -> str:
    """Return a note that names classes that may stand for a missing label; "" if none do."""
    labels = {row["label"] for part in splits.values() for row in part if "label" in row}
    names = [repr(label) for label in sorted(labels) if label.casefold() in ABSENT]
    return f"classes that may stand for a missing label: {join_limited(names)}" if names else ""


def amount(value: object) -> float | None:
    """Return the number that a value is or spells; truth values are none."""
    if isinstance(value, bool):
        return None
    text = str(value).strip()
    if not isinstance(value, int | float) and not NUMBER.fullmatch(text):
        return None
    try:
        return float(text.replace(",", "."))
    except (ValueError, OverflowError):
        return None


def _spellings(labels: Iterable[str]) -> dict[str, str]:
    """Describe how to write those labels that have more than one spelling."""
    known = set(labels)
    if known and all(WHOLE_NUMBER.fullmatch(label) for label in known):
        wanted = {label: _whole(label) for label in known}
    else:
        bare = {label for label in known if WHOLE_NUMBER.fullmatch(label) and label == _whole(label)}
        wanted = {label: _whole(label) for label in known if WHOLE_NUMBER.fullmatch(label) and _whole(label) in bare}
    truths = {label for label in known if label.lower() in ("true", "false")}
    if len({(label.islower(), label.isupper()) for label in truths}) > 1:
        wanted |= {label: label.capitalize() for label in truths}  # as JSON's true is written
    return {label: new for label, new in wanted.items() if label != new}


def _whole(label: str) -> str:
    """Return a whole number without its decimals: "1" for "1.0"."""
    return "0" if float(label) == 0 else label.partition(".")[0]


def _require_classes(source: str, labels: list[str], rows: int) -> None:
    numbers = {label: number for label in labels if (number := amount(label)) is not None}
    fractions = [label for label, number in numbers.items() if not number.is_integer()]
    if fractions and 2 * len(numbers) > len(labels):
        others = [repr(label) for label in labels if label not in numbers]
        beside = f", beside labels that are none ({join_limited(others, 3)})" if others else ""
        raise DataError(
            f"{source}: the label {fractions[0]!r} is a number that is not whole{beside}; if it is a name, write one "
            f"such as {'v' + fractions[0]!r}",
            code="label_is_a_number",
            field="label",
        )
    if len(labels) <= MAX_UNQUESTIONED_CLASSES or not all(map(WHOLE_NUMBER.fullmatch, labels)):
        return
    span = max(numbers.values()) - min(numbers.values()) + 1
    if len(labels) < MIN_FILLED_SHARE * span or rows < ROWS_EACH * len(labels):
        raise DataError(
            f"{source}: {len(labels)} different numbers are the labels of {rows} rows; "
            f"{AS_SCORE.format('label')}, or if they are classes, write names such as {'class ' + labels[0]!r}",
            code="label_is_a_number",
            field="label",
        )
