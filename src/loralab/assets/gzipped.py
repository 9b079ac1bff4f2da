"""Gzipped files of assets, checked by the digest of their content: gzip may be written in several ways."""

import hashlib
from pathlib import Path

from loralab.errors import DataError
from loralab.tasks.encodings import unpack
from loralab.values import read_bytes


def read_gzip(file: Path, sha256: str, most: int) -> bytes:
    """Return the content of a gzip file.

    Args:
        sha256: of the content.
        most: bytes, packed or not.

    Raises:
        DataError: the file cannot be read, is damaged, or is another one.
    """
    data = unpack(file, read_bytes(file, DataError, most), most)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{file} is not the file that is known by this name; install it anew", code="damaged_file")
    return data
