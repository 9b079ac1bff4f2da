"""Messages of a study as data: a key of the catalogues and the values that it speaks of.

Standard library only. Nothing here is English or Chinese: messages/*.toml are, and wording.py joins the two.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, init=False)
class Message:
    """A sentence or term of the catalogues, such as Message("rank.cut", arm="r=64", rank=8).

    Values are numbers as they were measured (the catalogue says how they are written), names,
    other messages, or sequences of these.
    """

    key: str
    values: Mapping[str, Any]

    def __init__(self, key: str, /, **values: Any) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "values", values)

    def __hash__(self) -> int:
        return hash((self.key, repr(self.values)))


def sentences(*parts: Message | None) -> Message:
    """Join sentences, each language in its own way; those that are None are left out."""
    return Message("join.sentences", parts=present(parts))


def numbered(parts: Iterable[Message | None]) -> Message:
    """Join sentences that are numbered from 1."""
    return sentences(*(Message("join.numbered", number=n, part=part) for n, part in enumerate(present(parts), 1)))


def clauses(parts: Iterable[Message | None]) -> Message:
    """Join parts of one sentence."""
    return Message("join.clauses", parts=present(parts))


def names(found: Iterable[Any]) -> Message:
    """Join names: "a, b and c"."""
    return Message("join.names", parts=list(found))


def present(parts: Iterable[Message | None]) -> list[Message]:
    """Return the messages that are there."""
    return [part for part in parts if part is not None]


@dataclass(frozen=True)
class Column:
    """A column of a table: the name of its values in each row, and how they are written.

    Attributes:
        format: one of wording.FORMATS, or a format of Python's.
        label: the heading; None is the catalogue's "column.<name>".
    """

    name: str
    format: str = ""
    label: Message | None = None

    @property
    def heading(self) -> Message:
        """Return the heading."""
        return self.label or Message(f"column.{self.name}")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of values under their columns; a value that a row lacks is shown as a dash."""

    title: Message
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]


def table(title: Message | str, rows: Sequence[Mapping[str, Any]], *shown: Column | str) -> Table:
    """Return a table; a column may be given as "name", "name:format" or "name:format:key of its heading"."""
    columns = [_column(*spec.split(":")) if isinstance(spec, str) else spec for spec in shown]
    return Table(title=_message(title), columns=columns, rows=rows)


def _column(name: str, format: str = "", heading: str = "") -> Column:
    return Column(name, format, Message(heading) if heading else None)


def _message(text: Message | str) -> Message:
    return Message(text) if isinstance(text, str) else text


@dataclass(frozen=True)
class Chart:
    """A chart as data; figures.py draws it.

    Attributes:
        kind: one of figures.KINDS.
        name: of its file.
        rows: what is drawn; each kind says which keys it needs.
        x, y: titles of the axes.
        by: title of the legend, where lines or bars belong to several.
        options: of the kind, such as log, percent or chance.
    """

    kind: str
    name: str
    title: Message
    rows: Sequence[Mapping[str, Any]]
    x: Message
    y: Message
    by: Message | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def chart(
    kind: str,
    name: str,
    title: Message | str,
    rows: Sequence[Mapping[str, Any]],
    x: Message | str,
    y: Message | str,
    by: Message | str | None = None,
    **options: Any,
) -> Chart:
    """Return a chart whose titles are messages, or the keys of messages that speak of no values."""
    legend = None if by is None else _message(by)
    return Chart(kind, name, _message(title), rows, _message(x), _message(y), legend, options)


def points(curves: Mapping[Any, Mapping[Any, float] | Sequence[float]]) -> list[dict[str, Any]]:
    """Return the rows of a chart of lines, from each arm's values by x, or at 1, 2, 3 and so on."""
    pairs = {arm: own.items() if isinstance(own, Mapping) else enumerate(own, 1) for arm, own in curves.items()}
    return [{"arm": arm, "x": x, "y": y} for arm, own in pairs.items() for x, y in own]
