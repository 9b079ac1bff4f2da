"""Q2: which rank? The same training at every rank, and what a cut of a large one keeps."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loralab.models.load import Base
from loralab.studies.compare import compare_arms
from loralab.studies.evidence import Metric, mean_of, own_interval
from loralab.studies.measures.cuts import CUT, MEASURE_CUTS
from loralab.studies.message import Chart, Message, chart, sentences
from loralab.studies.statistics import difference
from loralab.studies.study import Answer, Arm, Record, StudySetup, nothing_measured
from loralab.studies.trained import BASE_ARM

RANKS = (2, 4, 8, 16, 32, 64)


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return one arm for each rank, alpha fixed at 16, and the base model; the largest rank is cut as well."""
    ranks = setup.ranks(RANKS)
    options = {rank: {"measure": MEASURE_CUTS} if rank == ranks[-1] else {} for rank in ranks}
    return [BASE_ARM, *(Arm(name=f"r={r}", fields={"method": "lora", "rank": r}, options=options[r]) for r in ranks)]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the cheapest rank that is good enough, every rank's numbers, and the truncation curve."""
    found = compare_arms(records, setup)
    if found is None:
        return nothing_measured(setup)
    largest, runs = list(found.arms.items())[-1]
    kept, taken = _kept_at(runs, found.metric), found.ranking.recommended
    cut = Message("rank.cut", arm=largest, rank=kept) if taken and kept is not None else None
    chart = found.chart("rank", "column.rank", at=rank_of, log=True)
    return found.answer(
        sentence=sentences(found.recommendation, cut),
        blanks=[(f"rank={rank_of(name)}", Message("rank.blank", **found.facts(name))) for name in found.arms],
        figures=[chart, _cut_chart(runs, found.metric)],
        advice={"rank": rank_of(taken)} if taken else {},
    )


def rank_of(name: str) -> int:
    """Return the rank of an arm."""
    return int(name.removeprefix("r="))


def _kept_at(records: Sequence[Record], metric: Metric) -> int | None:
    """Return the smallest cut that is shown to keep the score, within the margin; None if none is."""
    margin, whole = metric.margin_at(abs(mean_of(records, "score"))), [r.items["score"] for r in records]
    for rank in _cuts(records):
        found = difference([r.items[f"{CUT}{rank}"] for r in records], whole, margin=margin)
        if found.verdict in ("equivalent", "better"):
            return rank
    return None


def _cut_chart(records: Sequence[Record], metric: Metric) -> Chart:
    """Return the score of every cut against its rank; dashed, that of the whole."""
    sign, rows = 1 if metric.rises else -1, []
    for rank in _cuts(records):
        cut = [replace(record, items={"score": record.items[f"{CUT}{rank}"]}) for record in records]
        scores = [{**own.numbers, "score": sign * float(np.mean(own.items["score"]))} for own in cut]
        value, low, high = own_interval([replace(r, numbers=own) for r, own in zip(cut, scores, strict=True)])
        rows.append({"arm": f"r={rank}", "x": rank, "value": value, "low": low, "high": high})
    whole = mean_of(records, "score")
    axes, rises = ("rank.rank_kept", Message("axis.score", metric=metric.text)), metric.rises
    return chart("intervals", "rank-cut", "rank.cut_chart", rows, *axes, log=True, chance=whole, percent=rises)


def _cuts(records: Sequence[Record]) -> list[int]:
    shared = set.intersection(*({k for k in r.items if k.startswith(CUT)} for r in records))
    return sorted(int(name.removeprefix(CUT)) for name in shared)
