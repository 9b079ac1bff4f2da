"""Peaks, times and loss curves read from records, each saving beside the baseline of the same seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loralab.studies.evidence import mean_of
from loralab.studies.statistics import difference
from loralab.studies.study import DONE, Record
from loralab.studies.timing import MARGIN, Overhead

BASELINE = "baseline"
ASKED = (BASELINE, "accumulation", "mixed", "checkpoint")  # the rows of the source's table
ROLES = (*ASKED, "together", "nf4", "gguf", "passes", "optimizer")
ROUNDING, CLOSE = 1e-3, 0.05  # of the baseline's loss: what rounding moves, what keeps the curve
FEW = 4  # steps of a single run from which no interval is made
SAME = 0.02  # peaks this close are as good as equal


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Finished runs by what they save, in the order of ROLES."""

    runs: Mapping[str, Sequence[Record]]

    @staticmethod
    def of(records: Sequence[Record]) -> "Savings":
        """Sort the records that came to their end."""
        found: dict[str, list[Record]] = {}
        for record in records:
            role = str(record.arm.options.get("role", ""))
            if role in ROLES and record.status == DONE and "peak_bytes" in record.numbers:
                found.setdefault(role, []).append(record)
        return Savings(runs={role: found[role] for role in ROLES if role in found})

    @property
    def others(self) -> list[str]:
        """Return all but the baseline."""
        return [role for role in self.runs if role != BASELINE]

    @property
    def seeds(self) -> int:
        """Return the runs of each arm."""
        return max(map(len, self.runs.values()), default=0)

    def peak(self, role: str) -> float:
        """Return the mean peak of an arm in bytes."""
        return mean_of(self.runs[role], "peak_bytes")

    def memory(self, role: str) -> Overhead | None:
        """Return how much more an arm's peak is than the baseline's; None if they cannot be compared."""
        return self._over(role, lambda r: [r.numbers["peak_bytes"]])

    def time(self, role: str) -> Overhead | None:
        """Return how much longer an arm's steps take than the baseline's, step by step."""
        return self._over(role, lambda r: r.series["step_seconds"])

    def loss(self, role: str) -> Overhead | None:
        """Return how much higher an arm's losses are than the baseline's, step by step."""
        return self._over(role, lambda r: r.series["loss"])

    def _over(self, role: str, values: Callable[[Record], Sequence[float]]) -> Overhead | None:
        pairs = self._pairs(role)
        sides = [[[math.log(v) for v in values(record)] for record in side] for side in zip(*pairs, strict=True)]
        if not sides or len({len(row) for side in sides for row in side}) > 1:
            return None
        family = max(1, len(self.others))
        saved = difference(sides[1], sides[0], comparisons=family, margin=math.log1p(MARGIN))
        share = math.expm1(-saved.estimate)
        if len(sides[0]) == 1 and len(sides[0][0]) < FEW:
            return Overhead(share=share, low=math.nan, high=math.nan, verdict="undecided")
        low, high = math.expm1(-saved.high), math.expm1(-saved.low)
        return Overhead(share=share, low=low, high=high, verdict=saved.verdict)

    def _pairs(self, role: str) -> list[tuple[Record, Record]]:
        """Return an arm's runs and the baseline's of the same seeds."""
        base = {record.seed: record for record in self.runs.get(BASELINE, ())}
        return [(r, base[r.seed]) for r in self.runs.get(role, ()) if r.seed in base]

    def curve(self, role: str) -> float:
        """Return the largest difference to the baseline's loss at any step, as a share of it."""
        gaps = [
            abs(ours - theirs) / max(abs(theirs), 1e-12)
            for own, base in self._pairs(role)
            for ours, theirs in zip(own.series["loss"], base.series["loss"], strict=False)
        ]
        return max(gaps, default=math.nan)

    def at_end(self, role: str) -> float:
        """Return the same difference at the last step, on average over seeds; it has a sign."""
        gaps = [own.series["loss"][-1] / base.series["loss"][-1] - 1 for own, base in self._pairs(role)]
        return float(np.mean(gaps)) if gaps else math.nan

    def keeps(self, role: str) -> bool:
        """Tell whether an arm's losses are the baseline's: never further off, or equivalent on the whole."""
        if role == BASELINE or self.curve(role) <= CLOSE:
            return True
        apart = self.loss(role)
        return apart is not None and apart.verdict == "equivalent"

    def at_floor(self) -> list[str]:
        """Return the arms whose steps need no more than loading did."""
        return [
            role
            for role, own in self.runs.items()
            if all(r.numbers["peak_bytes"] <= r.numbers["loading_bytes"] for r in own)
        ]

    def cheapest(self) -> str | None:
        """Return the arm of the least peak that keeps the curve; of those that come as near, the quickest."""
        if BASELINE not in self.runs:
            return None
        kept = [role for role in self.runs if self.keeps(role)]
        least = min(self.peak(role) for role in kept)
        near = [role for role in kept if self.peak(role) <= (1 + SAME) * least]
        return min(near, key=lambda role: mean_of(self.runs[role], "step_seconds"))

    def pareto(self) -> list[str]:
        """Return the arms that keep the curve and that no other such arm beats in memory and in time."""
        if BASELINE not in self.runs:
            return []
        cost = {
            role: (self.peak(role), mean_of(own, "step_seconds")) for role, own in self.runs.items() if self.keeps(role)
        }
        return [
            role
            for role, (memory, time) in cost.items()
            if not any(m <= memory and t <= time and (m, t) != (memory, time) for m, t in cost.values())
        ]
