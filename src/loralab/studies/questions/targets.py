"""Q4: which layers? Every choice at equal rank, and at equal numbers of trained parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError, nearest
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.budgets import Fields, largest_rank, solved, trained_parameters
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
from loralab.studies.measures.updates import MEASURE_UPDATES, REFERENCE, update_figure
from loralab.studies.places import ALL, ATTENTION, CHOICES, MLP, choices, outside, singles
from loralab.studies.ranking import (
    among,
    claims,
    describe_ranking,
    leader,
    listed,
    open_rivals,
    parameters,
    ranked,
    recommendation,
)
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.studies.trained import BASE_ARM, MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

RANK = 8
BASE, UPDATES = "base", "updates"
OFF = 0.1  # share of the budget by which an arm may miss it
BLANKS = (
    Text("smallest workable configuration", "最小可行配置"),
    Text("best value configuration", "最佳性價比配置"),
    Text("ceiling of performance", "效能天花板"),
)
Arms = Mapping[str, Sequence[Record]]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """Each choice with rank 8, and with the rank that trains as much as all-linear does with 8.

    Where a choice cannot hold that many, the budget is what the smallest of them can.
    """
    chosen = _chosen(ground, base)
    equal_rank = [_arm(name, RANK, targets) for name, targets in chosen.items()]
    equal_size = _at_budget(base, chosen, {} if ground.quick or ground.values else singles(base.model))
    distinct = {arm.name: arm for arm in (*equal_rank, *equal_size)}
    return [
        BASE_ARM,
        *distinct.values(),
        Arm(name=UPDATES, options={"measure": MEASURE_UPDATES}, tuned=False, plain=True),
    ]


def _chosen(ground: Ground, base: Base) -> dict[str, Any]:
    """The choices to compare; all-linear is always one, and the last."""
    able = choices(base.model)
    for value in ground.values:
        if value not in CHOICES:
            hint = nearest(value, CHOICES)
            raise ConfigError(f"values must be some of {', '.join(CHOICES)}, got {value!r}{hint}")
        if value not in able:
            raise ConfigError(f"{base.name} has no layers that {value!r} means; it has {', '.join(able)}")
    if ALL not in able:
        raise ConfigError(f"{base.name} has no linear layers outside its head")
    return {name: able[name] for name in able if name in (*(ground.values or able), ALL)}


def _arm(name: str, rank: int, targets: Any) -> Arm:
    """One choice with a rank; the reference arm has the fields that all studies give it."""
    fields = {"method": "lora", "rank": rank, "target_modules": targets}
    if name == ALL:
        fields = {**REFERENCE, "rank": rank}
    return Arm(name=f"{name} r={rank}", fields=fields)


def _at_budget(base: Base, chosen: Mapping[str, Any], more: Mapping[str, Any]) -> list[Arm]:
    """Every choice with the rank that comes nearest to a budget all of `chosen` can hold.

    Of `more`, those that can hold it too.
    """
    every = {name: _arm(name, RANK, targets).fields for name, targets in {**chosen, **more}.items()}
    most = {name: _most(base, fields) for name, fields in every.items()}
    budget = min(trained_parameters(base, REFERENCE), *(most[name] for name in chosen))
    found = []
    for name, targets in {**chosen, **more}.items():
        own = solved(base, every[name], "rank", budget)
        if most[name] >= budget and abs(own.parameters - budget) <= OFF * budget:
            found.append(_arm(name, own.size, targets))
    return found


def _most(base: Base, fields: Fields) -> int:
    """What a choice trains with the largest rank that its modules can have."""
    return trained_parameters(base, {**fields, "rank": largest_rank(base, fields)})


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Who stands first at equal budget and at equal rank, and the three blanks."""
    every, metric = by_arm(records), metric_of(records, ground)
    trained = {name: own for name, own in every.items() if name != BASE}
    told = {k: v for r in records if r.arm.name == UPDATES for k, v in r.tables.items()}
    if not trained:
        nothing = Text("No choice of layers has been measured yet.", "還沒有任何一種層的選擇有結果。")
        return Answer(sentence=nothing, blanks=[(label, nothing) for label in BLANKS])
    by_rank, by_size = _families(records, trained)
    found = ranked(trained, metric, {BASE: every.get(BASE, ())})
    return Answer(
        sentence=_sentence(found, by_rank, by_size, trained, metric),
        ranking=found,
        findings=_findings(found, by_rank, by_size, metric),
        blanks=_blanks(found, trained, metric),
        tables=[*_layers_table(told), _size_table(trained, by_size, metric), scores_table(every, metric)],
        figures=[_figure(trained, by_size, metric), *([update_figure(told["updates"])] if told.get("updates") else [])],
        method=_method(told),
        caution=_caution(trained, by_size),
        advice=_advice(trained, found.recommended),
        next=_next(found),
    )


def _families(records: Sequence[Record], trained: Arms) -> tuple[Arms, Arms]:
    """Arms of equal rank, and arms of equal size.

    A choice whose solved rank is 8 itself is one arm in both families. Every arm counts that was
    planned, failed ones too: who is missing must not move another one into a family.
    """
    ranks: dict[str, set[int]] = {}
    for record in records:
        if record.arm.name not in (BASE, UPDATES):
            ranks.setdefault(choice_of(record.arm.name), set()).add(rank_of(record.arm.name))

    def family(wanted: bool) -> Arms:
        return {
            name: own
            for name, own in trained.items()
            if (rank_of(name) == RANK) == wanted or (not wanted and len(ranks[choice_of(name)]) == 1)
        }

    equal_rank = {name: own for name, own in family(True).items() if choice_of(name) in CHOICES}
    return equal_rank, family(False)


def choice_of(name: str) -> str:
    """The choice of an arm, such as "q+v"."""
    return name.rpartition(" r=")[0]


def rank_of(name: str) -> int:
    """The rank of an arm."""
    return int(name.rpartition(" r=")[2])


def _sentence(found: Ranking, by_rank: Arms, by_size: Arms, trained: Arms, metric: Metric) -> Text:
    parts = Text("", "")
    if len(by_size) > 1:
        size = count(_budget(by_size))
        parts = Text(f"At equal budget (about {size} parameters)", f"參數預算相同（約 {size} 個）時，")
        parts += describe_ranking(among(found, by_size), by_size, metric)
    if len(by_rank) > 1:
        same = Text(f"At equal rank ({RANK})", f"rank 相同（{RANK}）時，")
        same += describe_ranking(among(found, by_rank), by_rank, metric)
        parts = parts + same if parts.en else same
    last = recommendation(found, trained, metric)
    return parts + last if parts.en else last


def _budget(by_size: Arms) -> float:
    reference = next((n for n in by_size if choice_of(n) == ALL), next(iter(by_size)))
    return parameters(by_size[reference])


def _findings(found: Ranking, by_rank: Arms, by_size: Arms, metric: Metric) -> list[Finding]:
    """Both families pair by pair, and the reference against the base."""
    top = f"{ALL} r={RANK}"
    floor = [claim(found.contrast(top, BASE), metric)] if {top, BASE} <= found.means.keys() else []
    both = [f for family in (by_size, by_rank) for f in claims(found, metric, list(family))]
    return [*floor, *{f.sentence.en: f for f in both}.values()]


def _blanks(found: Ranking, trained: Arms, metric: Metric) -> list[tuple[Text, Text]]:
    """The smallest that learns, the recommended one, and the highest mean."""
    none = Text("none: no configuration is shown to be better than the base model", "無：沒有任何配置確定勝過基礎模型")
    able = [n for n in found.names if BASE not in found.means or found.contrast(n, BASE).verdict == "better"]
    smallest = _described(able[0], trained, metric) if able else none
    taken = _described(found.recommended, trained, metric) if found.recommended else none
    return [(BLANKS[0], smallest), (BLANKS[1], taken), (BLANKS[2], _ceiling(found, trained, metric))]


def _described(name: str, trained: Arms, metric: Metric) -> Text:
    own = trained[name]
    size, step = count(parameters(own)), seconds(mean_of(own, "step_seconds"))
    return Text(
        f"{name}: {size} parameters, {step} a step, {metric.text.en} {scored(own, metric)}",
        f"{name}：參數 {size} 個，每步 {step}，{metric.text.zh} {scored(own, metric)}",
    )


def _ceiling(found: Ranking, trained: Arms, metric: Metric) -> Text:
    own = _described(leader(found), trained, metric)
    if not (rivals := open_rivals(found)):
        return own
    tied = listed(rivals)
    return own + Text(f"(undecided against {tied.en})", f"（與 {tied.zh} 尚無定論）")


def _size_table(trained: Arms, by_size: Arms, metric: Metric) -> Table:
    """Which arm belongs to which family, and by how much it misses the budget."""
    budget = _budget(by_size) if by_size else float("nan")
    rows = []
    for name, own in trained.items():
        off = f"{100 * (parameters(own) / budget - 1):+.1f} %" if name in by_size else "–"
        rows.append(
            [
                choice_of(name),
                rank_of(name),
                count(parameters(own)),
                off,
                scored(own, metric),
                seconds(mean_of(own, "step_seconds")),
            ]
        )
    return Table(
        title=Text("Choice of layers, rank and budget", "層的選擇、rank 與參數預算"),
        columns=(
            Text("layers", "層"),
            Text("rank", "rank"),
            Text("parameters without the head", "參數量（不含分類頭）"),
            Text("off the equal budget", "與相同預算的差距"),
            Text(f"test {metric.text.en} (95 % interval)", f"測試{metric.text.zh}（95% 信賴區間）"),
            Text("step", "每步時間"),
        ),
        rows=rows,
    )


def _layers_table(told: Mapping[str, Any]) -> list[Table]:
    """What the choices mean on this model."""
    if not told.get("layers"):
        return []
    places = {
        ATTENTION: Text("attention", "attention（注意力）"),
        MLP: Text("mlp", "mlp（FFN）"),
        "outside": Text("all-linear only", "只屬於 all-linear"),
    }
    rows = [
        [row["type"], f"{row['outputs']} × {row['inputs']}", row["count"], places[row["place"]]]
        for row in told["layers"]
    ]
    return [
        Table(
            title=Text("The linear layers of this model", "這個模型的線性層"),
            columns=(
                Text("layer", "層"),
                Text("outputs × inputs", "輸出 × 輸入"),
                Text("count", "個數"),
                Text("adapted by", "屬於"),
            ),
            rows=rows,
        )
    ]


def _figure(trained: Arms, by_size: Arms, metric: Metric) -> Any:
    rows = []
    for name in dict.fromkeys((*by_size, *trained)):
        own = own_interval(trained[name])
        rows.append({"arm": name, "value": own.mean, "low": own.low, "high": own.high})
    return figures.old(
        "intervals",
        "targets",
        Text("Score by choice of layers; equal budget first", "各種層選擇的分數；先列相同預算"),
        rows,
        x=Text("layers and rank", "層與 rank"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        percent=metric.rises,
    )


def _method(told: Mapping[str, Any]) -> Text:
    found = Text(
        "The equal budget is what all-linear trains with rank 8, or less where a choice cannot hold "
        "as much; ranks are solved for, since layers differ in shape. alpha is 16 throughout, with "
        "scaling alpha / r. Smallest workable: the fewest parameters among the configurations that "
        "are better than the base model.",
        "相同預算是 all-linear 在 rank 8 的訓練參數量（若有選擇容納不下則取較小者）；"
        "各層形狀不同，所以 rank 是解出來的，不是照抄。alpha 一律為 16，縮放為 alpha / r。"
        "最小可行：確定勝過基礎模型的配置中，參數最少的。",
    )
    return found + _source_names(told)


def _source_names(told: Mapping[str, Any]) -> Text:
    """What the source's choices come to on this model; empty where it is not known."""
    if not told.get("layers"):
        return Text("", "")
    beyond = outside(told["layers"])
    if beyond:
        names = listed(beyond)
        found = Text(
            f"The source's None (every linear layer) is its attention + FFN and, on this model, {names.en} besides.",
            f"原題的 None（所有 Linear 層）在這個模型上是 attention + FFN 再加上 {names.zh}。",
        )
    else:
        found = Text(
            "On this model the source's None (every linear layer) and its attention + FFN are the "
            "same layers: one arm, all-linear.",
            "在這個模型上，原題的 None（所有 Linear 層）與「包含 FFN」是同一組層，合為 all-linear 一組。",
        )
    if any(row["reaches_mlp"] for row in told.get("source", ())):
        found += Text(
            "Here the source's names c_attn, c_proj also reach the feed-forward network's c_proj: "
            "they are not attention alone; the arm `attention` is.",
            "這裡原題的 c_attn、c_proj 也會選到 FFN 的 c_proj，並非只有 attention；attention 這一組才是。",
        )
    return found


def _caution(trained: Arms, by_size: Arms) -> Text:
    missing = {choice_of(n) for n in trained} - {choice_of(n) for n in by_size}
    found = Text(
        "A task far from what the model was trained on may need more layers; the size of an update "
        "says where training went, not what would be lost without it.",
        "任務離預訓練資料越遠，可能需要越多層；更新量的大小只說明訓練改動了哪裡，不代表少了它會損失多少。",
    )
    if not missing:
        return found
    names = listed(sorted(missing))
    return found + Text(f"Not compared at equal budget: {names.en}.", f"沒有在相同預算下比較的選擇：{names.zh}。")


def _advice(trained: Arms, value: str | None) -> dict[str, Any]:
    if value is None:
        return {}
    fields = trained[value][0].arm.fields
    return {"target_modules": fields.get("target_modules", ALL), "rank": fields["rank"]}


def _next(found: Ranking) -> Text:
    if not (rivals := open_rivals(found)):
        return Text(f"Try {leader(found)} with other ranks.", f"以其他 rank 再試 {leader(found)}。")
    tied = listed((leader(found), *rivals))
    return Text(f"Add seeds to {tied.en}, which are not decided.", f"替 {tied.zh} 增加隨機種子，目前尚無定論。")
