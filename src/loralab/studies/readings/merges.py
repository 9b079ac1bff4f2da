"""Records of merged models -> differences before and after, by row, by layer and by module."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import MARGIN, Metric
from loralab.studies.measures.drift import NOTED
from loralab.studies.measures.merging import AFTER, BEFORE
from loralab.studies.statistics import difference, median_contrast
from loralab.studies.study import Record


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Weights of one dtype after a hundred merges whose updates were subtracted again.

    Attributes:
        modules: |W - W0| / |W0| of every module at each of NOTED.
        differing: share of the weights that are not what they were.
        kl, top1: of the drifted model, beside the base.
        exact: whether putting the original back gave every bit.
    """

    precision: str
    modules: Sequence[Sequence[float]]
    differing: float
    kl: float
    top1: float
    exact: bool

    def off(self, merges: int) -> float:
        """Return how far the weights are off after so many merges, the mean of the modules."""
        return float(np.mean([curve[NOTED.index(merges)] for curve in self.modules]))

    def change(self, family: int) -> Contrast:
        """Compare the weights with the original, over modules; what is off counts as worse."""
        last = [curve[-1] for curve in self.modules]
        return difference([[0.0] * len(last)], [last], comparisons=family)


def drifts_of(records: Sequence[Record]) -> list[Drift]:
    """Return the drift of every dtype that was measured."""
    return [
        Drift(
            precision=row["precision"],
            modules=row["relative"],
            differing=float(np.mean(row["changed"])),
            kl=row["kl"],
            top1=row["top1"],
            exact=row["exact"],
        )
        for record in records
        for row in record.tables.get("drift", ())
    ]


def merged_change(record: Record, metric: Metric, family: int, kind: str = "") -> Contrast | None:
    """Compare a model merged with itself unmerged, row by row; None where no row has a value.

    Args:
        kind: of the values: " loss", or nothing for the score.
    """
    now, was = (record.items.get(f"{name}{kind}", ()) for name in (AFTER, BEFORE))
    if not now:
        return None
    margin = metric.margin_at(abs(float(np.mean(was))))
    return difference([now], [was], comparisons=family, margin=margin)


def kept_change(record: Record | None) -> Contrast | None:
    """Compare what packing again keeps of the update with all of it, over layers."""
    kept = record.series.get("kept", ()) if record is not None else ()
    return median_contrast([share - 1 for share in kept], margin=MARGIN / 100) if kept else None


def resolution(loss: float) -> float:
    """Return the distance from a loss to the next number that fp32 holds."""
    return float(np.spacing(np.float32(abs(loss))))
