"""Q3: why B = 0? Starts of A and B: the model before the first step, the first steps, the end."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from loralab.adapters.methods import INITS
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import SEED, Metric, by_arm, claim, mean_of, metric_of, plain, scored, scores_table
from loralab.studies.measures.step_zero import MEASURE_START
from loralab.studies.measures.watch import mean_of_steps
from loralab.studies.ranking import ranked
from loralab.studies.statistics import difference
from loralab.studies.study import DIVERGED, Answer, Arm, Figure, Finding, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.values import check_choice

__all__ = ["MEASURE", "arms", "conclude"]

MEASURE = MEASURE_START
ZERO, KAIMING, PISSA = "B = 0", "B Kaiming", "PiSSA"
NAMES = {"kaiming": ZERO, "b_kaiming": KAIMING, "gaussian": "A Gaussian", "pissa": PISSA, "orthogonal": "A orthogonal"}
USUAL = ("b_kaiming", "gaussian", "pissa")  # beside the reference
FIRST = 50  # losses that the source asks for
# a start away from the base model, and an A that is several times larger, bear smaller steps only:
# the two rates that quick studies try, as multiples of the usual one, would be unfair to them
LOWER = (0.6, 2.0)
SAME = 1e-4  # of the logits: less is fp32's rounding
LOSS = Metric(name="loss")
Arms = Mapping[str, Sequence[Record]]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """The usual start, and others at the same rank; `--values` names starts of `--init`."""
    wanted = ground.values or USUAL
    for value in wanted:
        check_choice("init", value, INITS)
    others = [
        Arm(
            name=NAMES[init],
            fields={"method": "lora", "rank": 8, "init": init},
            options={"rates": LOWER} if ground.quick and init in ("b_kaiming", "gaussian") else {},
        )
        for init in dict.fromkeys(wanted)
        if init != "kaiming"
    ]
    return [Arm(name=ZERO, fields={"method": "lora", "rank": 8}), *others]


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """What each start does to the model at step 0, to the first steps, and to the final score."""
    started = _started(records)
    if not started:
        return Answer(sentence=Text("No start has been measured yet.", "還沒有任何初始化的結果。"))
    ended, metric = by_arm(records), metric_of(records, ground)
    ranking = ranked(ended, metric) if ended else None
    finals = {}
    if ranking is not None and ZERO in ended:
        finals = {name: claim(ranking.contrast(name, ZERO), metric) for name in ended if name != ZERO}
    first = _first(started)
    return Answer(
        sentence=_sentence(started, finals),
        ranking=ranking,
        findings=[*_damage(started), *finals.values()],
        blanks=_blanks(started, ended, finals, metric),
        tables=[_start_table(started, first), scores_table(ended, metric)],
        figures=_figures(started, first),
        method=Text(
            "Every start has rank 8 and its own tuned learning rate. Damage compares the model with "
            "the adapter just attached with the base model, in fp32, on test rows: change of logits "
            "and of last hidden states as a share of their length, KL divergence, loss. A new "
            "classification head is random and the same in both. Gradients are those of the training "
            f"run itself, before clipping. First losses: up to {FIRST} steps, the same rows in the "
            "same order for all.",
            "每種初始化的 rank 都是 8，學習率各自調整。「破壞」是把剛掛上 adapter、尚未訓練的模型與預訓練模型比較，"
            "以 fp32 在測試資料上計算：logits 與最後一層隱藏狀態的相對變化、KL 散度、損失。"
            "新的分類頭是隨機的，但兩邊相同。梯度取自訓練過程本身，為裁剪前的值。"
            f"最初的損失最多 {FIRST} 步，各組看到的資料與順序相同。",
        ),
        caution=Text(
            "With a new, random head the loss before training says little: the hidden states tell "
            "what is lost. The damage grows with alpha / r and with the number of adapted layers.",
            "分類頭是隨機的，訓練前的損失參考價值有限，要看隱藏狀態的變化。alpha / r 越大、套用的層越多，破壞越大。",
        ),
        advice=_advice(ranking, ended),
        next=Text(
            "Repeat with fewer training rows: what the start destroyed then has to be learnt again from less.",
            "用更少的訓練資料重做一次：被破壞的知識只能從更少的資料學回來。",
        ),
    )


def _started(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records that know their start, by arm; those that diverged later among them."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if "start_logits" in record.numbers:
            found.setdefault(record.arm.name, []).append(record)
    return found


def _first(started: Arms) -> dict[str, list[float]]:
    """The first losses of every arm, mean over seeds, as many for all."""
    curves = {n: mean_of_steps([r.series["loss"] for r in own]) for n, own in started.items()}
    length = min([FIRST, *(len(curve) for curve in curves.values() if curve)])
    return {name: curve[:length] for name, curve in curves.items() if curve}


def _damage(started: Arms) -> list[Finding]:
    """Every start that is not the base model against it: the loss on the same rows.

    A new head is random: before training its loss shows nothing of what the model knows.
    """
    found = []
    for name, own in started.items():
        if _same(own) or any(r.numbers.get("head_parameters", 1) for r in own):
            continue
        changes = [record.items["start"] for record in own]
        gained = difference(
            changes, np.zeros_like(changes).tolist(), comparisons=len(started), generator=np.random.default_rng(SEED)
        )
        found.append(claim(replace(gained, a=f"{name} (step 0)", b="base"), LOSS))
    return found


def _off(own: Sequence[Record]) -> Text:
    """How far the logits before training are from the base model's, in words."""
    if all(record.numbers["start_equal"] for record in own):
        return Text("equal to the base bit for bit", "與預訓練模型逐位元相同")
    share = mean_of(own, "start_logits")
    if share < SAME:
        return Text(f"equal to the base but for rounding ({share:.0e})", f"與預訓練模型只差捨入誤差（{share:.0e}）")
    hidden = mean_of(own, "start_features")
    return Text(
        f"off by {share:.0%} of their length (last hidden states by {hidden:.0%})",
        f"偏離其長度的 {share:.0%}（最後一層隱藏狀態 {hidden:.0%}）",
    )


def _same(own: Sequence[Record]) -> bool:
    return mean_of(own, "start_logits") < SAME


def _sentence(started: Arms, finals: Mapping[str, Finding]) -> Text:
    """The start of B = 0, what B Kaiming does to it, and whether that is still seen at the end."""
    said = [
        Text(
            f"With {name} the logits before the first step are {_off(own).en}.",
            f"{name} 時，訓練前的 logits {_off(own).zh}。",
        )
        for name, own in started.items()
        if name in (ZERO, KAIMING)
    ]
    if KAIMING in finals:
        said.append(_end(finals[KAIMING]))
    if not said:
        return Text("Neither B = 0 nor B Kaiming has been measured.", "尚未測量 B = 0 與 B Kaiming。")
    whole = said[0]
    for text in said[1:]:
        whole = whole + text
    return whole


def _end(final: Finding) -> Text:
    if not final.holds:
        return Text("After training:", "訓練後：") + final.sentence
    if (final.effect or 0) < 0:
        return Text("Training does not make up for it:", "訓練也補不回來：") + final.sentence
    return Text("Yet it ends better:", "然而最後反而較好：") + final.sentence


def _blanks(started: Arms, ended: Arms, finals: Mapping[str, Finding], metric: Metric) -> list[tuple[Text, Text]]:
    """The source's two experiments, then its three questions."""
    labels = {
        ZERO: Text("Experiment 1: B starts at zero (the usual way)", "實驗 1: B 初始化為零（標準做法）"),
        KAIMING: Text("Experiment 2: B is Kaiming too", "實驗 2: B 也使用 Kaiming 初始化"),
    }
    found = [(label, _experiment(name, started, ended, metric)) for name, label in labels.items()]
    return [
        *found,
        (Text("How do the two starts affect training?", "兩種初始化對訓練有何影響？"), _influence(started, finals)),
        (Text("Why is the zero start better?", "為什麼零初始化更好？"), _why(started, finals)),
        (
            Text("How does this relate to not destroying pretrained knowledge?", "這與「不破壞預訓練知識」有何關係？"),
            _knowledge(started),
        ),
    ]


def _experiment(name: str, started: Arms, ended: Arms, metric: Metric) -> Text:
    if name not in started:
        return Text("not measured", "尚未測量")
    own = started[name]
    loss = f"{mean_of(own, 'base_loss'):.3f} → {mean_of(own, 'start_loss'):.3f}"
    end = Text("the run diverged", "訓練發散")
    if name in ended:
        end = Text(f"{metric.text.en} {scored(ended[name], metric)}", f"{metric.text.zh} {scored(ended[name], metric)}")
    return Text(
        f"logits before training {_off(own).en}, loss {loss}; {end.en}",
        f"訓練前的 logits {_off(own).zh}，損失 {loss}；{end.zh}",
    )


def _gradient(own: Sequence[Record], part: str, step: int) -> float | None:
    """The mean length of a part's gradient at a step, from 0; None where none was noted."""
    curves = [r.series[f"gradient_{part}"] for r in own if r.series.get(f"gradient_{part}")]
    return mean_of_steps(curves)[step] if curves else None


def _influence(started: Arms, finals: Mapping[str, Finding]) -> Text:
    first = _first(started)
    parts = []
    for name in (n for n in (ZERO, KAIMING) if n in started):
        a, b = (_gradient(started[name], part, 0) for part in ("A", "B"))
        losses = plain(float(np.mean(first[name]))) if name in first else "–"
        gradients = Text("gradients not noted", "未記錄梯度")
        if a is not None and b is not None:
            gradients = Text(
                f"at step 1 the gradient of A is {a:.3g}, of B {b:.3g}", f"第 1 步 A 的梯度 {a:.3g}、B 的梯度 {b:.3g}"
            )
        count = len(first.get(name, ()))
        parts.append(
            Text(
                f"{name}: {gradients.en}; mean of the first {count} training losses {losses}.",
                f"{name}：{gradients.zh}；前 {count} 步訓練損失平均 {losses}。",
            )
        )
    if KAIMING in finals:
        parts.append(finals[KAIMING].sentence)
    if not parts:
        return Text("not measured", "尚未測量")
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def _why(started: Arms, finals: Mapping[str, Finding]) -> Text:
    """Only as much better as was measured."""
    if KAIMING not in started or ZERO not in started:
        return Text("not measured", "尚未測量")
    start = Text(
        f"B A = 0 leaves the model before training {_off(started[ZERO]).en}; with B Kaiming it is "
        f"{_off(started[KAIMING]).en}.",
        f"B A = 0 讓訓練前的模型{_off(started[ZERO]).zh}；B Kaiming 則{_off(started[KAIMING]).zh}。",
    )
    final = finals.get(KAIMING)
    if final is None:
        diverged = any(r.status == DIVERGED for r in started[KAIMING])
        return start + (
            Text("B Kaiming diverged.", "B Kaiming 訓練發散。")
            if diverged
            else Text("The final score was not measured.", "沒有最終分數。")
        )
    if final.holds and (final.effect or 0) < 0:
        return start + Text("And the final score confirms it.", "最終分數也證實這一點。")
    if final.holds:
        return start + Text("In the final score it is not better here.", "但在此最終分數並沒有較好。")
    return start + Text(
        "In the final score no advantage is seen beyond noise here: the gain is a start that is safe at no cost.",
        "在此最終分數看不出超出雜訊的優勢：好處是不花代價就有安全的起點。",
    )


def _knowledge(started: Arms) -> Text:
    """Which starts keep the base model, and whether B must be zero for that."""
    keeps = [name for name, own in started.items() if _same(own)]
    loses = [name for name, own in started.items() if not _same(own)]
    said = Text(
        f"Before the first step these are the base model: {', '.join(keeps) or 'none'}; these are "
        f"not: {', '.join(loses) or 'none'}.",
        f"第一步之前仍等於預訓練模型的：{'、'.join(keeps) or '無'}；已經改變的：{'、'.join(loses) or '無'}。",
    )
    if PISSA in keeps:
        said = said + Text(
            "PiSSA has neither A nor B at zero and still keeps it, because its start is taken out of "
            "the base again: what counts is that nothing is added to W0 at step 0.",
            "PiSSA 的 A、B 都不為零卻仍保留預訓練模型，因為起始的乘積已從基底中扣除："
            "關鍵在於第 0 步對 W0 沒有任何加減。",
        )
    return said


def _advice(ranking: Ranking | None, ended: Arms) -> dict[str, str]:
    """The start of the recommended arm; the usual one stands first among equals."""
    if ranking is None or ranking.recommended is None or ZERO not in ended or len(ended) < 2:
        return {}
    return {"init": next(init for init, name in NAMES.items() if name == ranking.recommended)}


def _start_table(started: Arms, first: Mapping[str, Sequence[float]]) -> Table:
    columns = (
        Text("start", "初始化"),
        Text("logits moved", "logits 偏離"),
        Text("hidden states moved", "隱藏狀態偏離"),
        Text("KL from the base", "與預訓練模型的 KL 散度"),
        Text("loss: base", "損失：預訓練模型"),
        Text("loss: with the start", "損失：掛上後"),
        Text("gradient of A, step 1", "A 的梯度，第 1 步"),
        Text("gradient of B, step 1", "B 的梯度，第 1 步"),
        Text("first training loss", "第一個訓練損失"),
        Text("mean of first losses", "最初損失平均"),
    )
    rows = []
    for name, own in started.items():
        a, b = (_gradient(own, part, 0) for part in ("A", "B"))
        curve = first.get(name, ())
        rows.append(
            [
                name,
                f"{mean_of(own, 'start_logits'):.2%}",
                f"{mean_of(own, 'start_features'):.2%}",
                f"{mean_of(own, 'start_kl'):.2g}",
                plain(mean_of(own, "base_loss")),
                plain(mean_of(own, "start_loss")),
                "–" if a is None else f"{a:.3g}",
                "–" if b is None else f"{b:.3g}",
                plain(curve[0]) if curve else "–",
                plain(float(np.mean(curve))) if curve else "–",
            ]
        )
    return Table(title=Text("Step 0 and the first steps", "第 0 步與最初幾步"), columns=columns, rows=rows)


def _figures(started: Arms, first: Mapping[str, Sequence[float]]) -> list[Figure]:
    start, step = Text("start", "初始化"), Text("step", "步數")
    losses = [{"arm": name, "x": i + 1, "y": value} for name, curve in first.items() for i, value in enumerate(curve)]
    what = {"start_logits": "logits", "start_features": "hidden states"}
    moved = [
        {"arm": name, "group": said, "value": mean_of(own, key)}
        for name, own in started.items()
        for key, said in what.items()
    ]
    found = [
        figures.old(
            "bars",
            "init-step-0",
            Text("How far the model before training is from the base model", "訓練前的模型偏離預訓練模型多少"),
            moved,
            x=start,
            y=Text("share of their length", "相對變化"),
            group=Text("of", "對象"),
            percent=True,
        )
    ]
    if losses:
        found.insert(
            0,
            figures.old(
                "lines",
                "init-first-losses",
                Text("The first training losses", "最初的訓練損失"),
                losses,
                x=step,
                y=Text("training loss", "訓練損失"),
                arm=start,
            ),
        )
    return [*found, *_gradient_figure(started, start, step)]


def _gradient_figure(started: Arms, start: Text, step: Text) -> list[Figure]:
    rows = []
    for name, own in started.items():
        for part in ("A", "B"):
            curves = [r.series[f"gradient_{part}"] for r in own if f"gradient_{part}" in r.series]
            # a logarithm has no place for the zero that the gradient of A begins with
            rows += [
                {"arm": f"{name}: {part}", "x": i + 1, "y": value}
                for i, value in enumerate(mean_of_steps(curves)[:FIRST])
                if value > 0
            ]
    if not rows:
        return []
    return [
        figures.old(
            "lines",
            "init-gradients",
            Text("Gradients of A and of B; a zero is not drawn", "A 與 B 的梯度；零不畫出"),
            rows,
            x=step,
            y=Text("length of the gradient", "梯度長度"),
            arm=start,
            log_y=True,
        )
    ]
