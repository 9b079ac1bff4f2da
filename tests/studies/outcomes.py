"""Results of a study, without what depends on time, place or memory."""

import dataclasses
from pathlib import Path

from loralab.studies.runner import records
from loralab.studies.study import Record


def results(folder: Path) -> dict[str, Record]:
    """Return the record of every trial of a study folder, by arm and seed."""
    return {f"{record.arm.name} {record.seed}": _still(record) for _, own in records(folder).values() for record in own}


def _still(record: Record) -> Record:
    numbers = {k: v for k, v in record.numbers.items() if "seconds" not in k and k != "peak_bytes"}
    texts = {k: v for k, v in record.texts.items() if k != "node"}
    return dataclasses.replace(record, numbers=numbers, texts=texts, seconds=0.0, searched=0.0)
