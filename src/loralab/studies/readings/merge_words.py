"""What merging changed, in words, tables and charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loralab.studies import figures
from loralab.studies.evidence import SEED, Metric, claim, plain, seconds
from loralab.studies.measures.drift import NOTED
from loralab.studies.measures.merging import AFTER, BEFORE
from loralab.studies.measures.passes import median_interval
from loralab.studies.statistics import difference
from loralab.studies.study import Figure, Finding, Record, Text
from loralab.studies.study import OldTable as Table

EXPECTED = 1e-6  # the source's own expectation of the difference in loss
AGAIN, DRIFT = "NF4 → NF4", "100 merges"
Rows = Sequence[Mapping[str, Any]]


def tiny(value: float) -> str:
    """A number of any size."""
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def share(value: float) -> str:
    """A share as a percentage."""
    return "–" if math.isnan(value) else f"{100 * value:.3g} %"


def resolution(loss: float) -> float:
    """The distance from a loss to the next number that fp32 holds."""
    return float(np.spacing(np.float32(abs(loss))))


def blanks(found: Mapping[str, Record]) -> list[tuple[Text, Text]]:
    """What the source's program prints, and whether its expectation holds."""
    label = Text("Difference (fp32)", "Difference（fp32）")
    missing = Text("not measured", "未測量")
    own = found.get("fp32")
    filled = [(label, missing if own is None else _difference(own))]
    filled.append(
        (
            Text("Expected: below 1e-6 (numerical error)", "預期結果：差異應該 < 1e-6（數值誤差範圍內）"),
            missing if own is None else _expectation(own),
        )
    )
    for name, record in found.items():
        if name != "fp32":
            words = Text(f"Difference ({name})", f"Difference（{name}）")
            filled.append((words, _difference(record)))
    return filled


def _difference(record: Record) -> Text:
    n = record.numbers
    value, loss = tiny(n["loss_difference"]), plain(n["loss_before"])
    part = share(n["loss_difference"] / abs(n["loss_before"])) if n["loss_before"] else "–"
    return Text(
        f"{value} (of a loss of {loss}: {part}); {_answers(record).en}",
        f"{value}（損失 {loss} 的 {part}）；{_answers(record).zh}",
    )


def _answers(record: Record) -> Text:
    n = record.numbers
    top = share(n["top1"])
    if "changed" not in n:
        return Text(f"the likeliest token is the same at {top} of positions", f"最可能的 token 有 {top} 相同")
    changed, rows = int(n["changed"]), int(n["rows"])
    return Text(
        f"{changed} of {rows} answers change, the likeliest token is the same at {top} of positions",
        f"{rows} 個答案中有 {changed} 個改變，最可能的 token 有 {top} 相同",
    )


def _expectation(record: Record) -> Text:
    n = record.numbers
    if n["loss_difference"] < EXPECTED:
        return Text("holds", "成立")
    unit = tiny(resolution(n["loss_before"]))
    return Text(
        f"does not hold here: fp32 itself tells losses of this size apart by {unit} at best, and "
        f"the sum over layers adds to that",
        f"在此不成立：fp32 對這個大小的損失最多只能分辨 {unit}，逐層累加後更大",
    )


def sentence(found: Mapping[str, Record], drifts: Rows) -> Text:
    """The answer: fp32, then what else moved, then the way back."""
    parts = [_fp32(found.get("fp32")), _others(found), _again(found.get(AGAIN)), _way_back(drifts)]
    said = [part for part in parts if part is not None]
    if not said:
        return Text("Only part of the comparison has been measured.", "目前只測量了部分比較。")
    whole = said[0]
    for part in said[1:]:
        whole += part
    return whole


def _fp32(record: Record | None) -> Text | None:
    if record is None:
        return None
    n = record.numbers
    value, loss = tiny(n["loss_difference"]), plain(n["loss_before"])
    if n["loss_difference"] < EXPECTED and not n.get("changed"):
        return Text(
            f"In fp32 merging changes nothing beyond rounding: the loss differs by {value} (of {loss}), "
            f"below 1e-6; {_answers(record).en}.",
            f"在 fp32 下合併只有捨入誤差：損失差異 {value}（損失 {loss}），小於 1e-6；{_answers(record).zh}。",
        )
    words = ("stays below", "小於") if n["loss_difference"] < EXPECTED else ("exceeds", "超過")
    return Text(
        f"In fp32 the loss differs by {value} (of {loss}), which {words[0]} the expected 1e-6; {_answers(record).en}.",
        f"在 fp32 下損失差異 {value}（損失 {loss}），{words[1]}預期的 1e-6；{_answers(record).zh}。",
    )


def _others(found: Mapping[str, Record]) -> Text | None:
    own = {n: r for n, r in found.items() if n not in ("fp32", AGAIN)}
    if not own:
        return None
    en = "; ".join(f"{name}: loss {tiny(r.numbers['loss_difference'])}, {_answers(r).en}" for name, r in own.items())
    zh = "；".join(f"{name}：損失差 {tiny(r.numbers['loss_difference'])}，{_answers(r).zh}" for name, r in own.items())
    return Text(f"In other forms: {en}.", f"其他形式：{zh}。")


def _again(record: Record | None) -> Text | None:
    if record is None or "kept" not in record.numbers:
        return None
    part = share(record.numbers["kept"])
    return Text(
        f"Packed into NF4 again, the median layer keeps {part} of its update.",
        f"合併後再量化回 NF4，中位數的層只保留 {part} 的更新。",
    )


def _way_back(drifts: Rows) -> Text | None:
    if not drifts:
        return None
    worst = max(drifts, key=lambda row: float(np.mean(_last(row))))
    off = share(float(np.mean(_last(worst))))
    if all(row["exact"] for row in drifts):
        return Text(
            f"After 100 merges of three adapters the base is back bit for bit; subtracting the update "
            f"instead leaves {worst['precision']} weights {off} off.",
            f"三個 adapter 輪流合併 100 次後，基礎權重逐位元還原；若改用減回去的方式，{worst['precision']} 權重會偏離 {off}。",
        )
    return Text(
        "After 100 merges some weights of the base did not come back: a defect.",
        "合併 100 次後有部分基礎權重沒有還原：這是缺陷。",
    )


def _last(row: Mapping[str, Any]) -> list[float]:
    """The drift of every module after all merges."""
    return [values[-1] for values in row["relative"]]


def drift_rows(records: Sequence[Record]) -> Rows:
    """The measured drifts, one row for each dtype."""
    return [row for r in records for row in r.tables.get("drift", ())]


def states(arm: str) -> tuple[str, str]:
    """How a form of the base is called after and before merging."""
    return (AGAIN, "NF4 unmerged") if arm == AGAIN else (f"{arm} merged", f"{arm} unmerged")


def loss_finding(record: Record, family: int) -> Finding | None:
    """Tell whether the loss changed, row by row; None where rows have no losses of their own."""
    now, was = (record.items.get(f"{name} loss", ()) for name in (AFTER, BEFORE))
    if len(now) < 2:
        return None
    loss = Metric(name="loss")
    own = difference(
        [now],
        [was],
        generator=np.random.default_rng(SEED),
        comparisons=family,
        margin=loss.margin_at(abs(float(np.mean(was)))),
    )
    after, before = states(record.arm.name)
    if abs(own.estimate) >= EXPECTED:
        return claim(replace(own, a=after, b=before), loss)
    size = tiny(abs(own.estimate))
    return Finding(
        sentence=Text(
            f"Between {after} and {before} the loss of a row differs by {size} on average: rounding.",
            f"{after} 與 {before} 的每筆損失平均相差 {size}：僅為捨入誤差。",
        ),
        holds=False,
        effect=own.estimate,
        low=own.low,
        high=own.high,
    )


def kept_finding(record: Record | None) -> list[Finding]:
    """How much of the update NF4 keeps, over the layers."""
    kept = list(record.series.get("kept", ())) if record is not None else []
    if not kept:
        return []
    low, high = median_interval(kept)
    middle = float(np.median(kept))
    span = f"{share(low)} … {share(high)}" if math.isfinite(low) else "–"
    less = math.isfinite(high) and high < 1
    return [
        Finding(
            sentence=Text(
                f"Of an update that is merged and packed into NF4 again, the median layer keeps "
                f"{share(middle)} (95 % interval {span}).",
                f"合併後再量化回 NF4，中位數的層保留 {share(middle)} 的更新（95% 信賴區間 {span}）。",
            ),
            holds=less,
            effect=middle - 1,
            low=low - 1,
            high=high - 1,
        )
    ]


def drift_findings(drifts: Rows) -> list[Finding]:
    """For each dtype how far subtracting leaves the weights off, over the modules."""
    found = []
    for row in drifts:
        off = _last(row)
        own = difference([off], [[0.0] * len(off)], generator=np.random.default_rng(SEED), comparisons=len(drifts))
        span = f"{share(own.low)} … {share(own.high)}" if math.isfinite(own.low) else "–"
        name, size = row["precision"], share(own.estimate)
        found.append(
            Finding(
                sentence=Text(
                    f"Subtracting the update again leaves {name} weights {size} of their length off after "
                    f"100 merges (95 % interval over modules {span}).",
                    f"以減回去的方式還原，合併 100 次後 {name} 權重偏離其長度的 {size}（模組間 95% 信賴區間 {span}）。",
                ),
                holds=own.holds,
                effect=-own.estimate,
                low=-own.high,
                high=-own.low,
            )
        )
    return found


def table(found: Mapping[str, Record]) -> Table:
    """Every form of the base, before and after."""
    columns = (
        Text("base", "基礎模型"),
        Text("loss unmerged", "未合併損失"),
        Text("loss merged", "合併後損失"),
        Text("difference", "差異"),
        Text("largest logit difference, relative", "logit 最大相對差異"),
        Text("mean KL (nats)", "平均 KL（nats）"),
        Text("KL of the adapter itself", "adapter 本身的 KL"),
        Text("same likeliest token", "最可能 token 相同"),
        Text("answers changed", "改變的答案"),
        Text("weights that move", "有變動的權重"),
        Text("rounding, of the update", "捨入（佔更新量）"),
        Text("update kept", "保留的更新"),
        Text("unmerge exact", "逐位元還原"),
        Text("merge / unmerge", "合併／還原時間"),
    )
    return Table(
        title=Text("Before and after merging", "合併前後"),
        columns=columns,
        rows=[_row(name, r.numbers) for name, r in found.items()],
    )


def _row(name: str, n: Mapping[str, float]) -> list[Any]:
    exact = n.get("restored", 0) == 1 and n.get("same_logits", 0) == 1
    back = Text("yes", "是") if exact else Text("no", "否")
    changed = f"{int(n['changed'])} / {int(n['rows'])}" if "changed" in n else "–"
    times = f"{seconds(n.get('merge_seconds', math.nan))} / {seconds(n.get('unmerge_seconds', math.nan))}"
    return [
        name,
        f"{n['loss_before']:.6f}",
        f"{n['loss_after']:.6f}",
        tiny(n["loss_difference"]),
        tiny(n["relative"]),
        tiny(n["kl"]),
        tiny(n["effect_kl"]),
        share(n["top1"]),
        changed,
        share(n["moved"]),
        share(n["noise"]),
        share(n.get("kept", math.nan)),
        back if "restored" in n else "–",
        times,
    ]


def drift_table(drifts: Rows, records: Sequence[Record]) -> list[Table]:
    """Both ways back, after 1, 10 and 100 merges."""
    if not drifts:
        return []
    of = next(r.numbers for r in records if r.tables.get("drift"))
    shown = [NOTED.index(n) for n in (1, 10, 100)]
    rows: list[list[Any]] = []
    for row in drifts:
        mean = np.mean(row["relative"], axis=0)
        exact = Text("0, every bit", "0（逐位元相同）") if row["exact"] else Text("not exact", "不完全相同")
        rows.append(
            [
                row["precision"],
                *(tiny(float(mean[i])) for i in shown),
                share(float(np.mean(row["changed"]))),
                tiny(row["kl"]),
                share(row["top1"]),
                exact,
            ]
        )
    n, total = int(of["modules"]), int(of["of"])
    return [
        Table(
            title=Text(
                f"Three adapters in turn, in {n} of {total} modules",
                f"三個 adapter 輪流合併，{total} 個模組中的 {n} 個",
            ),
            columns=(
                Text("weights", "權重"),
                *(Text(f"subtracting: off after {NOTED[i]}", f"減回去：{NOTED[i]} 次後的偏離") for i in shown),
                Text("weights that differ", "不同的權重"),
                Text("KL to the base", "與基礎模型的 KL"),
                Text("same likeliest token", "最可能 token 相同"),
                Text("original put back: off after 100", "放回原始權重：100 次後的偏離"),
            ),
            rows=rows,
        )
    ]


def figures_of(found: Mapping[str, Record], drifts: Rows) -> list[Figure]:
    """Drift against merges; how much merging moves beside how much the adapter moves."""
    drawn = []
    rows = [
        {"arm": row["precision"], "x": number, "y": float(np.mean([v[i] for v in row["relative"]]))}
        for row in drifts
        for i, number in enumerate(NOTED)
    ]
    if rows := [row for row in rows if row["y"] > 0]:
        drawn.append(
            figures.old(
                "lines",
                "merge-drift",
                Text(
                    "Subtracting the update again: how far the weights are off (put back: zero)",
                    "減回去的還原方式：權重偏離多少（放回原始權重則為零）",
                ),
                rows,
                x=Text("merges", "合併次數"),
                y=Text("|W - W0| / |W0|", "|W - W0| / |W0|"),
                arm=Text("weights", "權重"),
                log_x=True,
                log_y=True,
            )
        )
    bars = [
        {"arm": name, "value": r.numbers["kl"] / r.numbers["effect_kl"]}
        for name, r in found.items()
        if r.numbers["effect_kl"] > 0
    ]
    if bars:
        drawn.append(
            figures.old(
                "bars",
                "merge-kl",
                Text(
                    "What merging changes, over what the adapter changes (KL)",
                    "合併造成的改變佔 adapter 造成的改變（KL）",
                ),
                bars,
                x=Text("base", "基礎模型"),
                y=Text("share", "比例"),
                percent=True,
            )
        )
    return drawn
