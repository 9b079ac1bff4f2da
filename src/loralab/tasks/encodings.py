"""The bytes of a data file as text: unpacked, and decoded as they say they are written.

UTF-8, and UTF-16 or UTF-32 that begin with a byte order mark. Anything else is refused with the
command that converts it: a wrong guess would train on letters that nobody wrote.
"""

import codecs
import gzip
import io
import shlex
import zlib
from pathlib import Path

from loralab.errors import DataError
from loralab.values import read_bytes

PACKED = ".gz"
MIN_PLAIN_BYTES, MAX_EXPANSION = 1 << 26, 200  # bytes that a small file may unpack to; beyond, for each byte of it
MARKS = {  # the longer one first: the mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BINARY = {  # first bytes -> a file of another kind than its name says
    b"\x1f\x8b": "gzip-compressed; add .gz to its name",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as .csv",
    b"PAR1": "a Parquet file; name it .parquet",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save it as .csv",
}


def inner_name(file: Path) -> Path:
    """Return the name without .gz, whose suffix says how to read the content."""
    return file.with_suffix("") if file.suffix.lower() == PACKED else file


def text_of(file: Path) -> str:
    """Return the content of a text file, packed or not.

    Raises:
        DataError: it cannot be read or unpacked, or its encoding is not known.
    """
    data = _content(file)
    for start, kind in BINARY.items():
        if data.startswith(start):
            raise DataError(f"{file} is not a text but {kind}", code="not_text")
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if marked is None and (found := _unmarked(data)):
        command = _convert(file, found)
        raise DataError(
            f"{file}, line 1: {found} without a byte order mark; convert it: {command}", code="unknown_encoding"
        )
    try:
        return data.decode(marked or "utf-8-sig")
    except UnicodeDecodeError as error:
        if marked:
            raise DataError(
                f"{file} is damaged: its first bytes say {marked.upper()}, byte {error.start:,} "
                f"does not fit ({error.reason})",
                code="unknown_encoding",
            ) from None
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); convert it, with the "
            "encoding that it was written in (WINDOWS-1252, BIG5, ...) after -f: "
            f"{_convert(file, 'WINDOWS-1252')}",
            code="unknown_encoding",
        ) from None


def _content(file: Path) -> bytes:
    data = read_bytes(file, DataError)
    if file.suffix.lower() != PACKED:
        return data
    most = max(MIN_PLAIN_BYTES, MAX_EXPANSION * len(data))
    content = unpack(file, data, most + 1)
    if len(content) > most:
        raise DataError(
            f"{file} has {len(data):,} bytes and unpacks to more than {most:,}; it is damaged, or "
            "was made to; if it is right, unpack it first: "
            f"gunzip -k {shlex.quote(str(file))}",
            code="too_large",
        )
    return content


def unpack(file: Path, data: bytes, most: int) -> bytes:
    """Return up to `most` bytes of what a gzip file's bytes hold.

    Raises:
        DataError: they are damaged, or no gzip file's.
    """
    try:
        with gzip.open(io.BytesIO(data)) as packed:
            return packed.read(most)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be unpacked: {error}", code="damaged_file") from None


def _unmarked(data: bytes) -> str:
    """Return the kind of UTF-16 that a text in Latin letters seems to be, as iconv names it."""
    if len(data) < 4 or data[:4].count(0) != 2:
        return ""
    if data[1] == data[3] == 0:
        return "UTF-16LE"
    return "UTF-16BE" if data[0] == data[2] == 0 else ""


def _convert(file: Path, encoding: str) -> str:
    """Return the command that writes the file anew in UTF-8, beside it."""
    inner = inner_name(file)
    new = shlex.quote(str(inner.with_name(f"{inner.stem}-utf8{inner.suffix}")))
    old = shlex.quote(str(file))
    if inner != file:
        return f"gzip -dc {old} | iconv -f {encoding} -t UTF-8 > {new}"
    return f"iconv -f {encoding} -t UTF-8 {old} > {new}"
