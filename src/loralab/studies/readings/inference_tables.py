"""Findings, tables and charts of timed deployments."""

import math
from dataclasses import replace

import numpy as np

from loralab.studies import figures
from loralab.studies.evidence import claim, seconds, size
from loralab.studies.measures.deployed import DENSE
from loralab.studies.measures.passes import Overhead
from loralab.studies.readings.inference_words import (
    Deployed,
    Way,
    bytes_of,
    score_change,
    score_of,
    scored_ways,
    shown,
    told,
)
from loralab.studies.readings.latencies import percent
from loralab.studies.study import Figure, Finding, Text
from loralab.studies.study import OldTable as Table


def findings(found: Deployed) -> list[Finding]:
    """Every way against its control, at the smallest and at the largest batch."""
    claims = []
    for way in found.ways:
        own = sorted(found.times[way])
        for batch in dict.fromkeys((own[0], own[-1])):
            ratio = found.over(way, batch)
            if ratio is not None:
                claims.append(_finding(found, way, batch, ratio))
    return claims


def _finding(found: Deployed, way: Way, batch: int, own: Overhead) -> Finding:
    name = found.called(way)
    control = found.called(found.control[way[0]])
    span = f"{percent(own.low)} … {percent(own.high)}"
    if told(own):
        word = ("longer", "多花") if own.share > 0 else ("less", "少花")
        part = f"{100 * abs(own.share):.1f} %"
        sentence_ = Text(
            f"At batch {batch} {name.en} takes {part} {word[0]} for {found.each.en} than "
            f"{control.en} (95 % interval {span}).",
            f"批次 {batch} 時，{name.zh}{found.each.zh}比{control.zh}{word[1]} {part} 的時間（95% 信賴區間 {span}）。",
        )
    else:
        sentence_ = Text(
            f"At batch {batch} {name.en} and {control.en} differ by no more than noise ({shown(own)}).",
            f"批次 {batch} 時，{name.zh}與{control.zh}沒有超出雜訊的差異（{shown(own)}）。",
        )
    return Finding(sentence=sentence_, holds=told(own), effect=-own.share, low=-own.high, high=-own.low)


def scores(found: Deployed) -> list[Finding]:
    """Every scored way against its control, row by row."""
    claims, ways = [], scored_ways(found)
    for way in ways:
        own = score_change(found, way, len(ways))
        assert own is not None
        other = found.called(found.control[way[0]]).en
        claims.append(claim(replace(own, a=way[1], b=other), found.metric))
    return claims


def tables_of(found: Deployed) -> list[Table]:
    """Times at every batch; then throughput, weights and scores."""
    batches = found.batches()
    each = found.each
    times = [[found.called(way), *(_timed(found, way, b) for b in batches)] for way in found.times]
    others = [
        [
            found.called(way),
            *(_rate(found, way, b) for b in batches),
            size(bytes_of(found, way)),
            size(_working(found, way)),
            _prompt(found, way, batches[0]),
            score_of(found, way),
        ]
        for way in found.times
    ]
    unit = Text("tokens/s", "token/s") if found.unit == "token" else Text("rows/s", "筆/s")
    tables = [
        Table(
            title=Text(
                f"Time of {each.en}: median (range); over the control, 95 % interval",
                f"{each.zh}的時間：中位數（範圍）；相對對照組與 95% 信賴區間",
            ),
            columns=(Text("variant", "組別"), *(Text(f"batch {b}", f"批次 {b}") for b in batches)),
            rows=times,
        ),
        Table(
            title=Text("Throughput, memory, score", "吞吐量、記憶體、分數"),
            columns=(
                Text("variant", "組別"),
                *(Text(f"{unit.en}, batch {b}", f"{unit.zh}，批次 {b}") for b in batches),
                Text("weights", "權重"),
                Text("needed beside them", "權重以外的需求"),
                Text("reading the prompt", "讀取提示"),
                Text(f"test {found.metric.text.en}", f"測試{found.metric.text.zh}"),
            ),
            rows=others,
        ),
    ]
    if found.refused:
        tables.append(
            Table(
                title=Text("What could not be measured", "無法測量的組別"),
                columns=(Text("variant", "組別"), Text("reason", "原因")),
                rows=[[name, reason] for name, reason in found.refused.items()],
            )
        )
    return tables


def _timed(found: Deployed, way: Way, batch: int) -> str:
    own = sorted(found.times[way].get(batch, ()))
    if not own:
        return "–"
    words = f"{seconds(found.middle(way, batch))} ({seconds(own[0])} – {seconds(own[-1])})"
    return words if way == found.control[way[0]] else f"{words}; {shown(found.over(way, batch))}"


def _rate(found: Deployed, way: Way, batch: int) -> str:
    value = batch / found.middle(way, batch)
    return f"{value:.0f}" if math.isfinite(value) else "–"


def _prompt(found: Deployed, way: Way, batch: int) -> str:
    own = found.prompts[way].get(batch)
    return seconds(float(np.median(own))) if own else "–"


def _working(found: Deployed, way: Way) -> float:
    value = found.weights.get(way, {}).get("working")
    return math.nan if value is None else float(value)


def figures_of(found: Deployed) -> list[Figure]:
    """What every way adds to its control, and what it gives a second."""
    batches = found.batches()
    over = [
        {"arm": way[1], "value": own.share, "group": f"{batch}"}
        for way in found.ways
        for batch in batches
        if (own := found.over(way, batch)) is not None
    ]
    rates = [
        {
            "arm": way[1] if way[1] != DENSE else f"{DENSE} ({way[0]})",
            "value": batch / found.middle(way, batch),
            "group": f"{batch}",
        }
        for way in found.times
        for batch in batches
        if found.times[way].get(batch)
    ]
    batch, arm = Text("batch", "批次"), Text("variant", "組別")
    drawn = [
        figures.old(
            "bars",
            "inference-throughput",
            Text("Throughput", "吞吐量"),
            rates,
            x=arm,
            y=Text(
                "tokens a second" if found.unit == "token" else "rows a second",
                "每秒 token 數" if found.unit == "token" else "每秒筆數",
            ),
            group=batch,
        )
    ]
    if over:
        drawn.insert(
            0,
            figures.old(
                "bars",
                "inference-latency",
                Text("Time over that of the control", "比對照組多花的時間"),
                over,
                x=arm,
                y=Text("more time", "多出的時間"),
                group=batch,
                percent=True,
            ),
        )
    return drawn
