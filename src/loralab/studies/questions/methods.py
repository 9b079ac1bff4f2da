"""Q10: LoRA, adapters or prefix-tuning? At equal budgets, with latency as in LoRA's Table 1."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.adapters.registry import is_outside, specs
from loralab.errors import ConfigError, InputError, nearest
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.budgets import Fields, solved, trained_parameters
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import Metric, by_arm, claim, metric_of, own_interval, scores_table
from loralab.studies.measures.passes import MEASURE_PASSES
from loralab.studies.ranking import among, claims, describe_ranking, leader, open_rivals, ranked, recommendation
from loralab.studies.readings import compared, latencies
from loralab.studies.readings.compared import BASE, LATENCY, SOURCE, Measured
from loralab.studies.study import Answer, Arm, Finding, Ground, Record, Text
from loralab.studies.trained import BASE_ARM, MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

REFERENCE = {"method": "lora", "rank": 8}
LARGE, SMALL = "r=8", "r=2"  # budgets: what LoRA trains with these ranks
SIZES = {
    "lora": "rank",
    "dora": "rank",
    "houlsby": "width",
    "pfeiffer": "width",
    "prefix": "tokens",
    "prefix-mlp": "tokens",
}
LETTERS = {"rank": "r", "width": "w", "tokens": "p"}
SIZELESS = ("ia3", "bitfit", "full", "linear-probe")
SHORT = (("houlsby", LARGE), ("prefix", LARGE), ("prefix", SMALL))
LONG = (
    ("houlsby", LARGE),
    ("houlsby", SMALL),
    ("pfeiffer", LARGE),
    ("pfeiffer", SMALL),
    ("prefix", LARGE),
    ("prefix", SMALL),
    ("dora", LARGE),
)
SECONDS, TRIALS = (150, 20), (25, 12)  # of the latency cell: thorough, quick
CHOICE = Text("how I would choose", "你的選擇標準")


def arms(ground: Ground, base: Base) -> list[Arm]:
    """LoRA with rank 8, the others with as many parameters; the base; latencies, all in one cell.

    A method that the model cannot have stays in with its usual size: that it cannot run is said.
    """
    wanted = _wanted(ground)
    budgets = {name: trained_parameters(base, {**REFERENCE, "rank": rank}) for name, rank in ((LARGE, 8), (SMALL, 2))}
    found = [Arm(name=f"lora {LARGE}", fields=REFERENCE)]
    if not ground.quick and "lora" in wanted:
        found.append(Arm(name=f"lora {SMALL}", fields={**REFERENCE, "rank": 2}))
    pairs = SHORT if ground.quick and not ground.values else LONG
    found += [_sized(base, m, size, budgets[size]) for m, size in pairs if m in wanted]
    if not ground.quick and "prefix-mlp" in wanted:
        found += _through_network(found)
    others = [m for m in (*SIZELESS, *_outside()) if m in wanted]
    found += [_plain(m) for m in others if _possible(base, {"method": m})]
    unique = {arm.name: arm for arm in found}
    return [BASE_ARM, *unique.values(), _latency(ground, base, budgets)]


def _outside() -> tuple[str, ...]:
    """Return the methods of other packages."""
    return tuple(name for name, spec in specs().items() if is_outside(spec))


def _wanted(ground: Ground) -> tuple[str, ...]:
    """The methods to compare with LoRA."""
    known = (*SIZES, *SIZELESS, *_outside())
    for value in ground.values:
        if value not in known:
            hint = nearest(value, known)
            raise ConfigError(f"values must be some of {', '.join(known)}, got {value!r}{hint}")
    return ground.values or (tuple(m for m, _ in SHORT) if ground.quick else known)


def _sized(base: Base, method: str, budget: str, parameters: int) -> Arm:
    """A method of the size that comes nearest to a budget."""
    fields: Fields = {"method": method}
    try:
        fields = solved(base, fields, SIZES[method], parameters).fields
    except InputError:  # preparing the study meets it again, and tells
        return Arm(name=f"{method} ({budget})", fields=fields, options={"budget": budget})
    name = f"{method} {LETTERS[SIZES[method]]}={fields[SIZES[method]]}"
    return Arm(name=name, fields=fields, options={"budget": budget})


def _through_network(found: Sequence[Arm]) -> list[Arm]:
    """Prefixes as long as those trained directly, written by a network that is dropped at the end."""
    return [
        Arm(
            name=f"prefix-mlp p={arm.fields['tokens']}",
            fields={**arm.fields, "method": "prefix-mlp"},
            options=arm.options,
        )
        for arm in found
        if arm.fields.get("method") == "prefix" and "tokens" in arm.fields
    ]


def _plain(method: str) -> Arm:
    return Arm(name=method, fields={"method": method})


def _possible(base: Base, fields: Fields) -> bool:
    try:
        trained_parameters(base, fields)
    except InputError:
        return False
    return True


def _latency(ground: Ground, base: Base, budgets: Mapping[str, int]) -> Arm:
    """One cell that times LoRA, both adapters and prefixes of these budgets beside the base."""
    variants: dict[str, Any] = {f"lora {LARGE}": dict(REFERENCE)}
    for method, size in (*SHORT, ("pfeiffer", LARGE)) if ground.quick else LONG:
        arm = _sized(base, method, size, budgets[size])
        variants[arm.name] = dict(arm.fields)
    options = {
        "measure": MEASURE_PASSES,
        "variants": variants,
        "seconds": SECONDS[ground.quick],
        "trials": TRIALS[ground.quick],
    }
    return Arm(name=LATENCY, options=options, tuned=False, plain=True)


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The source's table, how to choose, and which published orders hold here."""
    measured = Measured.of(records)
    if not measured.trained:
        nothing = Text("No method has been trained yet.", "還沒有任何方法的訓練結果。")
        labels = (*(Text(name, name) for name in SOURCE), CHOICE)
        times = measured.latencies
        return Answer(
            sentence=nothing,
            blanks=[(label, nothing) for label in labels],
            tables=latencies.table(times, compared.papers(times)),
            findings=latencies.findings(times),
        )
    metric = metric_of(records, ground)
    ranking = _ranking(measured, metric)
    chosen = ranking.recommended
    return Answer(
        sentence=_sentence(measured, ranking, metric),
        ranking=ranking,
        findings=_findings(measured, ranking, metric),
        blanks=[*compared.source_rows(measured, metric), (CHOICE, compared.how_to_choose(measured, ranking, metric))],
        tables=[
            compared.table(measured, metric),
            *latencies.table(measured.latencies, compared.papers(measured.latencies)),
            compared.expected(measured, ranking, metric),
            scores_table(by_arm(records), metric),
        ],
        figures=[_figure(measured.trained, metric), *latencies.figure(measured.latencies)],
        method=Text(
            "Budgets are what LoRA on every linear layer trains with rank 8 and with rank 2, heads "
            "not counted; widths and prefix lengths are solved for. Latency: base and variants are "
            "timed within every trial in a drawn order, with drawn tokens and no padding; a language model makes its "
            "last logits alone. Intervals of a median are order statistics over trials. Merged LoRA "
            "is the plain model with the update in its weights. Adapter H stands after attention "
            "and after the feed-forward network (houlsby), Adapter L once a block (pfeiffer).",
            "參數預算是 LoRA（所有線性層）在 rank 8 與 rank 2 的訓練參數量，不含分類頭；"
            "Adapter 寬度與 prefix 長度由預算解出。延遲：每一輪都測量基礎模型與各組，順序隨機，"
            "輸入為隨機 token、無 padding；語言模型只計算最後一個位置的 logits。"
            "中位數的信賴區間由各輪的順序統計量得出。合併後的 LoRA 是更新量已加進權重的普通模型。"
            "Adapter H 在 attention 與 FFN 之後各一個（houlsby），Adapter L 每個 block 一個（pfeiffer）。",
        ),
        caution=compared.caution(measured),
        advice={k: v for k, v in measured.trained[chosen][0].arm.fields.items() if k != "learning_rate"}
        if chosen
        else {},
        next=_next(ranking),
    )


def _ranking(measured: Measured, metric: Metric) -> Ranking:
    """All methods; of those that are good enough, the one that slows a single short answer least."""
    times = measured.latencies
    cost = {name: times.least(name) for name in measured.trained} if times.times else None
    return ranked(measured.trained, metric, {BASE: measured.base}, cost=cost)


def _sentence(measured: Measured, ranking: Ranking, metric: Metric) -> Text:
    family, parts = measured.of_budget(LARGE), []
    if len(family) > 1:
        size = compared.parameters_of(family)
        parts.append(
            Text(f"At equal budget (about {size} parameters)", f"參數預算相同（約 {size} 個）時，")
            + describe_ranking(among(ranking, family), family, metric)
        )
    if (times := compared.latency_sentence(measured)).en:
        parts.append(times)
    whole = parts[0] if parts else None
    for part in [*parts[1:], recommendation(ranking, measured.trained, metric)]:
        whole = part if whole is None else whole + part
    assert whole is not None
    return whole


def _findings(measured: Measured, ranking: Ranking, metric: Metric) -> list[Finding]:
    """Every method against the base, those of a budget against each other, and latencies."""
    floor = [claim(ranking.contrast(n, BASE), metric) for n in measured.trained] if measured.base else []
    families = [measured.of_budget(size) for size in (LARGE, SMALL)]
    pairs = [f for family in families if len(family) > 1 for f in claims(ranking, metric, list(family))]
    return [*floor, *pairs, *latencies.findings(measured.latencies)]


def _figure(trained: Mapping[str, Sequence[Record]], metric: Metric) -> Any:
    rows = []
    for name, own in trained.items():
        found = own_interval(own)
        rows.append({"arm": name, "value": found.mean, "low": found.low, "high": found.high})
    return figures.old(
        "intervals",
        "methods",
        Text("Score of every method", "各方法的分數"),
        rows,
        x=Text("method", "方法"),
        y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
        percent=metric.rises,
    )


def _next(found: Ranking) -> Text:
    first = leader(found)
    if rivals := open_rivals(found):
        return Text(
            f"Add seeds to {first} and {rivals[0]}, which are not decided.",
            f"替 {first} 與 {rivals[0]} 增加隨機種子，目前尚無定論。",
        )
    return Text(
        f"Repeat with the budget of rank 2, to see whether {first} stays first.",
        f"改用 rank 2 的參數預算重做，看 {first} 是否仍居首位。",
    )
