"""Q2: which rank? The same training at every rank, and what a cut of a large one keeps."""

from collections.abc import Sequence

from loralab.models.load import Base
from loralab.studies.compare import compare_arms
from loralab.studies.evidence import Metric, mean_of, parameters
from loralab.studies.measures.cuts import MEASURE_CUTS, cut_chart, kept_at
from loralab.studies.message import Message, sentences
from loralab.studies.study import Answer, Arm, Record, StudySetup, nothing_measured
from loralab.studies.trained import BASE_ARM, MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

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
    kept, taken = kept_at(runs, found.metric), found.ranking.recommended
    cut = Message("rank.cut", arm=largest, rank=kept) if taken and kept is not None else None
    chart = found.chart("rank", Message("column.rank"), at=rank_of, log=True)
    return found.answer(
        sentence=sentences(found.recommendation, cut),
        blanks=[(f"rank={rank_of(name)}", _blank(own, found.metric)) for name, own in found.arms.items()],
        figures=[chart, cut_chart(runs, found.metric)],
        advice={"rank": rank_of(taken)} if taken else {},
    )


def rank_of(name: str) -> int:
    """Return the rank of an arm."""
    return int(name.removeprefix("r="))


def _blank(records: Sequence[Record], metric: Metric) -> Message:
    """Fill in the source's line for a rank."""
    return Message(
        "rank.blank",
        metric=metric.text,
        score=metric.scored(records),
        parameters=parameters(records),
        step=mean_of(records, "step_seconds"),
        gap=mean_of(records, "gap"),
    )
