"""1,797 handwritten digits that scikit-learn ships: 8 x 8 grey levels from 0 to 16, in ten classes.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI). The package is
found, never imported. The splits are by a hash of each picture, since the file has none.
"""

import hashlib
from pathlib import Path

from loralab.assets.gzipped import read_gzip
from loralab.models.catalog import in_package
from loralab.tasks.catalog import NamedTask, register
from loralab.tasks.formats import Row
from loralab.tasks.pictures import from_levels
from loralab.tasks.read import DataTable

NAME, SIDE = "digits", 8
SHA256 = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"  # of the text in the file
MAX_BYTES = 1 << 20
TEST, VALIDATION = 400, 200  # pictures; more than a tenth, since there are few
locate = in_package("sklearn", "datasets/data/digits.csv.gz")


def how_to_get() -> str:
    """Return the command that brings the pictures."""
    return "pip install scikit-learn"


def load(file: Path) -> DataTable:
    """Return the digits in train, validation and test.

    Raises:
        DataError: the file is damaged, or another one.
    """
    lines = read_gzip(file, SHA256, MAX_BYTES).splitlines()
    lines.sort(key=lambda line: hashlib.sha256(line).digest())
    rows = [_row(line, number) for number, line in enumerate(lines, start=1)]
    held = TEST + VALIDATION
    splits = {"train": rows[held:], "validation": rows[TEST:held], "test": rows[:TEST]}
    return DataTable(source=NAME, format="image-label", splits=splits)


def _row(line: bytes, number: int) -> Row:
    import numpy

    *levels, digit = map(int, line.split(b","))
    picture = numpy.array(levels, dtype=numpy.uint16).reshape(SIDE, SIDE) * 255 // 16
    return {"image": from_levels(picture.astype(numpy.uint8), f"{NAME}, picture {number}"), "label": str(digit)}


register(
    NamedTask(
        name=NAME,
        description="1,797 handwritten digits, 8 x 8 grey levels (UCI, in scikit-learn)",
        licence="CC BY 4.0",
        rows=1797,
        locate=locate,
        load=load,
        get=how_to_get,
    )
)
