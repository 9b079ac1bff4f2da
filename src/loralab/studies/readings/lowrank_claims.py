"""What the records of the low-rank study support, said with its interval."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.contrast import Contrast
from loralab.studies.evidence import SEED, count
from loralab.studies.measures.dimension import SHARE, Curve, Items, curve_of, floor_of, interval, smallest
from loralab.studies.measures.overlaps import LARGE, RANKS, SEEDS, SIDES, SMALL, TOP, logs
from loralab.studies.measures.spectra import shares_of
from loralab.studies.statistics import difference
from loralab.studies.study import Finding, Record, Text
from loralab.studies.subspace import VARIANTS

LOW = 0.25  # of all directions: an update of which so many hold 90 % of the energy is low-rank
Rows = Sequence[Mapping[str, Any]]
SIDE_NAMES = {"input": Text("input side", "輸入側"), "output": Text("output side", "輸出側")}
PAIR_NAMES = {
    RANKS: Text(f"r={SMALL} and r={LARGE}", f"r={SMALL} 與 r={LARGE}"),
    SEEDS: Text(f"two seeds of r={LARGE}", f"r={LARGE} 的兩個隨機種子"),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the answer: its sentence and the claims behind it."""

    sentence: Text
    findings: Sequence[Finding]


@dataclass(frozen=True, kw_only=True)
class Read:
    """The records, sorted: one entry for each seed in all lists of rows."""

    full: Sequence[Record]
    spectra: Sequence[Rows]
    pairs: Sequence[Record]
    curves: Mapping[str, Curve]
    floor: Items | None
    large: int

    @staticmethod
    def of(records: Sequence[Record], *, full: str, pairs: str) -> "Read":
        """What is there; anything may be missing."""
        whole = [r for r in records if r.arm.name == full and r.items.get("score")]
        curves = {v: found for v in VARIANTS if (found := curve_of(records, v))}
        return Read(
            full=whole,
            spectra=[r.tables["modules"] for r in whole if r.tables.get("modules")],
            pairs=[r for r in records if r.arm.name == pairs and r.tables.get("modules")],
            curves=curves,
            floor=floor_of(records),
            large=round(max((r.numbers.get("large", 0) for r in records), default=0)),
        )

    @property
    def modules(self) -> Rows:
        """The spectra of the first seed's layers."""
        return self.spectra[0] if self.spectra else ()


def over_modules(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], comparisons: int = 1) -> Contrast:
    """Ours less theirs, paired by module; seeds are averaged where they have the same modules."""
    return difference(ours, theirs, comparisons=comparisons, generator=np.random.default_rng(SEED))


def spectrum(read: Read) -> Part | None:
    """Tell whether the update needs fewer directions than a random matrix, and whether few."""
    if not read.spectra:
        return None
    ours = [shares_of(rows) for rows in read.spectra]
    theirs = [shares_of(rows, "random_rank90") for rows in read.spectra]
    found = over_modules(theirs, ours)
    rows = read.modules
    middle, chance, most = (statistics.median(row[key] for row in rows) for key in ("rank90", "random_rank90", "most"))
    facts = Text(
        f"90 % of the energy of a layer's update lies in {middle:.0f} of {most:.0f} directions (median; a "
        f"random matrix needs {chance:.0f})",
        f"各層更新 90% 的能量集中在 {most:.0f} 個方向中的 {middle:.0f} 個（中位數；隨機矩陣要 {chance:.0f} 個）",
    )
    low = statistics.median(shares_of(rows)) <= LOW
    if not found.holds or found.estimate <= 0:
        verdict = Text(
            ": the update of the full fine-tune is not of lower rank than chance here.",
            "：在此完整微調的更新並不比隨機矩陣低秩。",
        )
    elif low:
        verdict = Text(": the update is low-rank.", "：更新是低秩的。")
    else:
        verdict = Text(
            ": fewer than chance, but not few; the update of this run is not low-rank.",
            "：少於隨機矩陣，但仍不算少；這次訓練的更新不算低秩。",
        )
    sentence = Text(facts.en + verdict.en, facts.zh + verdict.zh)
    words = (
        Text(
            "an update needs a smaller share of its directions for 90 % of its energy than a random matrix does",
            "更新含 90% 能量所需的方向比例小於隨機矩陣",
        ),
        Text(
            "an update needs no smaller share of its directions than a random matrix",
            "更新所需的方向比例不小於隨機矩陣",
        ),
    )
    return Part(sentence=sentence, findings=[said(*words, found)])


def dimension(read: Read) -> Part | None:
    """d90 of each variant against D, with its interval; or that the target was not reached."""
    if not (read.curves and read.full and read.floor is not None):
        return None
    items = np.asarray([r.items["score"] for r in read.full], dtype=float).mean(axis=0)
    gain = difference([items.tolist()], [read.floor.tolist()], generator=np.random.default_rng(SEED))
    if not (gain.holds and gain.estimate > 0):
        return Part(
            sentence=Text(
                "Full fine-tuning gains nothing beyond noise here, so there is no d90.",
                "完整微調在此沒有超出雜訊的增益，因此沒有 d90 可言。",
            ),
            findings=[],
        )
    findings = [_d90(v, curve, items, read.floor, read.large) for v, curve in read.curves.items()]
    sentence = findings[0].sentence
    for other in findings[1:]:
        sentence += other.sentence
    return Part(sentence=sentence, findings=findings)


def _d90(variant: str, curve: Curve, full: Items, floor: Items, large: int) -> Finding:
    """The smallest d that reaches the target; it holds where the whole interval was reached."""
    name, largest, first = variant.upper(), max(curve), min(curve)
    found = smallest(curve, full, floor)
    low, high = interval(curve, full, floor, np.random.default_rng(SEED))
    share = round(100 * SHARE)
    ends = _ends(low, high, largest)
    if math.isinf(found):
        sentence = Text(
            f"{name}: no d up to {largest:,} of D = {large:,} reaches {share} % of full fine-tuning's "
            f"gain (95 % interval of d90 {ends}).",
            f"{name}：在 D = {large:,} 中，直到 d = {largest:,} 都沒有達到完整微調增益的 {share}%"
            f"（d90 的 95% 信賴區間 {ends}）。",
        )
        return Finding(sentence=sentence, holds=False)
    part = 100 * found / max(1, large)
    bound = "at most " if found == first else ""
    bound_zh = "至多 " if found == first else ""
    sentence = Text(
        f"{name}: d90 is {bound}{found:,.0f} of D = {large:,} ({part:.2g} %; 95 % interval {ends}, "
        f"tried: {', '.join(f'{d:,}' for d in curve)}).",
        f"{name}：d90 為 {bound_zh}{found:,.0f}，D = {large:,}（{part:.2g}%；95% 信賴區間 {ends}；"
        f"試過的 d：{'、'.join(f'{d:,}' for d in curve)}）。",
    )
    return Finding(
        sentence=sentence, holds=math.isfinite(high), effect=found, low=low, high=high if math.isfinite(high) else None
    )


def _ends(low: float, high: float, largest: int) -> str:
    """An interval of d90; what lies beyond the largest d that was tried is not known better."""
    if math.isinf(low):
        return f"> {largest:,}"
    return f"{count(low)} … {count(high) if math.isfinite(high) else f'> {largest:,}'}"


def overlap(read: Read) -> Part | None:
    """Tell whether the strongest direction of one update is among the first of another, on both sides."""
    if not read.pairs:
        return None
    tables = [r.tables["modules"] for r in read.pairs]
    findings = []
    for pair, pair_name in PAIR_NAMES.items():
        for side in SIDES:
            key, where = f"{pair} {side}", SIDE_NAMES[side]
            ours = [[float(row[key]) for row in rows] for rows in tables]
            theirs = [[float(row[f"{key} chance"]) for row in rows] for rows in tables]
            found = over_modules(ours, theirs, 2 * len(SIDES))
            own, by_chance = (statistics.median(v for values in group for v in values) for group in (ours, theirs))
            level = f"phi(1, {TOP}) = {own:.3f}, chance {by_chance:.3f}"
            level_zh = f"phi(1, {TOP}) = {own:.3f}，隨機水準 {by_chance:.3f}"
            findings.append(
                said(
                    Text(
                        f"{pair_name.en} share their first direction on the {where.en} ({level})",
                        f"{pair_name.zh} 在{where.zh}共享第一個方向（{level_zh}）",
                    ),
                    Text(
                        f"{pair_name.en} share no more than chance on the {where.en} ({level})",
                        f"{pair_name.zh} 在{where.zh}的重疊不高於隨機水準（{level_zh}）",
                    ),
                    found,
                )
            )
    return Part(sentence=_shared(findings), findings=findings)


def _shared(findings: Sequence[Finding]) -> Text:
    """How many of the comparisons lie above chance, the first pair's named."""
    above = [f for f in findings if f.holds and (f.effect or 0) > 0]
    if not above:
        return Text(
            "Directions of two LoRA runs overlap no more than chance.", "兩次 LoRA 訓練的方向重疊不高於隨機水準。"
        )
    best = max(above, key=lambda f: f.effect or 0.0)
    return best.sentence


def order(read: Read) -> list[Finding]:
    """Chance < the update's subspace < W's own, for both ranks; a small r amplifies more."""
    tables = [r.tables["amplification"] for r in read.pairs]
    if not tables:
        return []

    def compared(ours: tuple[int, str], theirs: tuple[int, str]) -> Contrast:
        left, right = ([logs(rows, *which) for rows in tables] for which in (ours, theirs))
        return over_modules(left, right, 5)

    findings = []
    for rank in (SMALL, LARGE):
        findings += [
            said(
                Text(
                    f"W is larger in the subspace of the r={rank} update than in a random one",
                    f"W 在 r={rank} 更新的子空間中大於在隨機子空間中",
                ),
                Text(
                    f"W is no larger in the subspace of the r={rank} update than in a random one",
                    f"W 在 r={rank} 更新的子空間中不大於在隨機子空間中",
                ),
                compared((rank, "inside"), (rank, "chance")),
            ),
            said(
                Text(
                    f"W's own first {rank} directions are larger than what it has in the subspace of "
                    f"the r={rank} update",
                    f"W 自己的前 {rank} 個方向大於它在 r={rank} 更新子空間中的量",
                ),
                Text(
                    f"W's own first {rank} directions are no larger than the r={rank} update's subspace",
                    f"W 自己的前 {rank} 個方向不大於它在 r={rank} 更新子空間中的量",
                ),
                compared((rank, "own"), (rank, "inside")),
            ),
        ]
    findings.append(
        said(
            Text(f"r={SMALL} amplifies its directions more than r={LARGE}", f"r={SMALL} 的放大倍數高於 r={LARGE}"),
            Text(f"r={SMALL} amplifies its directions no more than r={LARGE}", f"r={SMALL} 的放大倍數不高於 r={LARGE}"),
            compared((SMALL, "factor"), (LARGE, "factor")),
        )
    )
    return findings


def amplified(read: Read) -> Text | None:
    """The amplification factors beside what chance alone would give, and whether the order holds."""
    if not read.pairs:
        return None
    rows = [row for r in read.pairs for row in r.tables["amplification"]]
    words = []
    for rank in (SMALL, LARGE):
        own = [row for row in rows if row["rank"] == rank]
        factor = statistics.median(row["factor"] for row in own)
        chance = statistics.median(row["update"] / max(row["chance"], 1e-30) for row in own)
        words.append((rank, factor, chance))
    held = order(read)
    whole = all(f.holds and (f.effect or 0) > 0 for f in held)
    listed = "; ".join(f"r={r}: {f:.2g} (random directions {c:.2g})" for r, f, c in words)
    listed_zh = "；".join(f"r={r}：{f:.2g}（隨機方向 {c:.2g}）" for r, f, c in words)
    tail = (
        Text(
            "chance < the update's subspace < W's own first directions holds.",
            "隨機水準 < 更新的子空間 < W 自己的主要方向，成立。",
        )
        if whole
        else Text(
            f"Of the {len(held)} parts of the expected order, "
            f"{sum(f.holds and (f.effect or 0) > 0 for f in held)} hold beyond noise.",
            f"預期順序的 {len(held)} 項中，有 "
            f"{sum(f.holds and (f.effect or 0) > 0 for f in held)} 項以超出雜訊的幅度成立。",
        )
    )
    return Text(f"Amplification {listed}; {tail.en}", f"放大倍數 {listed_zh}；{tail.zh}")


def said(above: Text, otherwise: Text, found: Contrast) -> Finding:
    """The first sentence where the difference is above zero beyond noise, else the second."""
    span = f"95 % interval of the difference {found.low:+.3g} … {found.high:+.3g}"
    span_zh = f"差異的 95% 信賴區間 {found.low:+.3g} … {found.high:+.3g}"
    words = above if found.holds and found.estimate > 0 else otherwise
    return Finding(
        sentence=Text(f"{_capital(words.en)} ({span}).", f"{words.zh}（{span_zh}）。"),
        holds=found.holds,
        effect=found.estimate,
        low=found.low,
        high=found.high,
    )


def _capital(words: str) -> str:
    """A sentence's first letter; r=8 stays as it is."""
    return words if words.startswith("r=") else words[0].upper() + words[1:]
