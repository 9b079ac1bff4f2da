"""Records of timed deployments -> every way to deploy against its own control."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.contrast import CONFIDENCE, Contrast
from loralab.studies.evidence import Metric, by_key, metric_of
from loralab.studies.measures.deployed import DENSE, LOOPED, MERGED, SEVERAL, UNMERGED
from loralab.studies.measures.passes import Way
from loralab.studies.message import Message
from loralab.studies.readings.latencies import Timings
from loralab.studies.statistics import difference
from loralab.studies.study import Record, StudySetup


@dataclass(frozen=True, kw_only=True)
class Deployed(Timings):
    """Times by way and batch, weights and scores by way; a way is the arm that holds it, and the variant.

    Attributes:
        times: of a token, or of a pass of models that write no text (`unit`).
        prompts: of reading the prompts of the smallest batch, the median.
    """

    prompts: Mapping[Way, float]
    weights: Mapping[Way, Mapping[str, Any]]
    items: Mapping[Way, Sequence[float]]
    numbers: Mapping[str, float]
    metric: Metric
    unit: str

    @property
    def ways(self) -> list[Way]:
        """Return all that has a control to stand against."""
        return [way for way in self.times if way != self.against(way)]

    @property
    def smaller(self) -> list[Way]:
        """Return the models made smaller, which stand in trials of their own."""
        return [way for way in self.ways if self.against(way)[1] == DENSE]

    @property
    def counted(self) -> str:
        """Return what a model gives in a second: tokens or rows."""
        return "tokens" if self.unit == "token" else "rows"

    @property
    def several(self) -> list[Way]:
        """Return the ways with several adapters."""
        return [way for way in self.times if way[1].split(",")[0].endswith(SEVERAL)]

    @property
    def batches(self) -> list[int]:
        """Return the batches that were timed, from the smallest."""
        return sorted({batch for own in self.times.values() for batch in own})

    def named(self, name: str) -> Way:
        """Return the way of a variant; where it was not timed, one that has no times."""
        return next((way for way in self.times if way[1] == name), ("", name))

    def confidence(self, trials: int) -> float:
        """Share one chance of error among all comparisons, as far as so many trials can be as sure.

        The widest interval of a median goes from the least to the largest value, and misses with
        a chance of 2^(1 - n).
        """
        chance = 1 - CONFIDENCE
        wanted = chance / max(1, sum(min(2, len(self.times[way])) for way in self.ways))
        return 1 - min(chance, max(wanted, 1.0001 * 2.0 ** (1 - trials)))

    def at_first(self, way: Way | str) -> Contrast | None:
        """Return how much longer a way, or the way of a variant, takes than its control at the smallest batch."""
        return self.over(self.named(way) if isinstance(way, str) else way, self.batches[0])

    def is_quicker(self, way: Way) -> bool:
        """Tell whether a way is quicker than its control at the smallest batch."""
        found = self.at_first(way)
        return found is not None and found.verdict == "better"

    @property
    def scored(self) -> list[Way]:
        """Return the ways whose rows can be compared with their control's."""
        pairs = {way: [len(self.items.get(own, ())) for own in (way, self.against(way))] for way in self.ways}
        return [way for way, (ours, theirs) in pairs.items() if ours == theirs >= 2]

    def score_change(self, way: Way) -> Contrast | None:
        """Compare the score of a way with its control's, row by row; None where rows have no scores."""
        if way not in self.scored:
            return None
        ours, theirs = self.items[way], self.items[self.against(way)]
        margin = self.metric.margin_at(abs(float(np.mean(theirs))))
        return difference([ours], [theirs], comparisons=len(self.scored), margin=margin)

    def score(self, way: Way) -> Message | None:
        """Return the score of a way as it is written, where it has one."""
        found = self.items.get(way)
        return self.metric.value((1 if self.metric.rises else -1) * float(np.mean(found))) if found else None

    def weight(self, way: Way, name: str = "bytes") -> float | None:
        """Return the bytes that a way holds, or those that it works with; None where it was not weighed."""
        return self.weights.get(way, {}).get(name)

    @property
    def pays_from(self) -> float | None:
        """Return the tokens at batch 1 after which merging has earned what it cost; None if it never does."""
        found = self.over(self.named(UNMERGED), 1, self.named(MERGED))
        if found is None or found.verdict != "worse" or "switch_seconds" not in self.numbers:
            return None
        return self.numbers["switch_seconds"] / (-found.estimate * self.middle(self.named(MERGED), 1))

    @property
    def gain(self) -> tuple[Way, int, float] | None:
        """Return the way with the most adapters, its largest batch, and its throughput over row by row."""
        ways = self.several
        best = max(ways, key=lambda w: (len(self.times[w]), LOOPED not in w[1], adapters_of(w)), default=None)
        if best is None or (batch := max(self.times[best])) == 1:
            return None
        gain = batch * self.middle(self.named(UNMERGED), 1) / self.middle(best, batch)
        return (best, batch, gain) if math.isfinite(gain) else None


def deployed_of(records: Sequence[Record], setup: StudySetup) -> Deployed:
    """Return what the records hold; nothing where nothing was timed."""
    timed = [record for record in records if record.tables.get("latency")]
    rows = [((r.arm.name, row["variant"]), row) for r in timed for row in r.tables["latency"]]
    ways = by_key(rows, lambda pair: pair[0])
    smallest = min((row["batch"] for _, row in rows), default=None)
    return Deployed(
        times={way: {row["batch"]: row["seconds"] for _, row in own} for way, own in ways.items()},
        prompts={way: float(np.median(row["prompt"])) for way, row in rows if row["batch"] == smallest},
        control={arm: (arm, row["control"]) for (arm, _), row in rows},
        weights={(r.arm.name, row["variant"]): row for r in timed for row in r.tables.get("weights", ())},
        items={(r.arm.name, name): values for r in timed for name, values in r.items.items()},
        refused={row["variant"]: row["reason"] for r in timed for row in r.tables.get("refused", ())},
        numbers={name: value for r in timed for name, value in r.numbers.items()},
        metric=metric_of(timed or records, setup),
        unit=next((r.texts["unit"] for r in timed if "unit" in r.texts), "token"),
    )


def adapters_of(way: Way) -> int:
    """Return how many adapters a way of several holds."""
    return int(way[1].split()[0])
