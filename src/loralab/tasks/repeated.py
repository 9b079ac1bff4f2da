"""Inputs that stand in several rows: with different labels, or on two sides of a split."""

import json
from collections.abc import Mapping, Sequence

from loralab.errors import join_limited, one_line
from loralab.tasks.formats import Row

ANSWERS = ("label", "labels", "score", "completion", "output", "tags", "passage", "positive", "negative")
LEARNT = ("label", "labels", "score", "tags")
SHOWN = 60  # characters of an input that a note shows
Splits = Mapping[str, Sequence[Row]]


def input_text(row: Row) -> str:
    """Return what a row asks, without the answer."""
    if "messages" in row:
        tools = "\x1f" + json.dumps(row["tools"], ensure_ascii=False) if "tools" in row else ""
        return json.dumps(row["messages"][:-1], ensure_ascii=False) + tools + _pictures(row)
    shown = [str(value) for column, value in row.items() if column not in (*ANSWERS, "images")]
    return "\x1f".join(shown) + _pictures(row)


def _pictures(row: Row) -> str:
    return "".join(f"\x1f{picture}" for picture in row.get("images", ()))


def leaks(splits: Splits) -> dict[str, list[str]]:
    """Return the inputs of the other splits' rows that are also a train row's, by split."""
    learnt = {input_text(row) for row in splits["train"]}
    asked = {name: map(input_text, rows) for name, rows in splits.items() if name != "train"}
    return {name: [text for text in texts if text in learnt] for name, texts in asked.items()}


def repetitions(splits: Splits, leaked: Mapping[str, Sequence[str]]) -> list[str]:
    """Return notes that name inputs with several labels, and inputs that leak out of train."""
    notes = [
        f"{len(texts)} of {len(splits[name])} {name} rows have the input of a train row, such as {_shown(texts[0])}"
        for name, texts in leaked.items()
        if texts
    ]
    labels: dict[str, dict[str, None]] = {}
    for rows in splits.values():
        for row in rows:
            if (label := next((row[c] for c in LEARNT if c in row and "query" not in row), None)) is not None:
                labels.setdefault(input_text(row), {})[str(label)] = None
    several = {text: found for text, found in labels.items() if len(found) > 1}
    if several:
        text, found = next(iter(several.items()))
        notes.append(
            f"inputs with several labels, of which one at most can be learnt: {len(several)}, "
            f"such as {_shown(text)}: {join_limited(map(repr, found))}"
        )
    return notes


def _shown(text: str) -> str:
    """Return an input as a note quotes it, its beginning alone."""
    plain = text.replace("\x1f", " | ")
    return repr(one_line(plain[:SHOWN] + "…" * (len(plain) > SHOWN)))
