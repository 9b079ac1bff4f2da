"""Parquet files, whose few bytes can stand for any number of rows.

A run of equal values takes some bytes in the file and all of them in memory; a page says itself
how large it will be. What is unpacked is counted while it is, and ends at a multiple of the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loralab.errors import DataError
from loralab.tasks.class_names import stored_class_names, with_class_names
from loralab.values import read_bytes

Numbered = list[tuple[int, dict[str, Any]]]
BATCH_ROWS = 1024  # rows that are unpacked at once
ROW_BYTES = 256  # bytes that a row takes whatever it holds
MIN_PLAIN_BYTES, MAX_EXPANSION = 1 << 30, 200  # bytes that a small file may fill; beyond, for each byte of the file


def read_parquet(file: Path) -> Numbered:
    """Return the rows of a file, counted from 1.

    Raises:
        DataError: it is not a Parquet file, is damaged, would fill far more memory than its size, or
            has a class without a name.
    """
    import pyarrow

    data = read_bytes(file, DataError)
    rows: Numbered = []
    try:
        for batch in _batches(file, data):
            named = with_class_names(batch.to_pylist(), stored_class_names(batch.schema.metadata))
            rows += enumerate(named, start=len(rows) + 1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is not a readable Parquet file: {error}", code="damaged_file") from None
    except (KeyError, ImportError, NotImplementedError, TypeError) as error:
        # Arrow's types beyond Python's: a time zone that nobody has, a unit of nanoseconds
        raise DataError(f"{file} holds values that cannot be read: {error}", code="cannot_read") from None
    return rows


def _batches(file: Path, data: bytes) -> Iterator[Any]:
    """Yield the rows in portions, as long as they stay within what the file can mean."""
    import pyarrow
    from pyarrow import parquet

    most = max(MIN_PLAIN_BYTES, MAX_EXPANSION * len(data))
    source = parquet.ParquetFile(pyarrow.BufferReader(data))
    groups = [source.metadata.row_group(n) for n in range(source.metadata.num_row_groups)]
    claimed = sum(group.total_byte_size for group in groups) + ROW_BYTES * source.metadata.num_rows
    used = 0
    if claimed <= most:
        for batch in source.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
            used += batch.nbytes + ROW_BYTES * batch.num_rows
            if used > most:
                break
            yield batch
    if max(claimed, used) > most:
        raise DataError(
            f"{file} has {len(data):,} bytes and would fill more than {most:,}; it is damaged, or was made to",
            code="too_large",
        )
