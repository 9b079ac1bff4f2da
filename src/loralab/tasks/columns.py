"""Decides which columns of a source are read, as what, and which have no effect.

A column is read if its name is canonical or `mapping` says so; mapping a column to nothing leaves
it out. Where another column could change what the rows mean, its meaning is asked for, never
guessed: a text with a column of unknown meaning beside it is not a plain text.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from loralab.errors import DataError, format_value, join_limited, nearest
from loralab.tasks.advice import answers_beside, mapping_option, mappings_for, profile, without_columns
from loralab.tasks.beside import (
    WITHOUT_ANSWER,
    are_truths,
    canonical_of,
    is_bookkeeping,
    kinds_of,
    reason_to_refuse,
    word_set,
    words_of,
)
from loralab.tasks.encodings import inner_name
from loralab.tasks.formats import FORMATS, IN_MESSAGES, SPLITS, DataPart, columns_of, is_conversation, is_empty
from loralab.tasks.label_shapes import LABEL, LABELS, SCORE, fits, reshaped

SPLIT = "split"
HELD_OUT = word_set("test testing val validation dev eval evaluation holdout held heldout")
SHAREGPT = "conversations"  # what it calls its messages
MAX_PROPOSALS = 3  # mappings in a message


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Reading of the rows of a part.

    Args:
        mapping: what the user has typed.
        own: canonical column -> the source's.
        unused: the other columns, in their order.
        required: the canonical columns that every row fills.
        split: the column that says which split a row belongs to.
    """

    mapping: Mapping[str, str]
    format: str
    own: Mapping[str, str]
    unused: tuple[str, ...]
    required: tuple[str, ...]
    split: str | None = None


def choose(part: DataPart, mapping: Mapping[str, str], shape: str = LABEL) -> Columns:
    """Decide what the columns of a part mean.

    Args:
        shape: what the column of labels holds in all parts (label_shapes.py).
        mapping: canonical column -> the source's own; a column, or `messages.` and a field of
            messages, -> "" to leave it out.

    Raises:
        DataError: they fit no format, a column's meaning is not clear, or is not supported.
    """
    columns = columns_of(part.rows)
    left_out = {name for name, own in mapping.items() if not own}
    renamed = {name: own for name, own in mapping.items() if own}
    _check_renamed(part.place, columns, renamed)
    free = [c for c in columns if c not in left_out and c not in renamed.values()]
    values = {c: [row.get(c) for _, row in part.rows] for c in free if c in (LABELS, SCORE)}
    known = {**{c: c for c in free if c not in renamed and fits(c, values.get(c, ()))}, **renamed}
    form = reshaped(_format(part, mapping, known, free), known, shape)
    if form == "messages" and "messages" not in known:
        known["messages"] = SHAREGPT
    required, optional = FORMATS[form]
    if form == "prompt-completion" and _are_lists(part, known):
        form, optional = "messages", FORMATS["messages"][1]
    own = {c: known[c] for c in (*required, *optional) if c in known}
    own = {c: column for c, column in own.items() if c in (*required, *renamed) or _says_something(part, column)}
    if idle := sorted(renamed.keys() - own.keys() - {SPLIT}):
        typed = f"--map {idle[0]}={renamed[idle[0]]}"
        raise DataError(
            f"{part.place} holds {form} rows ({', '.join(own)}); {typed} would have no effect",
            code="no_effect",
            field=idle[0],
        )
    split = _split_column(part, mapping, known)
    beside = [c for c in free if c not in own.values() and c not in renamed and c != split]
    if split is None and not mapping.get(SPLIT):
        _check_splits(part, mapping, beside)
    _check_beside(part, mapping, form, own, beside)
    read = {*own.values(), split}
    unused = tuple(c for c in columns if c not in read)
    return Columns(mapping=mapping, format=form, own=own, split=split, unused=unused, required=required)


def _says_something(part: DataPart, column: str) -> bool:
    return any(not is_empty(row.get(column)) for _, row in part.rows)


def _are_lists(part: DataPart, known: Mapping[str, str]) -> bool:
    """Tell if prompts or completions are lists of messages, as trl has them."""
    values = [row.get(known[column]) for _, row in part.rows for column in ("prompt", "completion")]
    return any(map(is_conversation, values))


def require_columns(source: str, parts: Iterable[DataPart], mapping: Mapping[str, str]) -> None:
    """Check that every column that `mapping` leaves out is there.

    Raises:
        DataError: no part has a column of such a name.
    """
    names = dict.fromkeys(name for part in parts for name in columns_of(part.rows))
    for name, own in mapping.items():
        if not own and name not in names and not name.startswith(IN_MESSAGES):
            raise _not_there(source, name, names)


def require_fields(source: str, parts: Iterable[DataPart], seen: Collection[str], mapping: Mapping[str, str]) -> None:
    """Check that every field of messages that `mapping` leaves out is there.

    Args:
        seen: all fields that messages have beside role and content.

    Raises:
        DataError: no message has such a field.
    """
    fields = {IN_MESSAGES + name: None for name in sorted(seen)}
    columns = {name for part in parts for name in columns_of(part.rows)}
    for name in mapping:
        if name.startswith(IN_MESSAGES) and name not in fields and name not in columns:
            raise _not_there(source, name, fields)


def _not_there(source: str, name: str, names: Mapping[str, None]) -> DataError:
    return DataError(
        f"{source} has no {name!r} to leave out ({join_limited(names) or 'nothing else'}){nearest(name, names)}",
        code="unknown_column",
        field=name,
    )


def checked_mapping(mapping: Mapping[str, str] | None) -> dict[str, str]:
    """Return the mapping, whose left sides are canonical where its right sides are not empty.

    Raises:
        DataError: it is not of this form.
    """
    known = sorted({SPLIT, *(c for columns in FORMATS.values() for c in chain(*columns))})
    found = dict(mapping or {})
    for canonical, own in found.items():
        if not isinstance(canonical, str) or not isinstance(own, str) or not canonical:
            raise DataError(
                f"a mapping has names on both sides, got {format_value(canonical)}={format_value(own)}; an "
                "empty text leaves a column out",
                code="wrong_mapping",
                field="map",
            )
        if own and canonical not in known:
            near = nearest(canonical, known)
            raise DataError(
                f"--map {canonical}={own}: {canonical!r} is not a known column ({', '.join(known)}){near}",
                code="unknown_canonical",
                field=canonical,
            )
    owned = [own for own in found.values() if own]
    if len(set(owned)) < len(owned) or any(found.get(own) == "" for own in owned):
        raise DataError(f"--map takes one column twice: {found}", code="mapped_twice", field="map")
    return found


def _check_renamed(place: str, columns: Sequence[str], renamed: Mapping[str, str]) -> None:
    for canonical, own in renamed.items():
        if own not in columns:
            raise DataError(
                f"{place} has no column {own!r} to map ({join_limited(columns)}){nearest(own, columns)}",
                code="unknown_column",
                field=canonical,
            )


def _format(part: DataPart, mapping: Mapping[str, str], known: Mapping[str, str], free: Sequence[str]) -> str:
    """Return the first format whose columns are all there."""
    fitting = (name for name, (needed, _) in FORMATS.items() if known.keys() >= set(needed))
    form = next(fitting, None)
    if form in (None, "text") and SHAREGPT in known:
        values = [v for _, row in part.rows if not is_empty(v := row.get(SHAREGPT))]
        if values and all(map(is_conversation, values)):
            return "messages"
    if form is None:
        raise _no_format(part, mapping, known, free)
    return form


def _no_format(part: DataPart, mapping: Mapping[str, str], known: Mapping[str, str], free: Sequence[str]) -> DataError:
    columns = columns_of(part.rows)
    separated = inner_name(Path(part.place)).suffix.lower() in (".csv", ".tsv")
    if separated and any(map(str.isdigit, columns)):
        return DataError(
            f"{part.place}: line 1 seems to be a row ({join_limited(map(format_value, columns), 3)}); put a line "
            "with the names of the columns above it, such as text and label",
            code="no_header",
        )
    reason, base = "", dict(mapping)
    worse = [c for c in free if "rejected" in words_of(c)]
    if worse:
        reason = f"preferences cannot be learnt, only the better answers without {worse[0]!r}; "
        base = without_columns(mapping, worse)
    own = [profile(c, part.rows) for c in free if c not in worse]
    others = [p for p in own if p.filled and not is_bookkeeping(p.name, ())]
    tried = dict.fromkeys(mapping_option(m) for m in mappings_for(base, known, others))
    said = " or ".join(islice(tried, MAX_PROPOSALS))
    forms = " | ".join(", ".join(needed) for needed, _ in FORMATS.values())
    return DataError(
        f"{part.place}: {reason}the columns {join_limited(columns)} fit no format ({forms})"
        + (f"; say which is which, such as {said}" if said else "; rename them"),
        code="no_format",
        field=free[0] if free else None,
    )


def _check_splits(part: DataPart, mapping: Mapping[str, str], beside: Sequence[str]) -> None:
    """Ask about a column of another name that seems to say the splits."""
    for column in beside:
        found = [value for _, row in part.rows if not is_empty(value := row.get(column))]
        if len(set(map(split_named, found))) > 1 and all(map(split_named, found)):
            raise DataError(
                f"{part.place}: {column!r} seems to say which split a row belongs to; say "
                f"{mapping_option({**mapping, SPLIT: column})} if it does or "
                f"{mapping_option(without_columns(mapping, [column]))} to leave it out",
                code="unclear_split",
                field=column,
            )
        if HELD_OUT & set(words_of(column)) and are_truths(found):
            raise DataError(
                f"{part.place}: {column!r} seems to say which rows are held out; write train and "
                f"test into a column {SPLIT!r}, or use {mapping_option(without_columns(mapping, [column]))} to "
                "leave it out",
                code="unclear_split",
                field=column,
            )


def _check_beside(
    part: DataPart, mapping: Mapping[str, str], form: str, own: Mapping[str, str], beside: Sequence[str]
) -> None:
    """Refuse what would change the meaning, and ask for what might."""
    values = {c: [v for _, row in part.rows if not is_empty(v := row.get(c))] for c in beside}
    filled = {column: found for column, found in values.items() if found}
    refused = {c: why for c, found in filled.items() if (why := reason_to_refuse(c, found, form))}
    if refused:
        first = next(iter(refused))
        whys = "; ".join(f"{c!r} {why}" for c, why in islice(refused.items(), MAX_PROPOSALS))
        without = mapping_option(without_columns(mapping, refused))
        read = _read_as(mapping, form, own, refused)
        raise DataError(
            f"{part.place}: {whys}; remove {_it(refused)}, or use {without} to train without{read}",
            code="unsupported_column",
            field=first,
        )
    if form in WITHOUT_ANSWER:
        unclear = [c for c, found in filled.items() if not (is_bookkeeping(c, found) or kinds_of(c, form))]
        if unclear:
            raise _question(part, mapping, own, unclear)


def _read_as(mapping: Mapping[str, str], form: str, own: Mapping[str, str], refused: Iterable[str]) -> str:
    """Return the option that has a column read in the place of one that is not there; "" if none could be."""
    able = {canonical: column for column in refused if (canonical := canonical_of(column, form))}
    able = {c: column for c, column in able.items() if c in FORMATS[form][1] and c not in own and c not in mapping}
    return f", or {mapping_option({**mapping, **able})} to read {_it(able)}" if able else ""


def _question(part: DataPart, mapping: Mapping[str, str], own: Mapping[str, str], unclear: Sequence[str]) -> DataError:
    """Ask what the columns beside a text, or a pair of texts, mean."""
    looked = [profile(column, part.rows) for column in unclear]
    ways = [answers_beside(mapping, own, other) for other in looked[:MAX_PROPOSALS]]
    leave = f"{mapping_option(without_columns(mapping, unclear))} to leave {_it(unclear)} out"
    if "text_a" in own:
        leave += ", so that every pair counts as alike"
    amounts = [other.name for other in looked if other.kind == "amount"]
    hint = f" {amounts[0]!r} holds numbers;" if amounts else ""
    return DataError(
        f"{part.place}: what is {join_limited(map(repr, unclear))} beside {' and '.join(own.values())}?"
        f"{hint} say {' or '.join([*filter(None, ways), leave])}",
        code="unclear_column",
        field=unclear[0],
    )


def _it(columns: Collection[str]) -> str:
    return "it" if len(columns) == 1 else "them"


def _split_column(part: DataPart, mapping: Mapping[str, str], known: Mapping[str, str]) -> str | None:
    """Return the column that says which split a row belongs to, if there is one.

    Raises:
        DataError: one of its values is not a split.
    """
    column = known.get(SPLIT)
    values = [(n, row.get(column)) for n, row in part.rows] if column else []
    if column is None or all(is_empty(value) for _, value in values):
        return None
    if wrong := [(number, value) for number, value in values if not split_named(value)]:
        number, value = wrong[0]
        raise DataError(
            f"{part.place}, {part.unit} {number}: {column!r} is {format_value(value)}, and no split "
            f"({', '.join(SPLITS)}); correct it, or use {mapping_option(without_columns(mapping, [column]))} to "
            "leave the column out",
            code="unknown_split",
            field=column,
        )
    return column


def split_named(value: Any) -> str | None:
    """Return the split that a value names, if it does."""
    return SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
