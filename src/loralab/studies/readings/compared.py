"""What was measured of each method: the source's table, what it is chosen by, what was expected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loralab.studies.contrast import Ranking
from loralab.studies.evidence import Metric, best_arm, by_arm, count, mean_of, scored, seconds
from loralab.studies.measures.passes import MERGED, UNMERGED
from loralab.studies.ranking import ALIKE, among, describe_ranking, listed, parameters, recommendation
from loralab.studies.readings import latencies
from loralab.studies.readings.latencies import SAME, SMALL, Latencies, percent
from loralab.studies.study import Arm, Record, Text
from loralab.studies.study import OldTable as Table

BASE, LATENCY = "base", "latency"
SOURCE = ("LoRA", "Adapter", "Prefix-tuning")  # the rows of the source's table
FAMILIES = {
    "lora": "LoRA",
    "houlsby": "Adapter",
    "pfeiffer": "Adapter",
    "prefix": "Prefix-tuning",
    "prefix-mlp": "Prefix-tuning",
}
HEADINGS = (
    Text("method", "方法"),
    Text("parameters", "參數量"),
    Text("inference latency", "推論延遲"),
    Text("training speed", "訓練速度"),
    Text("performance", "效能"),
)
HOLDS, FAILS = Text("holds", "成立"), Text("does not hold", "不成立")
OPEN, UNSEEN = Text("not decided: noise", "未定：雜訊太大"), Text("not measured", "未測量")
Arms = Mapping[str, Sequence[Record]]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The trained methods by arm, the base's own score, and the latencies."""

    trained: Arms
    base: Sequence[Record]
    latencies: Latencies

    @staticmethod
    def of(records: Sequence[Record]) -> "Measured":
        """What the records hold."""
        every = by_arm(records)
        trained = {name: own for name, own in every.items() if name not in (BASE, LATENCY)}
        return Measured(trained=trained, base=every.get(BASE, ()), latencies=Latencies.of(records))

    def of_budget(self, budget: str) -> Arms:
        """The arms of one budget."""
        return {n: own for n, own in self.trained.items() if budget_of(own[0].arm) == budget}

    def of_family(self, family: str) -> list[str]:
        """The arms of one row of the source's table, those of the larger budget first."""
        own = [n for n, r in self.trained.items() if family_of(r[0].arm) == family]
        return sorted(own, key=lambda n: -parameters(self.trained[n]))


def budget_of(arm: Arm) -> str | None:
    """The budget that an arm was made for; LoRA's ranks are the budgets themselves."""
    if arm.fields.get("method") == "lora":
        return f"r={arm.fields['rank']}"
    found = arm.options.get("budget")
    return None if found is None else str(found)


def family_of(arm: Arm) -> str:
    """The source's name for a method, or its own."""
    method = str(arm.fields.get("method"))
    return FAMILIES.get(method, method)


def papers(times: Latencies) -> dict[str, str]:
    """Timed variants -> the adapters of the LoRA paper that they are."""
    names = {name for name, _ in times.times}
    ends = {"houlsby": "Adapter H", "pfeiffer": "Adapter L"}
    return {n: row for n in names for start, row in ends.items() if n.startswith(start)}


def table(measured: Measured, metric: Metric) -> Table:
    """The source's table, its rows first; every arm of a method is a line."""
    order = [n for family in SOURCE for n in measured.of_family(family)]
    order += [n for n in measured.trained if n not in order]
    rows = []
    for name in order:
        own = measured.trained[name]
        family = family_of(own[0].arm)
        label = f"{family} ({name})" if family in SOURCE else name
        rows.append(
            [
                label,
                count(parameters(own)),
                latencies.in_short(measured.latencies, name),
                _speed(own),
                scored(own, metric),
            ]
        )
    return Table(title=Text("Comparison", "對比維度"), columns=HEADINGS, rows=rows)


def source_rows(measured: Measured, metric: Metric) -> list[tuple[Text, Text]]:
    """The source's three rows, each of the arm with the best mean score of its method."""
    found = []
    for family in SOURCE:
        names = measured.of_family(family)
        label = Text(family, family)
        if not names:
            found.append((label, UNSEEN))
            continue
        name = best_arm({n: measured.trained[n] for n in names}, metric)
        own, short = measured.trained[name], latencies.in_short(measured.latencies, name)
        speed = _speed(own)
        found.append(
            (
                label,
                Text(
                    f"{name}: {count(parameters(own))} parameters; latency {short.en}; training {speed.en}; "
                    f"{metric.text.en} {scored(own, metric)}",
                    f"{name}：參數量 {count(parameters(own))}；推論延遲 {short.zh}；訓練 {speed.zh}；"
                    f"{metric.text.zh} {scored(own, metric)}",
                ),
            )
        )
    return found


def _speed(own: Sequence[Record]) -> Text:
    step = seconds(mean_of(own, "step_seconds"))
    return Text(f"{step} a step", f"每步 {step}")


def parameters_of(family: Arms) -> str:
    """The budget of a family: what LoRA trains in it, else the first arm."""
    lora = [n for n, own in family.items() if family_of(own[0].arm) == "LoRA"]
    return count(parameters(family[(lora or list(family))[0]]))


def latency_sentence(measured: Measured) -> Text:
    """What each method of the source adds to one short pass, in a sentence; empty if not timed."""
    times = measured.latencies
    if not times.times:
        return Text("", "")
    parts = []
    for way in times.times:
        own = times.over(way, times.shapes[0])
        if way[0] != BASE and own is not None:
            more = Text(percent(own.share), percent(own.share))
            more = more if own.holds else Text("nothing beyond noise", "沒有超出雜訊的差異")
            name = times.named(way)
            parts.append(Text(f"{name.en}: {more.en}", f"{name.zh}：{more.zh}"))
    at = latencies.shown(times.shapes[0])
    return Text(
        f"To one forward pass at {at} they add: {'; '.join(p.en for p in parts)}.",
        f"批次 × 長度 {at} 的單次前向傳播增加：{'；'.join(p.zh for p in parts)}。",
    )


def how_to_choose(measured: Measured, ranking: Ranking, metric: Metric) -> Text:
    """The source's last blank: score, then latency, then what training costs."""
    parts = []
    if family := measured.of_budget("r=8"):
        own = describe_ranking(among(ranking, family), family, metric)
        parts.append(Text("1. By score, at equal budget:", "1. 先看效能（參數預算相同）：") + own)
    if (times := latency_sentence(measured)).en:
        own = _merging(measured.latencies)
        parts.append(Text("2. By latency:", "2. 再看推論延遲：") + times + own)
    trained = measured.trained
    parts.append(_by_speed(trained))
    parts.append(recommendation(ranking, trained, metric))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    return whole


def _by_speed(trained: Arms) -> Text:
    """Which method trains fastest; times that lie close together are called alike."""
    ranked = sorted(trained, key=lambda n: mean_of(trained[n], "step_seconds"))
    first, last = trained[ranked[0]], trained[ranked[-1]]
    if mean_of(last, "step_seconds") <= (1 + ALIKE) * mean_of(first, "step_seconds"):
        return Text("3. By training speed: all take about as long.", "3. 最後看訓練速度：各方法相近。")
    return Text(
        f"3. By training speed: {ranked[0]} is fastest ({_speed(first).en}), {ranked[-1]} slowest ({_speed(last).en}).",
        f"3. 最後看訓練速度：{ranked[0]} 最快（{_speed(first).zh}），{ranked[-1]} 最慢（{_speed(last).zh}）。",
    )


def _merging(times: Latencies) -> Text:
    """Which variants could be merged, and which could not."""
    able = list(dict.fromkeys(name for name, state in times.times if state == MERGED))
    others = [n for n, state in times.times if state == UNMERGED and n not in able]
    if not able or not others:
        return Text("", "")
    yes, no = listed(able), listed(others)
    return Text(
        f"{yes.en} can be merged into the weights; {no.en} cannot, and keep their cost.",
        f"{yes.zh} 可以合併進權重；{no.zh} 不能合併，延遲成本一直都在。",
    )


def expected(measured: Measured, ranking: Ranking, metric: Metric) -> Table:
    """What the papers report, and whether it holds here."""
    rows = [*_expected_latencies(measured.latencies), *_expected_scores(measured, ranking, metric)]
    return Table(
        title=Text("What the papers report, and whether it holds here", "論文的結論在這裡是否成立"),
        columns=(Text("claim", "論文結論"), Text("here", "這裡的結果"), Text("numbers", "數字")),
        rows=rows,
    )


def _expected_latencies(times: Latencies) -> list[list[Text | str]]:
    """LoRA's Table 1: merged adds nothing; adapters cost, most so for a single short row."""
    names = {
        start: next((n for n, _ in times.times if n.startswith(start)), "") for start in ("lora", "houlsby", "pfeiffer")
    }
    lora, high, low = (names[s] for s in ("lora", "houlsby", "pfeiffer"))
    return [
        [
            Text("merged LoRA takes as long as the base, at every shape", "合併後的 LoRA 與基礎模型一樣快（每種形狀）"),
            *_same(times, (lora, MERGED)),
        ],
        [
            Text("LoRA that is not merged takes longer than the base", "未合併的 LoRA 比基礎模型慢"),
            *_slower(times, (lora, UNMERGED)),
        ],
        [Text("Adapter L takes longer than the base", "Adapter L 比基礎模型慢"), *_slower(times, (low, UNMERGED))],
        [
            Text("Adapter H takes no less than Adapter L", "Adapter H 不比 Adapter L 快"),
            *_slower(times, (high, UNMERGED), (low, UNMERGED)),
        ],
        [
            Text(
                "Adapter H's share is smaller at the largest shape than at the smallest",
                "Adapter H 的額外比例在最大形狀比最小形狀低",
            ),
            *_shrinks(times, (high, UNMERGED)),
        ],
    ]


def _same(times: Latencies, way: tuple[str, str]) -> list[Text | str]:
    own = [found for shape in times.shapes if (found := times.over(way, shape)) is not None]
    if not own:
        return [UNSEEN, "–"]
    numbers = " / ".join(latencies.cell(o) for o in own)
    if any(o.holds and abs(o.share) >= SMALL for o in own):
        return [FAILS, numbers]
    close = all(o.low > -SAME and o.high < SAME for o in own)
    return [HOLDS if close else OPEN, numbers]


def _slower(times: Latencies, way: tuple[str, str], than: tuple[str, str] | None = None) -> list[Text | str]:
    """Tell whether a way takes longer than the base; than another variant: at least no less."""
    if not times.shapes:
        return [UNSEEN, "–"]
    own = times.over(way, times.shapes[0], *(() if than is None else (than,)))
    if own is None:
        return [UNSEEN, "–"]
    if own.holds:
        return [HOLDS if own.share > 0 else FAILS, latencies.cell(own)]
    as_long = than is not None and own.low > -SAME
    return [HOLDS if as_long else OPEN, latencies.cell(own)]


def _shrinks(times: Latencies, way: tuple[str, str]) -> list[Text | str]:
    own = times.growth(way)
    if own is None:
        return [UNSEEN, "–"]
    verdict = OPEN if not own.holds else HOLDS if own.share < 0 else FAILS
    return [verdict, latencies.cell(own)]


def _expected_scores(measured: Measured, ranking: Ranking, metric: Metric) -> list[list[Text | str]]:
    """Every method learns, and LoRA is no worse than the others at an equal budget."""
    trained, family = measured.trained, measured.of_budget("r=8")
    rows: list[list[Text | str]] = []
    if measured.base:
        verdicts = [ranking.contrast(n, BASE).verdict for n in trained]
        rows.append(
            [
                Text("every method is better than the base", "每個方法都勝過基礎模型"),
                _all_better(verdicts),
                f"{verdicts.count('better')} / {len(trained)}",
            ]
        )
    lora = next((n for n, own in family.items() if family_of(own[0].arm) == "LoRA"), None)
    for name in family:
        if lora is not None and name != lora:
            found = ranking.contrast(lora, name)
            words = {"worse": FAILS, "undecided": OPEN}.get(found.verdict, HOLDS)
            claim = Text(f"{lora} is no worse than {name}", f"{lora} 不比 {name} 差")
            rows.append([claim, words, metric.span(found.low, found.high)])
    return rows


def _all_better(verdicts: Sequence[str]) -> Text:
    if all(verdict == "better" for verdict in verdicts):
        return HOLDS
    return OPEN if set(verdicts) <= {"better", "undecided"} else FAILS


def caution(measured: Measured) -> Text:
    """What would change the answer, and what could not be timed."""
    found = Text(
        "Latencies are of this machine: on another one the fixed cost of a small layer weighs "
        "differently. Prefixes learn slowly in short runs, and a longer one is not always better.",
        "延遲只代表這台機器：換一台機器，小型層的固定開銷比重就不同。"
        "短訓練中 prefix 學得慢，而且 prefix 並非越長越好。",
    )
    if measured.latencies.refused:
        names = listed(list(measured.latencies.refused))
        found += Text(f"Not timed, since the model cannot have it: {names.en}.", f"模型不支援而沒有計時：{names.zh}。")
    return found
