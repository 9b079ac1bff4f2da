"""Peaks, times and loss curves read from records, each saving beside the baseline of the same seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import by_key, mean_of
from loralab.studies.statistics import difference
from loralab.studies.study import DONE, Record
from loralab.studies.timing import MARGIN

BASELINE = "baseline"
ASKED = (BASELINE, "accumulation", "mixed", "checkpoint")  # the rows of the source's table
ROLES = (*ASKED, "together", "nf4", "gguf", "passes", "optimizer")
ROUNDING, CLOSE = 1e-3, 0.05  # of the baseline's loss: what rounding moves, what keeps the curve
FEW = 4  # steps of a single run from which no interval is made
SAME = 0.02  # peaks this close are as good as equal
COMPARED: Mapping[str, Callable[[Record], Sequence[float]]] = {
    "memory": lambda record: [record.numbers["peak_bytes"]],
    "time": lambda record: record.series["step_seconds"],
    "loss": lambda record: record.series["loss"],
}


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Finished runs by what they save, in the order of ROLES."""

    runs: Mapping[str, Sequence[Record]]

    @staticmethod
    def of(records: Sequence[Record]) -> "Savings":
        """Sort the records that came to their end."""
        ended = (r for r in records if r.status == DONE and "peak_bytes" in r.numbers)
        found = by_key(ended, lambda r: r.arm.options.get("role"))
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

    def over(self, role: str, what: str) -> Contrast | None:
        """Return the share of one of COMPARED that an arm saves of the baseline's, step by step where it has steps.

        None for the baseline itself, and where the two cannot be compared.
        """
        pairs = [] if role == BASELINE else self._pairs(role)
        sides = [
            [[math.log(v) for v in COMPARED[what](record)] for record in side] for side in zip(*pairs, strict=True)
        ]
        if not sides or len({len(row) for side in sides for row in side}) > 1:
            return None
        family = max(1, len(self.others))
        saved = difference(sides[1], sides[0], comparisons=family, margin=math.log1p(MARGIN))
        low, share, high = (-math.expm1(-log) for log in (saved.low, saved.estimate, saved.high))
        if len(sides[0]) == 1 and len(sides[0][0]) < FEW:
            return replace(saved, estimate=share, low=math.nan, high=math.nan, verdict="undecided")
        return replace(saved, estimate=share, low=low, high=high)

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
        apart = self.over(role, "loss")
        return apart is not None and apart.verdict == "equivalent"

    def at_floor(self) -> list[str]:
        """Return the arms whose steps need no more than loading did."""
        numbers = {role: [record.numbers for record in own] for role, own in self.runs.items()}
        return [role for role, own in numbers.items() if all(n["peak_bytes"] <= n["loading_bytes"] for n in own)]

    @property
    def costs(self) -> dict[str, tuple[float, float]]:
        """Return memory and time of the arms that keep the curve; of none where there is no baseline."""
        kept = [role for role in self.runs if BASELINE in self.runs and self.keeps(role)]
        return {role: (self.peak(role), mean_of(self.runs[role], "step_seconds")) for role in kept}

    def cheapest(self) -> str | None:
        """Return the arm of the least peak that keeps the curve; of those that come as near, the quickest."""
        least = min((memory for memory, _ in self.costs.values()), default=math.nan)
        near = {role: time for role, (memory, time) in self.costs.items() if memory <= (1 + SAME) * least}
        return min(near, key=lambda role: near[role], default=None)

    def pareto(self) -> list[str]:
        """Return the arms that keep the curve and that no other such arm beats in memory and in time."""
        every = self.costs.values()
        return [
            role
            for role, (memory, time) in self.costs.items()
            if not any(m <= memory and t <= time and (m, t) != (memory, time) for m, t in every)
        ]
