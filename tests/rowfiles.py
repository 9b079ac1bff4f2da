"""Files of rows for tests, and the errors that reading them raises."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from loralab.cli.options import pairs
from loralab.errors import DataError
from loralab.tasks.read import DataTable, read

Rows = Sequence[Mapping[str, Any]]
USER = {"role": "user", "content": "question"}
ASSISTANT = {"role": "assistant", "content": "answer"}


def lines(rows: Rows) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(folder: Path, rows: Rows, mapping: Mapping[str, str] | None = None) -> DataTable:
    """Rows as they are read from a file of JSON lines."""
    file = folder / "rows.jsonl"
    file.write_text(lines(rows), encoding="utf-8")
    return read(str(file), mapping)


def refused(source: object, mapping: Mapping[str, str] | None = None) -> DataError:
    """The error that reading raises."""
    with pytest.raises(DataError) as caught:
        read(str(source), mapping)
    return caught.value


def refused_rows(folder: Path, rows: Rows, mapping: Mapping[str, str] | None = None) -> DataError:
    """The error that reading some rows raises."""
    with pytest.raises(DataError) as caught:
        table(folder, rows, mapping)
    return caught.value


def proposed(error: DataError) -> list[dict[str, str]]:
    """The mappings that an error says to type, as a shell and the command line read them."""
    said = str(error)
    starts = [
        found.end()
        for found in re.finditer(
            r"(say|use) (such as )?(?=--map)| or (?=--map)|"
            r"such as (?=--map)",
            said,
        )
    ]
    return [pairs(_first_words(said[start:])[1], "map") for start in starts]


def _first_words(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    return [next(lexer), next(lexer)]
