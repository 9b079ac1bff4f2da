"""Records of the low-rank study -> spectra, d90 and shared directions, each beside its chance level."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.contrast import SEED, Contrast
from loralab.studies.evidence import MARGIN, Metric
from loralab.studies.measures.dimension import Curve, Items, curve_of, floor_of, interval, smallest, target
from loralab.studies.measures.overlaps import LARGE, SIDES, SMALL, logs
from loralab.studies.measures.spectra import SHARES, shares_of
from loralab.studies.message import Chart, Message
from loralab.studies.statistics import difference
from loralab.studies.study import Record
from loralab.studies.subspace import VARIANTS

LOW = 0.25  # of all directions: an update of which so many hold 90 % of the energy is low-rank
SHARE_MARGIN = MARGIN / 100
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Spectra:
    """Spectra of the update of every module, one list for each seed."""

    seeds: Sequence[Rows]

    @property
    def modules(self) -> Rows:
        """Return the modules of the first seed."""
        return self.seeds[0]

    @property
    def kinds(self) -> dict[str, Rows]:
        """Return the modules by their kind, one of each layer."""
        names = dict.fromkeys(row["module"] for row in self.modules)
        return {name: [row for row in self.modules if row["module"] == name] for name in names}

    @property
    def fewer(self) -> Contrast:
        """Compare the share of directions that hold 90 % of the energy with that of random matrices."""
        ours = [shares_of(rows) for rows in self.seeds]
        theirs = [shares_of(rows, "random_rank90") for rows in self.seeds]
        return over_modules(theirs, ours, margin=SHARE_MARGIN)

    @property
    def are_low(self) -> bool:
        """Tell whether the median module is low-rank."""
        return statistics.median(shares_of(self.modules)) <= LOW

    def middle(self, key: str, kind: str | None = None) -> float:
        """Return the median of a number over all modules, or over those of a kind."""
        return statistics.median(float(row[key]) for row in self.modules if kind in (None, row["module"]))

    def beside_chance(self, key: str, kind: str) -> Message:
        """Write the median of a rank over the modules of a kind, and that of random matrices."""
        return Message("lowrank.beside", value=self.middle(key, kind), chance=self.middle(f"random_{key}", kind))

    @property
    def curves(self) -> Rows:
        """Return energy against the share of directions: the median of each kind, and random matrices."""
        curves: dict[Any, Any] = {name: [row["energy"] for row in rows] for name, rows in self.kinds.items()}
        for row in self.modules:
            small, large = sorted(row["shape"])
            curves.setdefault(Message("lowrank.random", small=small, large=large), [row["random_energy"]])
        return [
            {"arm": name, "x": x, "y": float(y)}
            for name, own in curves.items()
            for x, y in zip(SHARES, np.median(np.asarray(own, dtype=float), axis=0), strict=True)
        ]

    @property
    def layers(self) -> Rows:
        """Return the share of directions that hold 90 % of the energy, by layer and kind."""
        return [
            {"x": "–" if row["layer"] < 0 else str(row["layer"]), "y": row["module"], "value": share}
            for row, share in zip(self.modules, shares_of(self.modules), strict=True)
        ]

    @property
    def charts(self) -> list[Chart]:
        """Draw energy against rank, and the share of directions of every layer and module."""
        title, x, y = (Message(f"lowrank.{name}") for name in ("energy_chart", "of_directions", "of_energy"))
        kind, layer, share = Message("axis.module"), Message("column.layer"), Message("axis.share")
        few = {"numbers": len({row["x"] for row in self.layers}) <= 16}
        heat, options = Message("lowrank.layers_chart"), {"log_x": True, "percent": True}
        return [
            Chart("lines", "lowrank-energy", title, self.curves, x, y, kind, options),
            Chart("heat", "lowrank-layers", heat, self.layers, layer, kind, share, few),
        ]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Scores in random subspaces, and those that d90 stands between; larger is better.

    Attributes:
        full, floor: of every test row; None where they were not measured.
        large: D, the number of weights that move.
    """

    curves: Mapping[str, Curve]
    full: Items | None
    floor: Items | None
    large: int

    def rows(self, metric: Metric) -> Rows:
        """Return the score of every variant and d."""
        points = [(variant, d, float(items.mean())) for variant, own in self.curves.items() for d, items in own.items()]
        scores = [value if metric.rises else -value for _, _, value in points]
        return [
            {"arm": variant.upper(), "x": d, "y": y, "of": d / max(1, self.large), "score": metric.value(y)}
            for (variant, d, _), y in zip(points, scores, strict=True)
        ]

    @property
    def goal(self) -> float | None:
        """Return the score that d90 has to reach."""
        return None if self.full is None or self.floor is None else target(self.full, self.floor)

    def d90(self, metric: Metric) -> dict[str, "Reached"] | None:
        """Return d90 of every variant; nothing where full fine-tuning gains nothing, None where that is not known."""
        if self.full is None or self.floor is None:
            return None
        margin = metric.margin_at(abs(float(self.floor.mean())))
        gain = difference([self.full.tolist()], [self.floor.tolist()], margin=margin)
        if gain.verdict != "better":
            return {}
        found = {}
        for variant, curve in self.curves.items():
            low, high = interval(curve, self.full, self.floor, np.random.default_rng(SEED))
            value = smallest(curve, self.full, self.floor)
            found[variant] = Reached(tried=list(curve), value=value, low=low, high=high)
        return found


@dataclass(frozen=True, kw_only=True)
class Reached:
    """The smallest d that reaches the target; infinity stands for none of those tried."""

    tried: Sequence[int]
    value: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """Return what is known of d90: found, at_most, not_below, open or beyond.

        `not_below` is an interval that begins at the largest d and has no end: it says nothing of
        that d itself.
        """
        if math.isinf(self.low):
            return "beyond"
        if math.isinf(self.high) and self.low == max(self.tried):
            return "not_below"
        if math.isinf(self.value):
            return "open"
        return "at_most" if self.value == min(self.tried) else "found"


@dataclass(frozen=True)
class Pairs:
    """Directions of pairs of LoRA runs, one record for each seed."""

    records: Sequence[Record]

    def first(self, pair: str, side: str) -> tuple[Contrast, float, float]:
        """Compare phi(1, TOP) of a pair with its chance level; return the medians of both too."""
        tables = [record.tables["modules"] for record in self.records]
        ours, theirs = (
            [[float(row[key]) for row in rows] for rows in tables]
            for key in (f"{pair} {side}", f"{pair} {side} chance")
        )
        found = over_modules(ours, theirs, 2 * len(SIDES), margin=SHARE_MARGIN)
        own, chance = (statistics.median(v for values in group for v in values) for group in (ours, theirs))
        return found, own, chance

    def phi(self, pair: str, side: str) -> Rows:
        """Return phi(i, j) less its chance level, for a heat map."""
        rows = [row for row in self.records[0].tables["phi"] if (row["pair"], row["side"]) == (pair, side)]
        return [{"x": str(row["j"]), "y": str(row["i"]), "value": row["phi"] - row["chance"]} for row in rows]

    @property
    def amplification(self) -> Rows:
        """Return what W has in the directions of every module's update."""
        return [row for record in self.records for row in record.tables["amplification"]]

    def middle(self, rank: int, key: str) -> float:
        """Return the median of a number of `amplification` over modules."""
        return statistics.median(float(row[key]) for row in self.amplification if row["rank"] == rank)

    def by_chance(self, rank: int) -> float:
        """Return the amplification of random directions, the median of modules."""
        rows = [row for row in self.amplification if row["rank"] == rank]
        return statistics.median(row["update"] / max(row["chance"], 1e-30) for row in rows)

    @property
    def order(self) -> dict[tuple[str, int], Contrast]:
        """Compare chance < the update's subspace < W's own, for both ranks; a small r amplifies more."""
        asked = {("inside", rank): ((rank, "inside"), (rank, "chance")) for rank in (SMALL, LARGE)}
        asked |= {("own", rank): ((rank, "own"), (rank, "inside")) for rank in (SMALL, LARGE)}
        asked["amplifies", SMALL] = ((SMALL, "factor"), (LARGE, "factor"))
        tables = [record.tables["amplification"] for record in self.records]
        found = {}
        for name, (ours, theirs) in asked.items():
            left, right = ([logs(rows, *which) for rows in tables] for which in (ours, theirs))
            found[name] = over_modules(left, right, len(asked))
        return found


def over_modules(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], comparisons: int = 1, margin: float = 0.0
) -> Contrast:
    """Compare numbers that are paired by module; modules and seeds are the sample."""
    return difference(ours, theirs, comparisons=comparisons, margin=margin)


def spectra_of(records: Sequence[Record], full: str) -> list[Spectra]:
    """Return the spectra of the arm of the full fine-tune; none where it has no result."""
    scored = (record for record in records if record.arm.name == full and record.items.get("score"))
    found = [record.tables["modules"] for record in scored if record.tables.get("modules")]
    return [Spectra(found)] if found else []


def pairs_of(records: Sequence[Record], pairs: str) -> list[Pairs]:
    """Return the directions of the arm that holds the pairs; none where it has no result."""
    found = [record for record in records if record.arm.name == pairs and record.tables.get("modules")]
    return [Pairs(found)] if found else []


def dimension_of(records: Sequence[Record], full: str) -> list[Dimension]:
    """Return the scores in random subspaces; none where there are none."""
    curves = {variant: found for variant in VARIANTS if (found := curve_of(records, variant))}
    scores = [r.items["score"] for r in records if r.arm.name == full and r.items.get("score")]
    mean = np.asarray(scores, dtype=float).mean(axis=0) if scores else None
    large = round(max((record.numbers.get("large", 0) for record in records), default=0))
    return [Dimension(curves=curves, full=mean, floor=floor_of(records), large=large)] if curves else []
