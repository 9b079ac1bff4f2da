"""Q11: can the rank be dynamic? AdaLoRA against one rank for all, at the same final sum of ranks."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.adapters.methods import IMPORTANCES
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import Metric, by_arm, claim, count, mean_of, metric_of, scored, scores_table, seconds
from loralab.studies.measures.shrinking import MEASURE_BUDGET
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.ranking import ranked
from loralab.studies.study import Answer, Arm, Figure, Finding, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

TARGET = 4
MORE = 1.5  # times the final budget is what training starts with (arXiv:2303.10512, section 3.3)
ALPHA = 16.0
Arms = Mapping[str, Sequence[Record]]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """LoRA and AdaLoRA for each final mean rank; thorough ones also with other importances.

    Both scale their update by 16 / r, r being the final mean rank.
    """
    targets = [_rank(value) for value in ground.values] or [TARGET]
    found = []
    for target in dict.fromkeys(targets):
        found.append(Arm(name=f"LoRA r={target}", fields={"method": "lora", "rank": target}))
        found += [_adaptive(target, kind) for kind in IMPORTANCES[: 1 if ground.quick else None]]
    return found


def _adaptive(target: int, importance: str) -> Arm:
    start = math.ceil(MORE * target)
    fields = {"method": "adalora", "rank": start, "target_rank": target, "alpha": ALPHA * start / target}
    name = f"AdaLoRA {start}→{target}"
    if importance != IMPORTANCES[0]:
        fields["importance"], name = importance, f"{name} {importance}"
    return Arm(name=name, fields=fields, options={"measure": MEASURE_BUDGET})


def _rank(value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ConfigError(f"--values of the study adaptive are final mean ranks, such as 2,4,8; got {value!r}")
    return int(value)


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Tell whether moving ranks pays at the same final budget, where they went, what it costs."""
    every, metric = by_arm(records), metric_of(records, ground)
    moved = {name: own for name, own in every.items() if is_adaptive(own[0])}
    if not moved:
        return Answer(sentence=Text("AdaLoRA has not been measured yet.", "還沒有 AdaLoRA 的結果。"))
    pairs = {n: uniform for n, own in moved.items() if (uniform := _uniform(own[0], every))}
    ranking = ranked(every, metric)
    claims = {name: claim(ranking.contrast(name, uniform), metric) for name, uniform in pairs.items()}
    first = next(iter(moved))
    return Answer(
        sentence=_sentence(first, moved[first], claims),
        ranking=ranking,
        findings=list(claims.values()),
        blanks=[
            (Text("Idea: different layers, different ranks", "想法：不同層使用不同 rank"), _where(first, moved[first])),
            (Text("Challenges", "挑戰"), _challenges(first, pairs, every)),
        ],
        tables=[_budget_table(every, pairs, metric), scores_table(every, metric)],
        figures=[_over_time(moved), *_heat(first, moved[first])],
        method=Text(
            "Both arms end with the same sum of ranks: rank r in every module against r on average. "
            "AdaLoRA starts with 1.5 times as many; which triplets stay is decided by importance "
            "(equations 9 to 13 of arXiv:2303.10512). The printed budget (14) does not end at its "
            "target; used is bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))^3, with ti a tenth and tf "
            "three tenths of the steps. Triplets left are counted in the run, before every step, and "
            "once more in the saved file. The regulariser is not part of any loss shown. An equal sum "
            "of ranks is not an equal number of parameters: a rank costs more in a wider module.",
            "兩者最後的 rank 總和相同：LoRA 每個模組都是 r，AdaLoRA 平均為 r。AdaLoRA 從 1.5 倍開始，"
            "依重要性（arXiv:2303.10512 式 9–13）決定保留哪些三元組。論文印出的預算式 (14) 到不了目標值，"
            "此處用 bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))^3，ti 為總步數的一成、tf 為三成。"
            "剩餘的三元組在訓練中每步實際計數，並在存檔中再數一次。所列損失都不含正則項。"
            "rank 總和相同不等於參數量相同：越寬的模組，每個 rank 越貴。",
        ),
        caution=Text(
            "In short runs importance is judged after few steps, and the last steps at the final "
            "budget are few; where the ranks went is an observation of these runs.",
            "訓練步數少時，重要性只根據少數幾步判斷，在最終預算下訓練的步數也少；rank 的去向只是這幾次訓練的觀察。",
        ),
        advice=_advice(first, claims, moved),
        next=Text(
            "Repeat at half the budget: what matters where is felt most when there is little.",
            "把預算減半再做一次：預算越少，分配越重要。",
        ),
    )


def is_adaptive(record: Record) -> bool:
    """Tell whether an arm is AdaLoRA's."""
    return record.arm.fields.get("method") == "adalora"


def _uniform(record: Record, every: Arms) -> str | None:
    """The arm of the same final sum of ranks."""
    target = record.arm.fields["target_rank"]
    return next(
        (n for n, own in every.items() if not is_adaptive(own[0]) and own[0].arm.fields.get("rank") == target), None
    )


def _exact(own: Sequence[Record]) -> bool:
    """Tell whether every run ended at its target, and the file holds just these ranks."""
    return all(
        r.numbers["ranks_left"] == r.numbers["ranks_target"] == r.numbers["ranks_in_file"]
        and not r.numbers["ranks_differ"]
        for r in own
    )


def _sentence(name: str, own: Sequence[Record], claims: Mapping[str, Finding]) -> Text:
    start, left, target, stored = (
        count(mean_of(own, f"ranks_{what}")) for what in ("start", "left", "target", "in_file")
    )
    if _exact(own):
        said = Text(
            f"Yes: {name} went from {start} ranks to {left}, exactly its target, in the saved file too.",
            f"可以：{name} 的 rank 總和從 {start} 降到 {left}，恰好等於目標，存檔也是如此。",
        )
    else:
        said = Text(
            f"Not as it should: {name} was to end with {target} ranks, has {left}, and its file holds {stored}.",
            f"不如預期：{name} 應剩 {target} 個 rank，實際 {left}，存檔中 {stored}。",
        )
    if name in claims:
        return said + claims[name].sentence
    return said + Text("There is no LoRA of the same budget to compare with.", "沒有相同預算的 LoRA 可以比較。")


def place_of(path: str) -> tuple[int | None, str]:
    """(layer, module in it) of a module's path; None where no layer is numbered."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)$", path)
    return (int(found[1]), found[2]) if found else (None, path)


def ranks_of(own: Sequence[Record]) -> dict[str, float]:
    """The final rank of every module, mean over seeds."""
    found: dict[str, list[float]] = {}
    for record in own:
        for row in record.tables.get("ranks", ()):
            found.setdefault(row["module"], []).append(float(row["rank"]))
    return {module: float(np.mean(ranks)) for module, ranks in found.items()}


def _where(name: str, own: Sequence[Record]) -> Text:
    """Modules and layers by their mean final rank; whether seeds agree about it."""
    ranks = ranks_of(own)
    if not ranks:
        return Text("not measured", "尚未測量")
    modules = _means({path: place_of(path)[1] for path in ranks}, ranks)
    layers = _means({p: place for p in ranks if (place := place_of(p)[0]) is not None}, ranks)
    high, low = max(modules, key=lambda m: modules[m]), min(modules, key=lambda m: modules[m])
    said = Text(
        f"{name}, mean final rank: most in {high} ({modules[high]:.1f}), least in {low} ({modules[low]:.1f})",
        f"{name} 最終平均 rank：{high} 最多（{modules[high]:.1f}），{low} 最少（{modules[low]:.1f}）",
    )
    if len(layers) > 1:
        listed = ", ".join(f"{layer}: {layers[layer]:.1f}" for layer in sorted(layers))
        said = Text(f"{said.en}; by layer {listed}", f"{said.zh}；各層 {listed}")
    agreed = agreement(own)
    if agreed is None:
        return Text(
            f"{said.en}; one seed: whether others agree is not known",
            f"{said.zh}；只有一個隨機種子，其他種子是否一致不得而知",
        )
    return Text(f"{said.en}; correlation between seeds {agreed:.2f}", f"{said.zh}；隨機種子之間的相關係數 {agreed:.2f}")


def _means(groups: Mapping[str, Any], ranks: Mapping[str, float]) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for path, group in groups.items():
        found.setdefault(group, []).append(ranks[path])
    return {group: float(np.mean(values)) for group, values in found.items()}


def agreement(own: Sequence[Record]) -> float | None:
    """The mean correlation of the final ranks of two seeds; None with one, or all ranks alike."""
    vectors = [[float(row["rank"]) for row in r.tables.get("ranks", ())] for r in own]
    pairs = [
        float(np.corrcoef(vectors[i], vectors[j])[0, 1])
        for i in range(len(vectors))
        for j in range(i)
        if np.ptp(vectors[i]) and np.ptp(vectors[j])
    ]
    return float(np.mean(pairs)) if pairs else None


def _challenges(name: str, pairs: Mapping[str, str], every: Arms) -> Text:
    """What it costs, in numbers: time, parameters, steps above the final budget."""
    own = every[name]
    steps, above = mean_of(own, "steps"), mean_of(own, "steps_above")
    said = Text(
        f"{above:.0f} of {steps:.0f} steps train more ranks than are kept, and {steps - above:.0f} "
        "are left at the final budget; the schedule must know the number of steps beforehand",
        f"{steps:.0f} 步中有 {above:.0f} 步訓練的 rank 多於最後保留的，只剩 {steps - above:.0f} "
        "步在最終預算下訓練；排程必須事先知道總步數",
    )
    if name not in pairs:
        return said
    other = every[pairs[name]]
    ours, theirs = (mean_of(arm, "step_seconds") for arm in (own, other))
    more = ours / theirs - 1 if theirs else math.nan
    trained, plain = _adapter(own), _adapter(other)
    stored = mean_of(own, "stored_parameters")
    return Text(
        f"a step takes {seconds(ours)} against {seconds(theirs)} ({more:+.0%}); in training "
        f"{count(trained)} parameters against {count(plain)}, stored {count(stored)} against "
        f"{count(plain)}; {said.en}",
        f"每步 {seconds(ours)}，LoRA 為 {seconds(theirs)}（{more:+.0%}）；訓練時參數 {count(trained)} 個，"
        f"LoRA {count(plain)} 個，存檔 {count(stored)} 個；{said.zh}",
    )


def _adapter(own: Sequence[Record]) -> float:
    """Trained parameters without the head."""
    return mean_of(own, "parameters") - mean_of(own, "head_parameters")


def _budget_table(every: Arms, pairs: Mapping[str, str], metric: Metric) -> Table:
    columns = (
        Text("arm", "組別"),
        Text("ranks at the start", "起始 rank 總和"),
        Text("ranks at the end", "最終 rank 總和"),
        Text("ranks in the file", "存檔 rank 總和"),
        Text("adapter parameters in training", "訓練時 adapter 參數量"),
        Text("stored", "存檔參數量"),
        Text("step", "每步時間"),
        Text("first reported loss", "第一個回報的損失"),
        Text(metric.text.en, metric.text.zh),
    )
    rows = []
    for name, own in every.items():
        curves = [r.series["loss"][:1] for r in own if r.series.get("loss")]
        first = mean_of_steps(curves)
        fixed = _fixed(name, pairs, every)
        rows.append(
            [
                name,
                *(
                    count(mean_of(own, f"ranks_{what}") if is_adaptive(own[0]) else fixed)
                    for what in ("start", "left", "in_file")
                ),
                count(_adapter(own)),
                count(mean_of(own, "stored_parameters") if is_adaptive(own[0]) else _adapter(own)),
                seconds(mean_of(own, "step_seconds")),
                f"{first[0]:.4f}" if first else "–",
                scored(own, metric),
            ]
        )
    return Table(title=Text("Budget", "預算"), columns=columns, rows=rows)


def _fixed(name: str, pairs: Mapping[str, str], every: Arms) -> float:
    """The sum of ranks of a uniform arm: its rank in as many modules as AdaLoRA has."""
    adaptive = next((n for n, uniform in pairs.items() if uniform == name), None)
    if adaptive is None:
        return math.nan
    return mean_of(every[adaptive], "modules") * every[name][0].arm.fields["rank"]


def _over_time(moved: Arms) -> Figure:
    """Triplets left after every step, as counted; the schedule only where it is not the same."""
    rows: list[dict[str, Any]] = []
    for name, own in moved.items():
        left, planned = (_curve(own, key) for key in ("budget", "schedule"))
        lines = {name: left} | ({} if left == planned else {f"{name} (schedule)": planned})
        rows += [
            {"arm": said, "x": i + 1, "y": value} for said, curve in lines.items() for i, value in enumerate(curve)
        ]
    targets = {mean_of(own, "ranks_target") for own in moved.values()}
    return figures.old(
        "lines",
        "adaptive-budget",
        Text(
            "Ranks left over time, as counted; dashed: final budget",
            "剩餘 rank 總和隨訓練的變化（實際計數）；虛線：最終預算",
        ),
        rows,
        x=Text("step", "步數"),
        y=Text("sum of ranks", "rank 總和"),
        arm=Text("arm", "組別"),
        chance=targets.pop() if len(targets) == 1 else None,
    )


def _curve(own: Sequence[Record], key: str) -> list[float]:
    """A series of some records, mean over seeds."""
    return mean_of_steps([r.series[key] for r in own if r.series.get(key)])


def _heat(name: str, own: Sequence[Record]) -> list[Figure]:
    """The final rank of every module, layer against module."""
    places = {path: place_of(path) for path in ranks_of(own)}
    rows = [
        {"x": "–" if layer is None else str(layer), "y": module, "value": ranks_of(own)[path]}
        for path, (layer, module) in places.items()
    ]
    if not rows:
        return []
    modules = len({row["y"] for row in rows})
    return [
        figures.old(
            "heat",
            "adaptive-ranks",
            Text(f"Final ranks of {name}", f"{name} 的最終 rank"),
            rows,
            x=Text("layer", "層"),
            y=Text("module", "模組"),
            value=Text("rank", "rank"),
            digits=".0f" if len(own) == 1 else ".1f",
            height=max(120, 36 * modules),
        )
    ]


def _advice(name: str, claims: Mapping[str, Finding], moved: Arms) -> dict[str, Any]:
    """AdaLoRA where it is better beyond noise, else the simpler of the two."""
    if name not in claims:
        return {}
    fields = moved[name][0].arm.fields
    if claims[name].holds and (claims[name].effect or 0) > 0:
        return {k: v for k, v in fields.items() if k != "learning_rate"}
    return {"method": "lora", "rank": fields["target_rank"]}
