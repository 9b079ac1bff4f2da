"""Records -> the few numbers of each run that a claim's reading needs, which stay when the runs are gone."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab import atomic
from loralab.errors import OutputError
from loralab.studies.claims.form import CORRELATION, EQUAL_LOSS, INTERACTION, LOG10, ROWS, Claim, Reading
from loralab.studies.claims.plan import sweep_of
from loralab.studies.evidence import mean_of
from loralab.studies.readings.forgetting import lowest_shared, rows_at
from loralab.studies.study import DONE, EDGE, Record

FILE = "records.parquet"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One run of an arm: its status, and what the reading reads of it.

    `loss` is the validation loss, by which the best rate of a sweep is chosen. `values` is one number, or
    one for each test row; none where the run has no such thing. All are fp32, as the file holds them. `edge` is
    whether the search for its rate ended at the edge of what was tried; `again` the repetition of which it is.
    """

    claim: int
    arm: str
    seed: int
    status: str
    rate: float | None
    seconds: float
    loss: float
    edge: bool
    values: tuple[float, ...]
    again: str = ""


def observed(claim: Claim, records: Iterable[Record]) -> list[Observation]:
    """Return what the claim's reading reads of its runs."""
    return [
        Observation(
            claim=claim.claim,
            arm=sweep_of(record.arm),
            seed=record.seed,
            status=record.status,
            rate=None if record.rate is None else _single(record.rate),
            seconds=_single(record.seconds + record.searched),
            loss=_single(_finite(mean_of([record], "validation_loss"))),
            edge=record.texts.get("rate") == EDGE,
            values=tuple(_single(value) for value in _read(record, claim.reading)),
            again=claim.again,
        )
        for record in records
    ]


def _read(record: Record, reading: Reading) -> list[float]:
    """Return the values of a run; none where it has not got them."""
    if record.status != DONE:
        return []
    if reading.name in (ROWS, INTERACTION):
        return _items(record, reading)
    if reading.name == EQUAL_LOSS:
        return _at_equal_loss(record.tables.get("points", ()), reading)
    if reading.name == CORRELATION:
        return _of_types(record, reading)
    if not reading.table:
        return _less(record.numbers, reading)
    rows = [row for row in record.tables.get(reading.table, ()) if _counts(row, reading)]
    found = [value for row in rows for value in _less(row, reading)]
    return [float(np.median(found))] if found else []


def _items(record: Record, reading: Reading) -> list[float]:
    """Return an item of each test row, less another of the same run where there is one beside."""
    found = list(record.items.get(reading.number, ()))
    if reading.name != ROWS or not reading.beside:
        return found
    others = record.items.get(reading.beside, ())
    return [value - other for value, other in zip(found, others, strict=True)] if len(others) == len(found) else []


def _of_types(record: Record, reading: Reading) -> list[float]:
    """Return an arm's number, or the scores of the types of all arms where it is the arm that has those."""
    if record.arm.name not in reading.to:
        return [float(record.numbers[reading.number])] if reading.number in record.numbers else []
    scores = {row["type"]: float(row[reading.beside]) for row in record.tables.get(reading.table, ())}
    wanted = [reading.where[name] for name in reading.of]
    return [scores[kind] for kind in wanted] if scores.keys() >= set(wanted) else []


def _counts(row: Mapping[str, Any], reading: Reading) -> bool:
    """Tell whether a row of a table is one of those that count; a column that it has not got excludes nothing."""
    return all(row.get(name, value) == value for name, value in reading.where.items())


def _less(row: Mapping[str, Any], reading: Reading) -> list[float]:
    """Return a number less the one beside it, or over it where its logarithm is taken."""
    value, beside = (row.get(name) for name in (reading.number, reading.beside or reading.number))
    if value is None or beside is None:
        return []
    if not reading.beside:
        return [float(value)]
    return [float(value) / float(beside) if reading.scale == LOG10 else float(value) - float(beside)]


def _at_equal_loss(points: Sequence[Mapping[str, Any]], reading: Reading) -> list[float]:
    """Return what is left elsewhere, row by row, of the first run less the second, at the lowest loss of both."""
    names = [reading.where["ours"], reading.where["theirs"]]
    runs = {name: [point for point in points if point["arm"] == name] for name in names}
    if not all(runs.values()):
        return []
    loss = lowest_shared(runs)
    if loss >= max(own[0]["loss"] for own in runs.values()):  # one of them has not learnt
        return []
    ours, theirs = (rows_at(own, loss) for own in runs.values())
    return [float(value) for value in ours - theirs]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _single(value: float) -> float:
    """Round to fp32, so that what is read back gives the same verdict."""
    return float(np.float32(value))


def write(folder: Path, found: Sequence[Observation]) -> Path:
    """Write the runs of all claims of a folder as one Parquet file."""
    import pyarrow
    from pyarrow import parquet

    single = pyarrow.float32()
    kinds = {
        "claim": pyarrow.int32(),
        "arm": pyarrow.string(),
        "seed": pyarrow.int32(),
        "status": pyarrow.string(),
        "rate": single,
        "seconds": single,
        "loss": single,
        "edge": pyarrow.bool_(),
        "values": pyarrow.list_(single),
        "again": pyarrow.string(),
    }
    rows = [asdict(one) for one in found]
    table = pyarrow.table({name: pyarrow.array([row[name] for row in rows], kind) for name, kind in kinds.items()})
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    return atomic.write_file(folder / FILE, content.getvalue())


def read(folder: Path) -> list[Observation]:
    """Return the runs that stand in a folder.

    Raises:
        OutputError: the file cannot be read.
    """
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(folder / FILE).to_pylist()
    except (ArrowException, OSError) as error:
        raise OutputError(f"{folder / FILE} cannot be read: {error}", code="cannot_read", field=FILE) from None
    return [Observation(**{**row, "values": tuple(row["values"])}) for row in rows]
