"""What timed forward passes say: tables, findings, and which published orders hold here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.studies import figures
from loralab.studies.evidence import seconds
from loralab.studies.measures.passes import MERGED, PLAIN, UNMERGED, Overhead, Shape, Way, growth, overhead
from loralab.studies.study import Figure, Finding, Record, Text
from loralab.studies.study import OldTable as Table

SMALL = 0.01  # of a pass: a difference below it is none that anyone would feel
SAME = 0.1  # half of what the lighter adapter costs in the paper: times this close are called alike
# LoRA paper, Table 1: adapters over the base, in per cent, at (1, 128), (16, 256), (32, 512)
PAPER = {"Adapter H": ("+30.3 %", "+8.4 %", "+3.0 %"), "Adapter L": ("+20.7 %", "+5.0 %", "+2.2 %")}
STATES = {MERGED: Text("merged", "已合併"), UNMERGED: Text("not merged", "未合併"), PLAIN: Text("", "")}


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds of one pass, by way and shape, one for each trial."""

    times: Mapping[Way, Mapping[Shape, Sequence[float]]]
    refused: Mapping[str, str]

    @staticmethod
    def of(records: Sequence[Record]) -> "Latencies":
        """What the records hold; nothing where nothing was timed."""
        times: dict[Way, dict[Shape, Sequence[float]]] = {}
        refused: dict[str, str] = {}
        for record in records:
            for row in record.tables.get("passes", ()):
                own = times.setdefault((row["variant"], row["state"]), {})
                own[row["batch"], row["length"]] = row["seconds"]
            refused |= {r["variant"]: r["reason"] for r in record.tables.get("refused", ())}
        return Latencies(times=times, refused=refused)

    @property
    def shapes(self) -> list[Shape]:
        """From the smallest to the largest."""
        return list(self.times.get((PLAIN, PLAIN), {}))

    def over(self, way: Way, shape: Shape, than: Way = (PLAIN, PLAIN)) -> Overhead | None:
        """How much longer a way takes than another; None if it was not timed."""
        ours, theirs = self.times.get(way, {}).get(shape), self.times.get(than, {}).get(shape)
        return overhead(ours, theirs) if ours and theirs else None

    def growth(self, way: Way) -> Overhead | None:
        """The overhead of the largest shape less that of the smallest."""
        own, base = self.times.get(way), self.times.get((PLAIN, PLAIN))
        if own is None or base is None or len(self.shapes) < 2:
            return None
        first, last = self.shapes[0], self.shapes[-1]
        return growth((own[first], own[last]), (base[first], base[last]))

    def named(self, way: Way) -> Text:
        """A way in words; what can never be merged needs not be called unmerged."""
        name, state = way
        if state == PLAIN or (name, MERGED) not in self.times:
            return Text(name, name)
        return Text(f"{name}, {STATES[state].en}", f"{name}，{STATES[state].zh}")

    def least(self, name: str) -> float:
        """The overhead at the smallest shape in the quickest way of a variant; inf if not timed."""
        own = [self.over(way, self.shapes[0]) for way in self.times if way[0] == name]
        return min((o.share for o in own if o is not None), default=math.inf)


def shown(shape: Shape) -> str:
    """A shape as batch x length."""
    return f"{shape[0]} × {shape[1]}"


def percent(share: float) -> str:
    """A share as a signed percentage."""
    return f"{100 * share:+.1f} %"


def cell(own: Overhead) -> str:
    """An overhead with its interval."""
    if not math.isfinite(own.low):
        return percent(own.share)
    return f"{percent(own.share)} ({percent(own.low)} … {percent(own.high)})"


def in_short(found: Latencies, name: str) -> Text:
    """The latency of a variant at the smallest shape, every way that it has."""
    parts = []
    for way in (w for w in found.times if w[0] == name):
        own = found.over(way, found.shapes[0])
        if own is not None:
            times = sorted(found.times[way][found.shapes[0]])
            words = f"{seconds(times[len(times) // 2])} ({percent(own.share)})"
            parts.append(_in_state(found, way, words))
    if not parts:
        return Text("not measured", "未測量")
    return Text("; ".join(p.en for p in parts), "；".join(p.zh for p in parts))


def _in_state(found: Latencies, way: Way, words: str) -> Text:
    """Words behind a variant's state, where it has two."""
    if (way[0], MERGED) not in found.times:
        return Text(words, words)
    return Text(f"{STATES[way[1]].en} {words}", f"{STATES[way[1]].zh} {words}")


def table(found: Latencies, adapters: Mapping[str, str]) -> list[Table]:
    """Median and range of every way and shape, its share over the base, and the paper's.

    Args:
        adapters: a variant's name -> the row of PAPER that it stands beside.
    """
    if not found.times:
        return []
    rows = []
    for way, own in found.times.items():
        cells = [_timed(found, way, shape) for shape in found.shapes if shape in own]
        paper = " / ".join(PAPER.get(adapters.get(way[0], ""), ("–",)))
        rows.append([found.named(way), *cells, paper])
    return [
        Table(
            title=Text(
                "One forward pass: median (range), and over the base with its 95 % interval",
                "單次前向傳播：中位數（範圍），以及比基礎模型多出的比例與 95% 信賴區間",
            ),
            columns=(
                Text("variant", "組別"),
                *(Text(f"batch × length {shown(s)}", f"批次 × 長度 {shown(s)}") for s in found.shapes),
                Text("LoRA paper at 1 × 128 / 16 × 256 / 32 × 512", "LoRA 論文：1 × 128 / 16 × 256 / 32 × 512"),
            ),
            rows=rows,
        )
    ]


def _timed(found: Latencies, way: Way, shape: Shape) -> str:
    times = sorted(found.times[way][shape])
    middle = seconds(times[len(times) // 2])
    words = f"{middle} ({seconds(times[0])} – {seconds(times[-1])})"
    own = found.over(way, shape)
    return words if own is None or way == (PLAIN, PLAIN) else f"{words}; {cell(own)}"


def figure(found: Latencies) -> list[Figure]:
    """What every way adds to a pass of the base."""
    rows = [
        {"arm": found.named(way).en, "value": own.share, "group": shown(shape)}
        for way in found.times
        if way != (PLAIN, PLAIN)
        for shape in found.shapes
        if (own := found.over(way, shape)) is not None
    ]
    if not rows:
        return []
    return [
        figures.old(
            "bars",
            "latency",
            Text("Forward pass: time over that of the base", "前向傳播：比基礎模型多花的時間"),
            rows,
            x=Text("variant", "組別"),
            y=Text("more time", "多出的時間"),
            group=Text("batch × length", "批次 × 長度"),
            percent=True,
        )
    ]


def findings(found: Latencies) -> list[Finding]:
    """Every way against the base at the smallest shape, where it costs most."""
    return [
        _finding(found.named(way), found.shapes[0], own)
        for way in found.times
        if way != (PLAIN, PLAIN)
        if (own := found.over(way, found.shapes[0])) is not None
    ]


def _finding(name: Text, shape: Shape, own: Overhead) -> Finding:
    at = shown(shape)
    span = f"{percent(own.low)} … {percent(own.high)}"
    if not own.holds:
        sentence = Text(
            f"At {at} a forward pass of {name.en} and one of the base differ by no more than noise ({span}).",
            f"批次 × 長度 {at} 時，{name.zh} 與基礎模型的前向傳播時間沒有超出雜訊的差異（{span}）。",
        )
    else:
        word = ("longer", "多花") if own.share > 0 else ("less", "少花")
        size = f"{100 * abs(own.share):.1f} %"
        sentence = Text(
            f"At {at} a forward pass of {name.en} takes {size} {word[0]} than one of the base (95 % interval {span}).",
            f"批次 × 長度 {at} 時，{name.zh} 的前向傳播比基礎模型{word[1]} {size} 的時間（95% 信賴區間 {span}）。",
        )
    return Finding(sentence=sentence, holds=own.holds, effect=-own.share, low=-own.high, high=-own.low)
