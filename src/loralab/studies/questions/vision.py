"""Q12: LoRA on a Vision Transformer: which layers, against a linear probe and a full fine-tune."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.adapters.methods import FullFineTune
from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import (
    Metric,
    by_arm,
    claim,
    count,
    mean_of,
    metric_of,
    own_interval,
    scored,
    scores_table,
    seconds,
)
from loralab.studies.measures.anatomy import MEASURE_ANATOMY, anatomy_table, likeness
from loralab.studies.measures.updates import REFERENCE
from loralab.studies.places import CHOICES, choices
from loralab.studies.ranking import claims, describe_ranking, leader, open_rivals, parameters, ranked, recommendation
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.trained import MEASURE
from loralab.training.optim import usual_rate

__all__ = ["MEASURE", "arms", "conclude"]

RANK = 8
PROBE, FULL, ANATOMY = "linear-probe", "full", "anatomy"
SHORT = ("q+v", "all-linear")
LABELS = (
    Text("a ViT's architecture and an LLM's: what is alike and what is not", "ViT 的架構與 LLM 的異同"),
    Text("which layers should have LoRA", "哪些層應該使用 LoRA"),
    Text("how well it performs", "效能會如何"),
    Text("experiment plan", "實驗計畫"),
)
Arms = Mapping[str, Sequence[Record]]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """A linear probe, LoRA by choice of layers, a full fine-tune; what the model is made of."""
    if base.kind != "image-classification":
        raise ConfigError(
            f"the study vision needs a vision model and pictures, {base.name} is {base.kind}; "
            "take --model dinov2-s --data fashion-mnist, or a folder of pictures by class"
        )
    able = choices(base.model)
    for value in ground.values:
        if value not in able:
            hint = nearest(value, CHOICES)
            raise ConfigError(f"values must be some of {', '.join(able)}, got {value!r}{hint}")
    wanted = ground.values or (SHORT if ground.quick else CHOICES)
    found = [
        Arm(
            name=f"{name} r={RANK}",
            fields=REFERENCE if name == "all-linear" else {**REFERENCE, "target_modules": targets},
        )
        for name, targets in able.items()
        if name in wanted
    ]
    return [
        Arm(name=PROBE, fields={"method": PROBE}),
        *found,
        _full(ground),
        Arm(name=ANATOMY, options={"measure": MEASURE_ANATOMY}, tuned=False, plain=True),
    ]


def _full(ground: Ground) -> Arm:
    """The full fine-tune; quick rates all lie above its usual one, so there it keeps that."""
    fields: dict[str, Any] = {"method": FULL}
    if ground.quick and not ground.fixed_lr:
        fields["learning_rate"] = usual_rate(FullFineTune())
    return Arm(name=FULL, fields=fields)


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Tell whether LoRA beats the probe, which layers it needs, and how far the full fine-tune is."""
    every, metric = by_arm(records), metric_of(records, ground)
    told = {k: v for r in records if r.arm.name == ANATOMY for k, v in r.tables.items()}
    lora = {name: own for name, own in every.items() if name not in (PROBE, FULL)}
    if not lora:
        nothing = Text("LoRA has not been measured on this model yet.", "還沒有 LoRA 在這個模型上的結果。")
        alike = likeness(told) if told else nothing
        return Answer(
            sentence=nothing,
            tables=anatomy_table(told),
            blanks=[(LABELS[0], alike), *((label, nothing) for label in LABELS[1:])],
        )
    others = {name: every[name] for name in (PROBE, FULL) if name in every}
    found = ranked(lora, metric, others, floor=PROBE)
    findings, layers = _findings(found, others, metric), _layers(found, lora, metric)
    return Answer(
        sentence=_against(found, lora, others, metric) + layers,
        findings=findings,
        ranking=found,
        blanks=[
            (LABELS[0], likeness(told)),
            (LABELS[1], layers),
            (LABELS[2], _performance(every, metric)),
            (LABELS[3], _plan(found, findings, ground)),
        ],
        tables=[*anatomy_table(told), scores_table(every, metric)],
        figures=[_figure(every, metric)],
        method=_method(ground),
        caution=Text(
            "Few steps favour what starts from good features and learns fast; a full fine-tune gains "
            "most from more steps and more pictures. Small pictures cost accuracy in all arms alike.",
            "步數少時，能直接利用既有特徵、學得快的方法占優勢；完整微調從更多步數與更多圖片得到的好處最大。"
            "圖片縮小會讓每一組的準確率一起下降。",
        ),
        advice=_advice(found.recommended, lora),
        next=_next(found),
    )


def _method(ground: Ground) -> Text:
    """How the arms were made, and what was not tuned."""
    found = Text(
        "Every arm trains a new head; the linear probe trains nothing else. LoRA has rank 8, "
        "alpha 16. Pictures are resized to the study's image size, which sets how many patches "
        "the model reads.",
        "每一組都訓練新的分類頭，linear probe 只訓練它。LoRA 的 rank 為 8、alpha 為 16。"
        "圖片縮放到研究設定的大小，模型讀到的 patch 數由此決定。",
    )
    if not ground.quick or ground.fixed_lr:
        return found
    rate = f"{usual_rate(FullFineTune()):.0e}"
    return found + Text(
        f"The full fine-tune has its usual learning rate, {rate}, and is not tuned: what is tried in "
        "a quick study lies above it.",
        f"完整微調使用慣用的學習率 {rate}，沒有另外調整：快速模式嘗試的學習率都高於它。",
    )


def _against(found: Ranking, lora: Arms, others: Arms, metric: Metric) -> Text:
    """The best choice of layers against the probe and the full fine-tune."""
    best = leader(found)
    score = metric.value(mean_of(lora[best], "score"))
    parts = [_versus(found, best, name, others, metric) for name in (PROBE, FULL)]
    en, zh = "; ".join(p.en for p in parts), "；".join(p.zh for p in parts)
    return Text(f"LoRA ({best}) reaches {score}: {en}.", f"LoRA（{best}）達到 {score}：{zh}。")


def _versus(found: Ranking, best: str, name: str, others: Arms, metric: Metric) -> Text:
    if name not in others:
        return Text(f"{name} was not measured", f"{name} 沒有結果")
    own, score = found.contrast(best, name), metric.value(mean_of(others[name], "score"))
    size = metric.change(own.estimate)
    words = {
        "better": Text(f"better than {name} ({score}) by {size.en}", f"優於 {name}（{score}），差 {size.zh}"),
        "worse": Text(f"worse than {name} ({score}) by {size.en}", f"劣於 {name}（{score}），差 {size.zh}"),
        "equivalent": Text(f"equivalent to {name} ({score})", f"與 {name}（{score}）相當"),
        "undecided": Text(f"undecided against {name} ({score})", f"與 {name}（{score}）尚無定論"),
    }
    return words[own.verdict]


def _layers(found: Ranking, lora: Arms, metric: Metric) -> Text:
    """Which layers, as far as the numbers go."""
    if len(lora) > 1:
        words = describe_ranking(found, lora, metric)
        words = Text("Among the choices of layers", "在各種層的選擇之中，") + words
    else:
        words = Text("Only one choice of layers has a result.", "只有一種層的選擇有結果。")
    if found.recommended is None:
        return words + Text("None is shown to be better than the linear probe.", "沒有任何一種確定勝過 linear probe。")
    return words + recommendation(found, lora, metric)


def _performance(every: Arms, metric: Metric) -> Text:
    """Every arm's score and cost."""
    parts = []
    for name, own in every.items():
        size, step = count(parameters(own)), seconds(mean_of(own, "step_seconds"))
        score = scored(own, metric)
        parts.append(
            Text(
                f"{name} {score}, {size} parameters besides the head, {step} a step",
                f"{name} {score}，分類頭之外 {size} 個參數，每步 {step}",
            )
        )
    return Text("; ".join(p.en for p in parts), "；".join(p.zh for p in parts))


def _findings(found: Ranking, others: Arms, metric: Metric) -> list[Finding]:
    """Each choice against the probe and the full fine-tune, and the choices pair by pair."""
    across = [claim(found.contrast(name, other), metric) for other in others for name in found.names]
    return [*across, *claims(found, metric)]


def _plan(found: Ranking, findings: Sequence[Finding], ground: Ground) -> Text:
    """The next experiment: what this one leaves open, and what it would take."""
    open_ = [f for f in findings if f.verdict == "undecided"]
    steps = int(ground.fields.get("max_steps", 0))
    first = _next(found)
    plan = Text("1.", "1. ") + first
    if open_:
        plan += Text(f"2. Settle first: {open_[0].sentence.en}", f"2. 先釐清：{open_[0].sentence.zh}")
    number = 3 if open_ else 2
    more = max(100, 4 * steps)
    plan += Text(
        f"{number}. Train all arms for {more} steps with 3 seeds: does the order stay, and does "
        "the full fine-tune catch up?",
        f"{number}. 各組以 3 個隨機種子訓練 {more} 步：名次是否不變？完整微調是否追上？",
    )
    return plan + Text(
        f"{number + 1}. The same on your own pictures: --data FOLDER, one folder for each class.",
        f"{number + 1}. 換成自己的圖片重做：--data 資料夾，每個類別一個子資料夾。",
    )


def _next(found: Ranking) -> Text:
    first = leader(found)
    if PROBE in found.means and found.contrast(first, PROBE).verdict != "better":
        return Text(
            f"More pictures and steps for {first} and the linear probe, which are not told apart.",
            f"替 {first} 與 linear probe 增加圖片與步數，目前還分不出高下。",
        )
    if rivals := open_rivals(found):
        return Text(
            f"Compare {first} and {rivals[0]} at an equal number of parameters.",
            f"在參數量相同的條件下比較 {first} 與 {rivals[0]}。",
        )
    return Text(f"Try {first} with ranks 2 and 32.", f"以 rank 2 與 32 再試 {first}。")


def _advice(chosen: str | None, lora: Arms) -> dict[str, Any]:
    if chosen is None:
        return {}
    fields = lora[chosen][0].arm.fields
    return {"target_modules": fields.get("target_modules", "all-linear"), "rank": fields["rank"]}


def _figure(every: Arms, metric: Metric) -> Any:
    rows = []
    for name, own in every.items():
        found = own_interval(own)
        rows.append({"arm": name, "value": found.mean, "low": found.low, "high": found.high})
    return figures.old(
        "intervals",
        "vision",
        Text("Score by what is trained", "訓練不同部分時的分數"),
        rows,
        x=Text("trained besides the head", "分類頭之外訓練的部分"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        percent=metric.rises,
    )
