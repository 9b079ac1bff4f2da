"""Q5: is alpha / r needed? Scalings x ranks x learning rates: what diverges, how fast, how well."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loralab.adapters.methods import SCALINGS, LoRA
from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import Metric, claim, mean_of, metric_of, plain, scored, seconds
from loralab.studies.ranking import ranked
from loralab.studies.readings.sweep import Key, Sweep
from loralab.studies.search import rounded
from loralab.studies.statistics import smoothed
from loralab.studies.study import Answer, Arm, Figure, Finding, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.studies.trained import MEASURE
from loralab.training.optim import usual_rate

__all__ = ["MEASURE", "arms", "conclude"]

RANKS, QUICK_RANKS = (4, 16, 64), (4, 64)
# times LoRA's usual rate: wide enough for the best one to move
FACTORS, QUICK_FACTORS = (10**-0.5, 1.0, 10**0.5, 10.0, 10**1.5), (1.0, 5.0, 25.0)
USUAL = "alpha/r"
LEARNT = 0.1  # of the loss at the start: where no run has lost as much, scores compare nothing
Claims = Mapping[Key, Finding]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """Every scaling at every rank and learning rate, alpha fixed at 16.

    `--values` takes ranks, scalings or both; with a fixed rate there is that one alone.
    """
    scalings, ranks = _wanted(ground)
    return [
        Arm(
            name=f"{scaling}, r={rank}, {rate:.1e}",
            tuned=False,
            fields={"method": "lora", "rank": rank, "scaling": scaling, "learning_rate": rate},
        )
        for scaling in scalings
        for rank in ranks
        for rate in _rates(ground)
    ]


def _wanted(ground: Ground) -> tuple[list[str], list[int]]:
    """The scalings and the ranks that were asked for.

    Raises:
        ConfigError: a value is neither.
    """
    scalings, ranks = [], []
    for value in dict.fromkeys(ground.values):
        if value in SCALINGS:
            scalings.append(value)
        elif value.isascii() and value.isdigit() and int(value) > 0:
            ranks.append(int(value))
        else:
            raise ConfigError(
                f"--values of the study scaling are ranks, such as 4,64, and scalings "
                f"({', '.join(SCALINGS)}); got {value!r}{nearest(value, SCALINGS)}"
            )
    usual = QUICK_RANKS if ground.quick else RANKS
    return scalings or list(SCALINGS), sorted(ranks or usual)


def _rates(ground: Ground) -> list[float]:
    usual = usual_rate(LoRA())
    if ground.fixed_lr:
        return [float(ground.fields.get("learning_rate", usual))]
    factors = QUICK_FACTORS if ground.quick else FACTORS
    return [rounded(usual * factor) for factor in factors]


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Stability, speed and final score of each scaling, and how its best rate moves with rank."""
    sweep, metric = Sweep.of(records), metric_of(records, ground)
    if not any(sweep.best(key) for key in sweep.cells):
        return Answer(sentence=_nothing(sweep))
    ranking = _ranking(sweep, metric)
    claims = _claims(sweep, ranking, metric)
    drifts = _drifts(sweep)
    sentence = _sentence(sweep, claims) + _drift_sentence(sweep)
    return Answer(
        sentence=sentence,
        ranking=ranking,
        findings=[*claims.values(), *drifts],
        blanks=[
            (Text("Training stability", "訓練穩定性"), _stability(sweep)),
            (Text("Speed of convergence", "收斂速度"), _speed(sweep)),
            (Text("Final performance", "最終效能"), _final(sweep, metric)),
            (Text("What you found", "你的發現"), sentence),
        ],
        tables=[_table(sweep, metric)],
        figures=[_heat(sweep), _rate_figure(sweep), *_curves(sweep)],
        method=_method(sweep),
        caution=Text(
            "A best rate at the edge of the grid may lie beyond it. Adam divides a constant factor out "
            "of the gradients, so that a factor acts much like another learning rate.",
            "最佳學習率若落在格點邊緣，真正的最佳值可能更外面。Adam 會把常數係數從梯度中除掉，"
            "因此縮放係數的作用很像換一個學習率。",
        ),
        advice=_advice(sweep, claims),
        next=Text(
            "Repeat with ranks further apart, or a finer grid around the best rates.",
            "用差距更大的 rank，或在最佳學習率附近用更密的格點再做一次。",
        ),
    )


def _nothing(sweep: Sweep) -> Text:
    """There is no run to speak of, or none that ended."""
    runs = sum(sweep.diverged(scaling)[1] for scaling in sweep.scalings)
    if runs:
        return Text(
            f"All {runs} runs diverged: the learning rates are too high for this model.",
            f"全部 {runs} 次訓練都發散：學習率對這個模型太高。",
        )
    return Text("No scaling has been measured yet.", "還沒有任何縮放方式的結果。")


def _method(sweep: Sweep) -> Text:
    target = plain(sweep.target())
    return Text(
        "alpha is 16; the factor of the update is 16 / r, 1, or 16 / sqrt(r). Every combination runs "
        "on a fixed grid of learning rates, over fewer steps and with fewer seeds than other studies, "
        "as there are many. The best rate has the lowest validation loss; scores and intervals are "
        "of test rows that chose nothing. A run has diverged if its numbers were no longer finite or "
        f"its training loss ended 5 % above its start. The target loss is {target}: halfway from the "
        "mean loss of the first three steps of all runs to the lowest (smoothed) training loss that "
        "any run ends at. A rate is as good as the best one where the interval of the paired "
        "difference of losses on the test rows does not exclude zero.",
        "alpha 為 16；更新的係數分別為 16 / r、1、16 / sqrt(r)。每種組合都在固定的學習率格點上訓練；"
        "因為組合很多，步數與隨機種子都比其他研究少。最佳學習率取驗證損失最低者；"
        "分數與信賴區間來自未參與選擇的測試資料。數值不再有限，或訓練損失結束時比開始高 5% 以上，視為發散。"
        f"目標損失為 {target}：所有訓練前三步平均損失與最低（平滑後）最終訓練損失的中點。"
        "測試損失的配對差異信賴區間不排除零者，視為與最佳學習率一樣好。",
    )


def _claims(sweep: Sweep, ranking: Ranking, metric: Metric) -> dict[Key, Finding]:
    """Every scaling against alpha / r at each rank, each at its own best rate, as one family."""
    pairs = {key: (USUAL, key[1]) for key in sweep.cells if key[0] != USUAL}
    return {
        key: claim(ranking.contrast(named(key), named(usual)), metric)
        for key, usual in pairs.items()
        if sweep.at_best(key) and sweep.at_best(usual)
    }


def _ranking(sweep: Sweep, metric: Metric) -> Ranking:
    """Every scaling and rank at its best rate; the usual scaling first among equals."""
    arms = {named(key): sweep.at_best(key) for key in sweep.cells if sweep.at_best(key)}
    order = sorted(sweep.cells, key=lambda key: (key[1], key[0] != USUAL))
    cost = {named(key): float(place) for place, key in enumerate(order) if named(key) in arms}
    return ranked(arms, metric, cost=cost)


def named(key: Key) -> str:
    """A scaling at a rank."""
    return f"{key[0]}, r={key[1]}"


def _drifts(sweep: Sweep) -> list[Finding]:
    """For each scaling, whether one rate serves every rank."""
    if len(sweep.ranks) < 2 or len(sweep.rates) < 2:
        return []
    found = []
    for scaling in sweep.scalings:
        if any(sweep.best((scaling, rank)) is None for rank in sweep.ranks):
            continue
        shared = sweep.shared(scaling)
        listed = ", ".join(f"{rate:.1e}" for rate in shared)
        sentence = (
            Text(
                f"With {scaling} one learning rate serves r={_ends(sweep)}: {listed} is as good as the "
                "best at every rank, within noise.",
                f"{scaling}：同一個學習率可用於 r={_ends(sweep)}：{listed} 在每個 rank 都與最佳者相當（在雜訊範圍內）。",
            )
            if shared
            else Text(
                f"With {scaling} no learning rate of the grid is as good as the best at every rank (r={_ends(sweep)}).",
                f"{scaling}：格點中沒有任何學習率在每個 rank 都與最佳者相當（r={_ends(sweep)}）。",
            )
        )
        found.append(Finding(sentence=sentence, holds=not shared))
    return found


def _ends(sweep: Sweep) -> str:
    return f"{sweep.ranks[0]}–{sweep.ranks[-1]}"


def _sentence(sweep: Sweep, claims: Claims) -> Text:
    """Tell whether the score depends on the scaling, each at its best rate."""
    if not claims:
        return Text("There is nothing to compare alpha/r with yet.", "還沒有可與 alpha/r 比較的結果。")
    clear = [finding for finding in claims.values() if finding.holds]
    if not clear and not _learnt(sweep):
        start, low = sweep.fall()
        return Text(
            f"The runs are too short to tell: the training loss fell from {start:.3f} to {low:.3f} at "
            "best, and no scaling differs from alpha/r beyond noise.",
            f"訓練太短，無法判斷：訓練損失最多只從 {start:.3f} 降到 {low:.3f}，各縮放與 alpha/r 沒有超出雜訊的差異。",
        )
    at = Text("each at its best learning rate", "各用最佳學習率時")
    if len(sweep.rates) == 1:
        rate = f"{sweep.rates[0]:.1e}"
        at = Text(f"at the one learning rate {rate}", f"在同一個學習率 {rate} 下")
    if not clear:
        return Text(
            f"Not for the score: {at.en}, no other scaling differs from alpha/r beyond noise (r={_ends(sweep)}).",
            f"就分數而言並非必要：{at.zh}，其他縮放與 alpha/r 沒有超出雜訊的差異（r={_ends(sweep)}）。",
        )
    strongest = max(clear, key=lambda finding: abs(finding.effect or 0))
    return (
        Text(
            f"The score depends on it: {at.en}, {len(clear)} of {len(claims)} comparisons with alpha/r "
            "differ beyond noise.",
            f"分數與縮放有關：{at.zh}，與 alpha/r 的 {len(claims)} 組比較中有 {len(clear)} 組差異超出雜訊。",
        )
        + strongest.sentence
    )


def _learnt(sweep: Sweep) -> bool:
    """Tell whether any run learnt enough for scores to tell scalings apart."""
    start, low = sweep.fall()
    return low <= (1 - LEARNT) * start


def _drift_sentence(sweep: Sweep) -> Text:
    """How far the best rate moves from the smallest to the largest rank."""
    drifts = {s: drift for s in sweep.scalings if (drift := sweep.drift(s)) is not None}
    if len(sweep.ranks) < 2 or len(sweep.rates) < 2 or not drifts:
        return Text("", "")
    listed = {s: f"{s} ×{drift:.2g}" for s, drift in drifts.items()}
    edges = [s for s in drifts if any(sweep.at_edge((s, rank)) for rank in sweep.ranks)]
    said = Text(
        f"From r={sweep.ranks[0]} to r={sweep.ranks[-1]} the best rate moves by: {', '.join(listed.values())}",
        f"從 r={sweep.ranks[0]} 到 r={sweep.ranks[-1]}，最佳學習率的變化：{'、'.join(listed.values())}",
    )
    if not edges:
        return Text(f"{said.en}.", f"{said.zh}。")
    return Text(
        f"{said.en} (at the edge of the grid: {', '.join(edges)}).", f"{said.zh}（落在格點邊緣：{'、'.join(edges)}）。"
    )


def _stability(sweep: Sweep) -> Text:
    parts = []
    for scaling in sweep.scalings:
        lost, runs = sweep.diverged(scaling)
        worst = plain(sweep.worst(scaling))
        parts.append(
            Text(
                f"{scaling}: {lost} of {runs} runs diverged, worst validation loss of the others {worst}",
                f"{scaling}：{runs} 次訓練中 {lost} 次發散，其餘最差驗證損失 {worst}",
            )
        )
    return _joined(parts)


def _speed(sweep: Sweep) -> Text:
    """Steps to the target loss, as counted: no interval, so nothing is claimed."""
    target = sweep.target()
    parts = []
    for key in sweep.cells:
        if sweep.best(key) is not None:
            steps = sweep.steps_to(key, target)
            said = Text("never", "未達到") if steps is None else Text(f"{steps:.0f}", f"{steps:.0f}")
            parts.append(Text(f"{named(key)}: {said.en}", f"{named(key)}：{said.zh}"))
    whole = _joined(parts)
    return Text(
        f"steps until the training loss is at {target:.3f}, at the best rate: {whole.en}",
        f"以最佳學習率訓練，損失降到 {target:.3f} 所需步數：{whole.zh}",
    )


def _final(sweep: Sweep, metric: Metric) -> Text:
    parts = []
    for key in sweep.cells:
        if own := sweep.at_best(key):
            score, rate = metric.value(mean_of(own, "score")), sweep.best(key)
            parts.append(Text(f"{named(key)}: {score} at {rate:.1e}", f"{named(key)}：{score}，學習率 {rate:.1e}"))
    whole = _joined(parts)
    return Text(f"test {metric.text.en} {whole.en}", f"測試{metric.text.zh} {whole.zh}")


def _joined(parts: Sequence[Text]) -> Text:
    return Text("; ".join(p.en for p in parts), "；".join(p.zh for p in parts))


def _advice(sweep: Sweep, claims: Claims) -> dict[str, Any]:
    """A scaling that is better somewhere and worse nowhere, beyond noise; else the usual one.

    With the rate that serves all its ranks; where none does, the rank and the rate of its best run.
    """
    # at one rate for all, none has its best
    if not claims or len(sweep.rates) == 1 or not _learnt(sweep):
        return {}
    chosen = USUAL
    for scaling in dict.fromkeys(key[0] for key in claims):
        effects = [f.effect or 0 for key, f in claims.items() if key[0] == scaling and f.holds]
        if effects and min(effects) > 0:
            chosen = scaling
            break
    if (rate := sweep.common(chosen)) is not None:
        return {"scaling": chosen, "learning_rate": rate}
    keys = [key for key in sweep.cells if key[0] == chosen and sweep.best(key) is not None]
    best = min(keys, key=lambda key: mean_of(sweep.at_best(key), "validation_loss"))
    return {"scaling": chosen, "rank": best[1], "learning_rate": sweep.best(best)}


def _table(sweep: Sweep, metric: Metric) -> Table:
    columns = (
        Text("scaling", "縮放"),
        Text("rank", "rank"),
        Text("factor", "係數"),
        Text("best rate", "最佳學習率"),
        Text("rates as good", "同樣好的學習率"),
        Text("diverged rates", "發散的學習率"),
        Text("steps to target", "達到目標的步數"),
        Text("validation loss", "驗證損失"),
        Text(f"test {metric.text.en} (95 % interval)", f"測試{metric.text.zh}（95% 信賴區間）"),
        Text("step", "每步時間"),
    )
    rows = []
    target = sweep.target()
    for key in sweep.cells:
        own, best = sweep.at_best(key), sweep.best(key)
        lost = [rate for rate in sorted(sweep.cells[key]) if rate not in sweep.ended(key)]
        steps = sweep.steps_to(key, target) if own else None
        rows.append(
            [
                key[0],
                key[1],
                f"{LoRA(rank=key[1], scaling=key[0]).factor:.3g}",
                "–" if best is None else f"{best:.1e}{' (edge)' if sweep.at_edge(key) else ''}",
                ", ".join(f"{rate:.1e}" for rate in sweep.as_good(key)) or "–",
                ", ".join(f"{rate:.1e}" for rate in lost) or "–",
                "–" if steps is None else f"{steps:.0f}",
                plain(mean_of(own, "validation_loss")),
                scored(own, metric) if own else "–",
                seconds(mean_of(own, "step_seconds")),
            ]
        )
    return Table(title=Text("Each scaling at each rank", "各縮放與 rank"), columns=columns, rows=rows)


def _heat(sweep: Sweep) -> Figure:
    """Final losses; a run that diverged has none, and its place stays empty."""
    rows: list[dict[str, Any]] = []
    for key, own in sweep.cells.items():
        ended = sweep.ended(key)
        for rate in sorted(own):
            value = mean_of(ended[rate], "validation_loss") if rate in ended else math.nan
            rows.append({"x": f"{rate:.1e}", "y": named(key), "value": value if math.isfinite(value) else None})
    return figures.old(
        "heat",
        "scaling-losses",
        Text("Final validation loss; empty: diverged", "最終驗證損失；空白：發散"),
        rows,
        x=Text("learning rate", "學習率"),
        y=Text("scaling, rank", "縮放、rank"),
        value=Text("loss", "損失"),
        digits=".3f",
        height=max(160, 34 * len(sweep.cells)),
    )


def _rate_figure(sweep: Sweep) -> Figure:
    rows = [
        {"arm": named(key), "x": rate, "y": mean_of(own, "validation_loss")}
        for key in sweep.cells
        for rate, own in sweep.ended(key).items()
    ]
    return figures.old(
        "lines",
        "scaling-rates",
        Text("Where the best learning rate lies", "最佳學習率的位置"),
        rows,
        x=Text("learning rate", "學習率"),
        y=Text("validation loss", "驗證損失"),
        arm=Text("scaling, rank", "縮放、rank"),
        log_x=True,
    )


def _curves(sweep: Sweep) -> list[Figure]:
    """Training losses at the best rates, smoothed, mean over seeds."""
    rows: list[dict[str, Any]] = []
    for key in sweep.cells:
        curves = [smoothed(r.series["loss"]) for r in sweep.at_best(key) if r.series.get("loss")]
        rows += [
            {"arm": named(key), "x": i + 1, "y": sum(values) / len(values)}
            for i, values in enumerate(zip(*curves, strict=False))
        ]
    if not rows:
        return []
    return [
        figures.old(
            "lines",
            "scaling-curves",
            Text("Training at the best rate; dashed: target loss", "以最佳學習率訓練；虛線：目標損失"),
            rows,
            x=Text("step", "步數"),
            y=Text("training loss (smoothed)", "訓練損失（平滑）"),
            arm=Text("scaling, rank", "縮放、rank"),
            chance=sweep.target(),
        )
    ]
