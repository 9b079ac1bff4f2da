"""Q1: is the update low-rank? Its spectrum, the intrinsic dimension, and shared directions."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.evidence import by_arm, claim, metric_of, scores_table
from loralab.studies.measures.dimension import MEASURE_DIMENSION, MEASURE_FLOOR
from loralab.studies.measures.frozen import KINDS, MEASURE_FROZEN
from loralab.studies.measures.overlaps import LARGE, MEASURE_OVERLAPS, SMALL
from loralab.studies.measures.spectra import MEASURE_FULL
from loralab.studies.ranking import ranked
from loralab.studies.readings.lowrank_claims import Read, amplified, dimension, order, overlap, spectrum
from loralab.studies.readings.lowrank_shown import (
    curve_figure,
    dimension_table,
    energy_figure,
    layer_figure,
    module_table,
    order_table,
    phi_figures,
)
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

BASE, FULL, HEAD, PAIRS = "base", "full", "linear head", f"r={SMALL} and r={LARGE}"
SIZES = {  # variant -> d, thorough and quick
    "did": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (1_000, 10_000, 100_000)),
    "said": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (100_000,)),
}
SCALES = ((1.0, 2.5), (2.5,))  # how far theta moves in a step, thorough and quick
FULL_RATE, LORA_RATE = 3e-4, 2e-3


def arms(ground: Ground, base: Base) -> list[Arm]:
    """The base, a full fine-tune, a head alone, three LoRA runs in one, and every d.

    Raises:
        ConfigError: a value is no number of directions.
    """
    quick = ground.quick
    full: dict[str, Any] = {"method": "full"}
    if quick:
        full["learning_rate"] = FULL_RATE
    found = [
        Arm(name=BASE, options={"measure": MEASURE_FLOOR}, tuned=False, plain=True),
        Arm(name=FULL, fields=full, options={"measure": MEASURE_FULL}, tuned=not quick),
    ]
    if base.kind in KINDS:
        found.append(Arm(name=HEAD, options={"measure": MEASURE_FROZEN}, tuned=False, plain=True))
    options = {"measure": MEASURE_OVERLAPS, "rate": LORA_RATE}
    found.append(Arm(name=PAIRS, options=options, tuned=False))
    for variant, sizes in SIZES.items():
        for size in _sizes(ground) or sizes[quick]:
            options = {"measure": MEASURE_DIMENSION, "variant": variant, "d": size, "rates": list(SCALES[quick])}
            found.append(Arm(name=f"{variant.upper()} d={size}", options=options, tuned=False))
    return found


def _sizes(ground: Ground) -> list[int]:
    """The d that were asked for."""
    wrong = [value for value in ground.values if not value.isdecimal() or int(value) < 1]
    if wrong:
        raise ConfigError(f"--values of lowrank are numbers of directions d, such as 1000,10000; got {wrong[0]!r}")
    return sorted({int(value) for value in ground.values})


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The spectrum, d90 and the overlaps, each only as far as it was measured."""
    read = Read.of(records, full=FULL, pairs=PAIRS)
    parts = [part for part in (spectrum(read), dimension(read), overlap(read)) if part]
    every, metric = by_arm(records), metric_of(records)
    if not parts and not every:
        return Answer(
            sentence=Text("Nothing has been measured yet.", "還沒有任何量測結果。"), blanks=_blanks(read, records)
        )
    sentence = Text("", "")
    for number, part in enumerate(parts):
        sentence = sentence + part.sentence if number else part.sentence
    findings = [f for part in parts for f in part.findings]
    if not parts:
        sentence = Text(
            "Neither the spectrum nor the intrinsic dimension has been measured yet.",
            "更新的頻譜與內在維度都還沒有結果。",
        )
    return Answer(
        sentence=sentence,
        findings=[*findings, *_expected(read), *_against_full(records)],
        blanks=_blanks(read, records),
        tables=[
            *module_table(read),
            *dimension_table(read, metric),
            *order_table(read),
            *([scores_table(every, metric)] if every else []),
        ],
        figures=[*energy_figure(read), *layer_figure(read), *curve_figure(read, metric), *phi_figures(read)],
        method=METHOD,
        caution=CAUTION,
        next=_next(read),
    )


def _expected(read: Read) -> list[Finding]:
    """What W has in the directions of an update; without a size, since most of it is no surprise."""
    return [replace(f, effect=None, low=None, high=None) for f in order(read)]


def _next(read: Read) -> Text:
    """Finer steps of d where one has reached the target, more steps or a larger d where none has."""
    part = dimension(read)
    if part is not None and any(f.effect is not None for f in part.findings):
        return Text(
            "Look between the d that reached the target and the one below it: --values takes them.",
            "在達標的 d 與前一個 d 之間再細分：用 --values 指定。",
        )
    return Text(
        "Train longer (--steps) or take a larger d (--values): d90 falls with more steps.",
        "訓練更久（--steps）或用更大的 d（--values）：步數越多，d90 越小。",
    )


def _against_full(records: Sequence[Record]) -> list[Finding]:
    """Full fine-tuning against the base, and the head alone against full fine-tuning."""
    every, metric = by_arm(records), metric_of(records)
    if FULL not in every:
        return []
    found = ranked({FULL: every[FULL]}, metric, {name: every.get(name, ()) for name in (BASE, HEAD)})
    pairs = ((FULL, BASE), (HEAD, FULL))
    return [claim(found.contrast(a, b), metric) for a, b in pairs if {a, b} <= found.means.keys()]


def _blanks(read: Read, records: Sequence[Record]) -> list[tuple[Text, Text]]:
    """The source's three directions to think in, by numbers."""
    return [
        (Text("What has a pre-trained model learnt already?", "預訓練模型已經學到了什麼？"), _known(records)),
        (Text("What does fine-tuning really change?", "微調時我們真正在改變什麼？"), _changed(read)),
        (
            Text('What does "intrinsic dimensionality" mean?', '"內在維度" (intrinsic dimensionality) 是什麼意思？'),
            _meaning(read),
        ),
    ]


NOTHING = Text("not measured", "尚未量測")


def _known(records: Sequence[Record]) -> Text:
    """What frozen features, or the untrained model, score beside training everything."""
    every, metric = by_arm(records), metric_of(records)
    head = HEAD if HEAD in every else BASE
    if head not in every or FULL not in every:
        return NOTHING
    frozen, full = (metric.value(statistics.fmean(r.numbers["score"] for r in every[name])) for name in (head, FULL))
    what = (
        Text("A linear head fitted to its frozen features scores", "特徵固定、只擬合線性分類頭得")
        if head == HEAD
        else Text("The model as it is scores", "未經訓練的模型得")
    )
    found = Text(f"{what.en} {frozen}; training every weight, {full}.", f"{what.zh} {frozen}；訓練所有權重得 {full}。")
    own = [r for r in records if r.arm.name in (head, FULL)]
    return found + _against_full(own)[-1].sentence


def _changed(read: Read) -> Text:
    """How large the update is, how many directions hold it, and what they amplify."""
    part, found = spectrum(read), NOTHING
    if part is not None:
        size = 100 * statistics.median(row["relative"] for row in read.modules)
        found = Text(
            f"The weights move by {size:.2g} % of their length (median of layers).",
            f"權重只移動其長度的 {size:.2g}%（各層中位數）。",
        )
        found += part.sentence
    more = amplified(read)
    if more is None:
        return found
    return more if part is None else found + more


def _meaning(read: Read) -> Text:
    """The definition, and the number found here."""
    found = Text(
        "The smallest number d of random directions in which training reaches 90 % of what full "
        "fine-tuning gains (d90).",
        "只在 d 個隨機方向上訓練，就能達到完整微調增益的 90%；這樣的最小 d 就是內在維度（d90）。",
    )
    part = dimension(read)
    return found + part.sentence if part is not None else found + NOTHING


METHOD = Text(
    "Spectrum: W_trained - W of every linear layer of a full fine-tune, beside a random Gaussian matrix "
    "of the same shape; an update counts as low-rank where the median layer holds 90 % of its energy in "
    "a quarter of its directions. Intrinsic dimension: theta = theta0 + P theta_d with P by Fastfood "
    "(DID), and with one learnt scale for each layer (SAID); everything but the tables of embeddings "
    "goes through P, a new head included; same rows, order, steps and schedule as the full fine-tune. "
    "theta_d is trained by AdamW at a rate of c / sqrt(d), "
    f"c = {SCALES[1][0]:g} (thorough studies: the better of {SCALES[0][0]:g} and {SCALES[0][1]:g} by "
    "validation loss). d90 is the smallest d whose score, made non-decreasing in d, reaches 90 % of the "
    "gain of the full fine-tune over the better of the untrained model and the commonest label; its "
    "interval is a bootstrap over test rows. Overlaps and amplification: LoRA with r = 8 and r = 64, "
    f"other seeds, rate {LORA_RATE:.0e}; modules are taken as the sample.",
    "頻譜：完整微調後每個線性層的 W_trained − W，旁邊放同形狀的高斯隨機矩陣；若中位數的層用四分之一的方向就"
    "含有 90% 能量，就稱為低秩。內在維度：theta = theta0 + P theta_d，P 用 Fastfood（DID）；SAID 再為每層加一個"
    "可學的縮放。除了 embedding 表以外的所有權重（含新的分類頭）都經過 P；資料、順序、步數與排程都和完整微調"
    f"相同。theta_d 用 AdamW，學習率為 c / sqrt(d)，c = {SCALES[1][0]:g}（完整研究在 {SCALES[0][0]:g} 與 "
    f"{SCALES[0][1]:g} 中取驗證損失較低者）。d90 是分數（取對 d 不遞減後）達到完整微調相對於「未訓練模型與最常見"
    "標籤兩者較佳者」增益 90% 的最小 d；區間由測試資料的 bootstrap 得到。重疊與放大倍數：LoRA r = 8 與 r = 64，"
    f"隨機種子不同，學習率 {LORA_RATE:.0e}；以各模組為樣本。",
)
CAUTION = Text(
    "Few steps of AdamW move every weight by about the same amount, which makes an update look fuller "
    "than one of a long run; and d90 falls with more steps. A phi means nothing without its chance level.",
    "AdamW 訓練步數少時，每個權重移動的量差不多，更新看起來會比長時間訓練更滿秩；d90 也會隨步數增加而下降。"
    "phi 必須與隨機水準一起看才有意義。",
)
