"""Q9: ten tasks on one base: what storing, loading and mixing their adapters costs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.contrast import Contrast
from loralab.studies.evidence import (
    SEED,
    Metric,
    by_arm,
    claim,
    count,
    mean_of,
    metric_of,
    own_interval,
    plain,
    scores_table,
    seconds,
    size,
)
from loralab.studies.measures.system import ALONE, MEASURE_SYSTEM, MEASURE_TASK, MIXED, SIZES, TURN
from loralab.studies.ranking import ranked
from loralab.studies.statistics import difference
from loralab.studies.study import Answer, Arm, Figure, Finding, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.tasks.catalog import TASKS

__all__ = ["MEASURE", "arms", "conclude"]

MEASURE = MEASURE_TASK
SYSTEM = "system"
TEN = (
    "movie-reviews",
    "tweets",
    "amazon-reviews",
    "nyt-editorials",
    "movie-reviews-strength",
    "tweets-strength",
    "amazon-reviews-strength",
    "nyt-editorials-strength",
    "text-source",
    "rater-agreement",
)
READERS = ("sequence-classification", "causal-lm")
RATE = 3e-3  # LoRA's usual one is for longer runs
ALIKE = 1e-4  # of the largest logit: what fp32 may differ by when sums are taken in another order
WAYS = {
    MIXED: Text("mixed batch", "混合批次"),
    TURN: Text("one adapter after the other", "逐一切換 adapter"),
    ALONE: Text("base model alone", "只有基礎模型"),
}


def arms(ground: Ground, base: Base) -> list[Arm]:
    """An adapter for each task, and the system that holds them all.

    Raises:
        ConfigError: a task is neither named nor a file, or there is only one.
    """
    names = _tasks(ground, base)
    fields = {"method": "lora", "rank": 8, "learning_rate": RATE}
    if ground.fields.get("learning_rate"):
        fields["learning_rate"] = ground.fields["learning_rate"]
    own = [
        Arm(name=name, fields=fields, options={"measure": MEASURE_TASK, "task": name}, tuned=False) for name in names
    ]
    options = {"measure": MEASURE_SYSTEM, "arms": [asdict(arm) for arm in own]}
    return [*own, Arm(name=SYSTEM, options=options, tuned=False, plain=True)]


def _tasks(ground: Ground, base: Base) -> list[str]:
    """The tasks asked for; else the ten, the study's own data in front."""
    if not ground.values:
        if base.kind not in READERS:
            raise ConfigError(
                f"the ten tasks are texts with labels, and this model is of the kind {base.kind}; "
                "name your own tasks: --values a.csv,b.csv"
            )
        others = [name for name in TEN if name != ground.data]
        return [ground.data, *others[: len(TEN) - 1]]
    for name in ground.values:
        if name not in TASKS and not Path(name).exists():
            raise ConfigError(f"{name!r} is no task and no file{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}")
    if len(set(ground.values)) < 2:
        raise ConfigError("a system of several tasks needs at least two after --values")
    return list(dict.fromkeys(ground.values))


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Bytes, times and equality of the system; and whether each adapter has learnt its task."""
    system = next((r for r in records if r.arm.name == SYSTEM and r.numbers), None)
    tasks = by_arm(r for r in records if r.arm.name != SYSTEM)
    metric = metric_of(records, ground)
    learnt = [found for name, own in tasks.items() if (found := _learnt(name, own, metric))]
    tables = [scores_table(tasks, metric)] if tasks else []
    shown = [_scores(tasks, metric)] if tasks else []
    if system is None:
        return Answer(
            sentence=Text("The system has not been measured yet.", "還沒有系統的量測結果。"),
            findings=learnt,
            tables=tables,
            figures=shown,
            blanks=_blanks(None, learnt),
        )
    faster = speedups(system)
    return Answer(
        sentence=_sentence(system, faster),
        findings=[_equal(system), *(_quicker(n, f) for n, f in faster.items()), *learnt],
        blanks=_blanks(system, learnt),
        tables=[_storage(system), _times(system), *tables],
        figures=[_time_figure(system), *shown],
        method=Text(
            "Every task trains a LoRA of rank 8 on all linear layers, and a head of its own where the "
            f"model has one, at the one learning rate {RATE:.0e}, which was not tuned: the question is "
            "the system. Bytes are those of fp32 files. A cold load reads and checks the folder and "
            "attaches it (the file may stand in the system's cache); a warm one copies tensors that "
            "are in memory. Answers and times are in fp32: a mixed batch against the rows of each "
            "adapter on their own, adapter after adapter.",
            "每個任務在所有線性層上訓練 rank 8 的 LoRA（模型有分類頭時，各任務有自己的分類頭），學習率一律"
            f"為 {RATE:.0e}，沒有另外調校：這題問的是系統。位元組數以 fp32 檔案計。冷載入包含讀檔、檢查與"
            "掛載（檔案可能已在系統快取中）；熱載入是複製已在記憶體中的張量。答案與時間都以 fp32 量測："
            "混合批次對上每個 adapter 各自處理自己的資料。",
        ),
        caution=Text(
            "Times are those of this machine and of short inputs: with more adapters in a batch, or "
            "rows that are few for each, mixing gains more; with a batch of one adapter it gains nothing.",
            "時間取決於這台機器與輸入長度：批次中的 adapter 越多、每個 adapter 的資料越少，混合批次越划算；"
            "整個批次只有一個 adapter 時則沒有好處。",
        ),
        next=Text("Measure with your own tasks: --values a.csv,b.csv,...", "用自己的任務量測：--values a.csv,b.csv,…"),
    )


def speedups(system: Record) -> dict[int, Contrast]:
    """For each size of a batch, the logarithm of how often mixing is as fast, by repeats."""
    found = {}
    for rows in SIZES:
        ours, theirs = (system.series.get(f"{way} {rows}", ()) for way in (MIXED, TURN))
        if len(ours) > 1 and len(ours) == len(theirs):
            found[rows] = difference(
                [np.log(theirs).tolist()],
                [np.log(ours).tolist()],
                comparisons=len(SIZES),
                generator=np.random.default_rng(SEED),
            )
    return found


def alike(system: Record) -> bool:
    """Tell whether mixed batches answer as one adapter after the other does."""
    numbers = system.numbers
    close = numbers["furthest"] <= ALIKE * max(1.0, numbers["largest"])
    return close and numbers["same"] == 1.0


def _sentence(system: Record, faster: Mapping[int, Contrast]) -> Text:
    n = round(system.numbers["adapters"])
    adapters, whole, models = _bytes(system)
    found = Text(
        f"{n} adapters take {size(adapters)}, with their base {size(whole)}, where {n} full models take "
        f"{size(models)} ({models / whole:.1f} times as much).",
        f"{n} 個 adapter 共 {size(adapters)}，連同基礎模型 {size(whole)}；{n} 個完整模型則要 {size(models)}"
        f"（{models / whole:.1f} 倍）。",
    )
    found += _equal(system).sentence
    for rows in dict.fromkeys([*list(faster)[:1], *list(faster)[-1:]]):  # fewest and most
        found += _quicker(rows, faster[rows]).sentence
    return found


def _bytes(system: Record) -> tuple[float, float, float]:
    """Of all adapters, of all adapters with their base, and of as many full models."""
    numbers = system.numbers
    adapters = numbers["adapters"] * numbers["adapter_bytes"]
    return adapters, adapters + numbers["model_bytes"], numbers["adapters"] * numbers["model_bytes"]


def _equal(system: Record) -> Finding:
    numbers = system.numbers
    rows, far = count(numbers["compared"]), f"{numbers['furthest']:.1e}"
    if alike(system):
        sentence = Text(
            f"Mixed batches answer all {rows} rows as one adapter after the other does (logits differ "
            f"by at most {far}).",
            f"混合批次在全部 {rows} 筆資料上的答案與逐一切換 adapter 相同（logits 最多相差 {far}）。",
        )
    else:
        sentence = Text(
            f"Mixed batches do NOT answer as one adapter after the other does: {100 * numbers['same']:.1f} % "
            f"of {rows} answers are the same, and logits differ by up to {far}.",
            f"混合批次的答案與逐一切換 adapter 不同：{rows} 筆中只有 {100 * numbers['same']:.1f}% 相同，"
            f"logits 最多相差 {far}。",
        )
    return Finding(sentence=sentence, holds=alike(system))


def _quicker(rows: int, found: Contrast) -> Finding:
    """How often as fast a mixed batch is, with its interval; or that it is not."""
    low, high = math.exp(found.low), math.exp(found.high)
    ratio = math.exp(found.estimate)
    span = f"{low:.2f} … {high:.2f}"
    if not found.holds:
        sentence = Text(
            f"With {rows} rows, mixing and one adapter after the other take the same time beyond noise (ratio {span}).",
            f"批次 {rows} 筆時，混合批次與逐一切換的時間沒有超出雜訊的差異（比值 {span}）。",
        )
    elif ratio > 1:
        sentence = Text(
            f"With {rows} rows, a mixed batch is {ratio:.1f} times as fast as one adapter after the "
            f"other (95 % interval {span}).",
            f"批次 {rows} 筆時，混合批次的速度是逐一切換的 {ratio:.1f} 倍（95% 信賴區間 {span}）。",
        )
    else:
        sentence = Text(
            f"With {rows} rows, a mixed batch is slower than one adapter after the other: it takes "
            f"{1 / ratio:.2f} times as long (95 % interval of the speed {span}).",
            f"批次 {rows} 筆時，混合批次比逐一切換慢，時間為 {1 / ratio:.2f} 倍（速度比的 95% 信賴區間 {span}）。",
        )
    return Finding(sentence=sentence, holds=found.holds, effect=found.estimate, low=found.low, high=found.high)


def _learnt(name: str, own: Sequence[Record], metric: Metric) -> Finding | None:
    """An adapter against the commonest label of its task."""
    if not all(r.items.get("majority") for r in own):
        return None
    label = "its commonest label"
    plain = replace(own[0], arm=replace(own[0].arm, plain=True), items={"score": own[0].items["majority"]})
    return claim(ranked({name: own}, metric, {label: [plain]}).contrast(name, label), metric)


def _blanks(system: Record | None, learnt: Sequence[Finding]) -> list[tuple[Text, Text]]:
    """The source's three considerations and its line for the design."""
    labels = (
        Text("1. How should 10 adapters be stored?", "1. 如何儲存 10 個 adapter？"),
        Text("2. How can adapters be loaded dynamically?", "2. 如何動態載入不同 adapter？"),
        Text("3. How can one batch hold different adapters?", "3. 如何實現 batching（同一 batch 不同 adapter）？"),
        Text("Your design", "你的設計"),
    )
    if system is None:
        return [(label, Text("not measured", "尚未量測")) for label in labels]
    answers = (_stored(system), _loading(system), _batching(system), _design(system, learnt))
    return list(zip(labels, answers, strict=True))


def _stored(system: Record) -> Text:
    numbers = system.numbers
    one, model = size(numbers["adapter_bytes"]), size(numbers["model_bytes"])
    share = 100 * numbers["adapter_bytes"] / numbers["model_bytes"]
    return Text(
        f"One folder for each: {one} instead of {model} for a full model ({share:.2g} %), beside one "
        "base that all of them share.",
        f"每個任務一個資料夾：{one}，而完整模型要 {model}（{share:.2g}%），所有任務共用一個基礎模型。",
    )


def _loading(system: Record) -> Text:
    numbers = system.numbers
    cold, warm = numbers["cold_seconds"], numbers["warm_seconds"]
    room = count(1e9 // numbers["adapter_bytes"])
    return Text(
        f"From disk {seconds(cold)}, from memory {seconds(warm)}; loading the model takes "
        f"{seconds(numbers['model_seconds'])}. 1 GB of memory holds {room} adapters: keep those in use "
        "there, and drop the least recently used.",
        f"從磁碟載入 {seconds(cold)}，從記憶體切換 {seconds(warm)}；載入整個模型要 "
        f"{seconds(numbers['model_seconds'])}。1 GB 記憶體可放 {room} 個 adapter：常用的留在記憶體，"
        "最久沒用的先移出。",
    )


def _batching(system: Record) -> Text:
    how = Text(
        "Stack A and B of all adapters, pick each row's own, and add B A x to W x in two batched "
        "products; the base is computed once for all rows.",
        "把所有 adapter 的 A、B 疊起來，每筆資料取自己的一組，用兩次批次矩陣乘法把 B A x 加到 W x；"
        "基礎模型對整個批次只算一次。",
    )
    for found in (_quicker(rows, own) for rows, own in speedups(system).items()):
        how += found.sentence
    return how + _equal(system).sentence


def _design(system: Record, learnt: Sequence[Finding]) -> Text:
    worked = sum(f.holds and (f.effect or 0) > 0 for f in learnt)
    mixes = alike(system) and any(f.holds and f.estimate > 0 for f in speedups(system).values())
    way = (
        Text("mix requests of all tasks in one batch", "把所有任務的請求混在同一批次")
        if mixes
        else Text("group requests by adapter", "把請求按 adapter 分組處理")
    )
    base = Text("One base in memory, adapters beside it;", "記憶體中一個基礎模型，旁邊放 adapter；")
    tail = Text(
        f"{way.en}. {worked} of {len(learnt)} adapters beat the commonest label of their task beyond noise.",
        f"{way.zh}。{len(learnt)} 個 adapter 中有 {worked} 個以超出雜訊的幅度勝過該任務最常見的標籤。",
    )
    return base + tail


def _storage(system: Record) -> Table:
    adapters, whole, models = _bytes(system)
    n, one = round(system.numbers["adapters"]), system.numbers["adapter_bytes"]
    rows = [
        [Text("one adapter", "一個 adapter"), size(one)],
        [Text(f"{n} adapters", f"{n} 個 adapter"), size(adapters)],
        [Text(f"{n} adapters and their base", f"{n} 個 adapter 加基礎模型"), size(whole)],
        [Text(f"{n} full models", f"{n} 個完整模型"), size(models)],
    ]
    return Table(
        title=Text("What is stored", "儲存量"), columns=(Text("what", "項目"), Text("bytes", "大小")), rows=rows
    )


def _times(system: Record) -> Table:
    """The median time of a batch in each of the ways."""
    rows = [
        [
            str(n),
            *(_median(system, way, n) for way in WAYS),
            plain(math.exp(found.estimate), 2),
            f"{math.exp(found.low):.2f} – {math.exp(found.high):.2f}",
        ]
        for n, found in speedups(system).items()
    ]
    return Table(
        title=Text("Time of a batch", "一個批次的時間"),
        columns=(
            Text("rows", "筆數"),
            *WAYS.values(),
            Text("in turn / mixed", "逐一 / 混合"),
            Text("95 % interval", "95% 信賴區間"),
        ),
        rows=rows,
    )


def _median(system: Record, way: str, rows: int) -> str:
    values = system.series.get(f"{way} {rows}", ())
    return seconds(float(np.median(values))) if len(values) else "–"


def _time_figure(system: Record) -> Figure:
    rows = [
        {"arm": str(n), "group": way, "value": 1e3 * float(np.median(system.series[f"{way} {n}"]))}
        for n in SIZES
        for way in WAYS
        if system.series.get(f"{way} {n}")
    ]
    return figures.old(
        "bars",
        "multitask-times",
        Text("Time of a batch in milliseconds", "一個批次的時間（毫秒）"),
        rows,
        x=Text("rows of the batch", "批次筆數"),
        y=Text("milliseconds", "毫秒"),
        group=Text("way", "方式"),
    )


def _scores(tasks: Mapping[str, Sequence[Record]], metric: Metric) -> Figure:
    rows = []
    for name, own in tasks.items():
        found = own_interval(own)
        base = mean_of(own, "majority")
        rows.append(
            {
                "arm": name,
                "value": found.mean,
                "low": found.low,
                "high": found.high,
                "majority": None if math.isnan(base) else base,
            }
        )
    return figures.old(
        "intervals",
        "multitask-scores",
        Text("Score of every adapter on its own task", "每個 adapter 在自己任務上的分數"),
        rows,
        x=Text("task", "任務"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        percent=metric.rises,
    )
