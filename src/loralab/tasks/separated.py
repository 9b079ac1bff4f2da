"""Tables of separated values: commas, semicolons or tabs, as the header line shows.

A name that stands with spaces around it in the header ("text, label") loses them, and so do the
values under it.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loralab.errors import DataError, join_limited
from loralab.tasks.formats import MAX_COLUMNS, Numbered, clean, repeated

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
FIELD_LIMIT = 1 << 30  # characters in a field; the csv module's own stops at 131,072
UNNAMED = "Unnamed: "  # and its place from 0, as pandas calls a column without a name
DIRECTIVE = re.compile(r'"?sep=([,;\t])"?\r?\n')  # Excel's first line, where it writes one


def read_separated(file: Path, text: str, own: str) -> Numbered:
    """Return the rows under a header, each with the line that it begins on.

    Args:
        own: the delimiter that the name of the file promises.

    Raises:
        DataError: the delimiter is not clear, a row is longer or shorter than the header, or a
            name stands twice.
    """
    skipped = 0
    if directive := DIRECTIVE.match(text):
        own, text, skipped = directive[1], text[directive.end() :], 1
    delimiter = own if directive else _delimiter(file, text, own)
    previous = csv.field_size_limit(FIELD_LIMIT)
    lines = _reader(text, delimiter)
    try:
        header: list[str] = next(lines, [])
        padded = {n for n, name in enumerate(header) if clean(name) != name}
        if any(name.startswith(" ") for name in header[1:]):
            lines = _reader(text, delimiter, spaced=True)
            header = next(lines)
        names = _names(file, skipped + 1, header)
        return [(n + skipped, row) for n, row in _rows(file, skipped, names, padded, lines)]
    except csv.Error as error:
        place = lines.line_num + skipped
        raise DataError(f"{file}, line {place}: {error}", code="not_separated") from None
    finally:
        csv.field_size_limit(previous)


def _reader(text: str, delimiter: str, *, spaced: bool = False) -> Any:
    """Return a csv reader, whose type has no public name."""
    source = io.StringIO(text, newline="")
    return csv.reader(source, delimiter=delimiter, strict=True, skipinitialspace=spaced)


def _names(file: Path, line: int, header: list[str]) -> list[str]:
    if len(header) > MAX_COLUMNS:
        raise DataError(
            f"{file}, line {line}: {len(header):,} columns; at most {MAX_COLUMNS:,} are read", code="too_many_columns"
        )
    names = [clean(name) or f"{UNNAMED}{place}" for place, name in enumerate(header)]
    if twice := repeated(names):
        raise DataError(
            f"{file}, line {line}: the header names {join_limited(twice)} twice", code="repeated_column", field=twice[0]
        )
    if len(names) == 1 and "|" in names[0]:
        raise DataError(
            f"{file}, line {line}: the header {names[0]!r} is one column; separate columns with "
            "commas, semicolons or tabs",
            code="unknown_delimiter",
        )
    return names


def _rows(
    file: Path, skipped: int, names: list[str], padded: set[int], lines: Any
) -> Iterator[tuple[int, dict[str, str]]]:
    start = lines.line_num + 1
    for values in lines:
        if values and len(values) != len(names):
            raise DataError(
                f"{file}, line {start + skipped}: {len(values)} fields, the header has {len(names)}", code="ragged_row"
            )
        for place in padded if values else ():
            values[place] = values[place].strip()
        if values == names:
            raise DataError(
                f"{file}, line {start + skipped}: the header stands here again, as where files were joined; remove it",
                code="repeated_header",
            )
        if values:
            yield start, dict(zip(names, values, strict=True))
        start = lines.line_num + 1


def _delimiter(file: Path, text: str, own: str) -> str:
    """Return the one delimiter of the header line, quoted names aside; tabs are what .tsv promises."""
    found = {sign for sign in _unquoted_header(text) if sign in DELIMITERS}
    if not found or (own in found and own == "\t"):
        return own
    if len(found) > 1:
        signs = " and ".join(DELIMITERS[sign] for sign in DELIMITERS if sign in found)
        raise DataError(
            f"{file}, line 1: the header holds {signs}, and either could separate its columns; "
            "put the names that hold one into double quotes",
            code="unclear_delimiter",
        )
    return found.pop()


def _unquoted_header(text: str) -> Iterator[str]:
    quoted = False
    for sign in text:
        if sign == '"':
            quoted = not quoted
        elif not quoted:
            if sign in "\r\n":
                return
            yield sign
