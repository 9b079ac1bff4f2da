"""Q10: LoRA, adapters or prefix-tuning? At equal budgets, with latency as in LoRA's Table 1."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

from loralab.adapters.registry import is_outside, specs
from loralab.errors import InputError
from loralab.models.device import device_here
from loralab.models.load import Base
from loralab.studies.budgets import Fields, solved, trained_parameters
from loralab.studies.compare import Comparison, compare_arms
from loralab.studies.evidence import best_arm, mean_of, parameters, score_column
from loralab.studies.measures.passes import MEASURE_PASSES, MERGED
from loralab.studies.measures.tradeoff import MEASURE_TRADEOFF
from loralab.studies.message import Message, Table, numbered, sentences, table
from loralab.studies.ranking import FLOOR, Arms
from loralab.studies.rates import usual
from loralab.studies.readings.forgetting import Tradeoffs, published_claims
from loralab.studies.readings.latencies import Latencies, added, in_short, pass_chart, pass_findings, pass_table
from loralab.studies.readings.published import published_table
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.timing import MARGIN
from loralab.studies.trained import BASE_ARM, LEFT_OUT
from loralab.training.memory import available_bytes

REFERENCE = {"method": "lora", "rank": 8}
LARGE, SMALL = "r=8", "r=2"
BUDGETS = {LARGE: 8, SMALL: 2}  # what LoRA trains with these ranks
LETTERS = {"rank": "r", "width": "w", "tokens": "p"}
SIZES = dict.fromkeys(("lora", "dora"), "rank") | dict.fromkeys(("houlsby", "pfeiffer"), "width")
SIZES |= dict.fromkeys(("prefix", "prefix-mlp"), "tokens")
SIZELESS = ("ia3", "bitfit", "full", "linear-probe")
SHORT = (("houlsby", LARGE), ("prefix", LARGE), ("prefix", SMALL))
LONG = (*((method, size) for method in ("houlsby", "pfeiffer", "prefix") for size in (LARGE, SMALL)), ("dora", LARGE))
LATENCY, TRADEOFF, FULL = "latency", "learning and forgetting", "full"
SHORT_RUN = 10**0.5  # times the usual rate, on the way to learning against forgetting
STATE, ROOM = 16, 0.8  # bytes of a weight, its gradient and moments; share of the free memory that they may take
SECONDS, TRIALS = (150, 20), (25, 12)  # of the latency trial: thorough, quick
FAMILIES = {"lora": "LoRA", "houlsby": "Adapter", "pfeiffer": "Adapter", "prefix": "Prefix-tuning"}
SOURCE = tuple(dict.fromkeys(FAMILIES.values()))  # the rows of the source's table
CHOICE = Message("methods.choice")


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return LoRA with rank 8, the others with as many parameters; the base; latencies, all in one trial.

    A method that the model cannot have stays in where it is one of many sizes, or was asked for: that it
    cannot run is said, and so is that full fine-tuning does not fit.
    """
    wanted = _wanted(setup)
    budgets = {name: trained_parameters(base, {**REFERENCE, "rank": rank}) for name, rank in BUDGETS.items()}
    ranks = BUDGETS if not setup.quick and "lora" in wanted else {LARGE: 8}
    found = [Arm(name=f"lora {name}", fields={**REFERENCE, "rank": rank}) for name, rank in ranks.items()]
    pairs = SHORT if setup.quick and not setup.values else LONG
    found += [_sized(base, method, size, budgets[size]) for method, size in pairs if method in wanted]
    if not setup.quick and "prefix-mlp" in wanted:
        prefixes = [arm for arm in found if "tokens" in arm.fields]  # as long as those trained directly
        found += [
            replace(arm, name=f"prefix-mlp p={arm.fields['tokens']}", fields={**arm.fields, "method": "prefix-mlp"})
            for arm in prefixes
        ]
    others = (method for method in wanted if method not in SIZES)
    found += [arm for method in others for arm in _sizeless(base, method, asked=bool(setup.values))]
    unique = {arm.name: arm for arm in found}
    on_the_way = [_tradeoff(setup)] if FULL in unique and unique[FULL].tuned else []
    return [BASE_ARM, *unique.values(), *on_the_way, _latency(setup, base, budgets)]


def _wanted(setup: StudySetup) -> list[str]:
    """Return the methods to compare with LoRA, those of other packages too."""
    known = (*SIZES, *SIZELESS, *(name for name, spec in specs().items() if is_outside(spec)))
    return setup.chosen(known, (*(method for method, _ in SHORT), FULL) if setup.quick else known)


def _sized(base: Base, method: str, budget: str, parameters: int) -> Arm:
    """Return a method of the size that comes nearest to a budget."""
    fields: Fields = {"method": method}
    size, name = SIZES[method], f"{method} ({budget})"
    with suppress(InputError):  # preparing the study meets it again, and tells
        fields = solved(base, fields, size, parameters).fields
        name = f"{method} {LETTERS[size]}={fields[size]}"
    return Arm(name=name, fields=fields, options={"budget": budget})


def _sizeless(base: Base, method: str, *, asked: bool) -> list[Arm]:
    """Return a method that has no size; none where the model cannot have it, and nobody asked for it.

    Full fine-tuning that does not fit into memory is left out by name.
    """
    fields: Fields = {"method": method}
    try:
        needed = STATE * trained_parameters(base, fields)
    except InputError:
        return [Arm(name=method, fields=fields)] if asked else []
    if method != FULL or needed < ROOM * available_bytes(device_here()):
        return [Arm(name=method, fields=fields)]
    reason = f"its weights, gradients and moments take {needed / 1e9:.3g} GB, and less than that is free"
    return [Arm(name=method, fields=fields, options={"measure": LEFT_OUT, "reason": reason}, tuned=False)]


def _tradeoff(setup: StudySetup) -> Arm:
    """Return one trial that trains LoRA and every weight, and looks at both on their way."""
    arms: dict[str, dict[str, Any]] = {f"lora {LARGE}": dict(REFERENCE), FULL: {"method": FULL}}
    for fields in arms.values() if "learning_rate" not in setup.fields else ():
        fields["learning_rate"] = SHORT_RUN * usual(setup, Arm(name="", fields=fields))
    return Arm(name=TRADEOFF, options={"measure": MEASURE_TRADEOFF, "arms": arms}, tuned=False)


def _latency(setup: StudySetup, base: Base, budgets: Mapping[str, int]) -> Arm:
    """Return one trial that times LoRA, both adapters and prefixes of these budgets beside the base."""
    pairs = (*SHORT, ("pfeiffer", LARGE)) if setup.quick else LONG
    sized = (_sized(base, method, size, budgets[size]) for method, size in pairs)
    variants: dict[str, Any] = {f"lora {LARGE}": dict(REFERENCE)} | {arm.name: dict(arm.fields) for arm in sized}
    options: dict[str, Any] = {"measure": MEASURE_PASSES, "variants": variants}
    options |= {"seconds": SECONDS[setup.quick], "trials": TRIALS[setup.quick]}
    return Arm(name=LATENCY, options=options, tuned=False, plain=True)


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the source's table, how to choose, and which published orders hold here."""
    times = Latencies.of(records)
    passes = pass_table(times)
    cost = {r.arm.name: times.least(r.arm.name) for r in records if r.arm.name != FLOOR} if times.times else None
    found = compare_arms(records, setup, cost=cost)  # of those that are good enough, the quickest for a short answer
    if found is None:
        return nothing_measured(setup, (*SOURCE, CHOICE), tables=[passes], findings=pass_findings(times))
    refused = Message("methods.not_timed", variants=list(times.refused)) if times.refused else None
    claimed, on_forgetting = published_claims(records, found, _lora(found), FULL)
    published = published_table(found, times, _lora(found), _of_budget(found, LARGE), claimed)
    pairs = (found.claims(_of_budget(found, budget)) for budget in BUDGETS)
    return found.answer(
        sentence=sentences(_at_budget(found), added(times), found.recommendation),
        findings=[*found.over_base(list(found.arms)), *chain(*pairs), *pass_findings(times), *on_forgetting],
        blanks=[*_source_rows(found, times), (CHOICE, _how_to_choose(found, times, on_forgetting))],
        tables=[_source_table(found, times), passes, published, found.scores],
        figures=[found.chart("methods", "column.method"), Tradeoffs.of(records).chart, pass_chart(times)],
        caution=sentences(Message("methods.caution"), refused),
        next=found.next_step("methods.smaller_budget"),
    )


def _of_budget(found: Comparison, budget: str) -> Arms:
    """Return the arms of one budget; LoRA's ranks are the budgets themselves."""
    lora = {"method": "lora", "rank": BUDGETS[budget]}.items()
    own = {name: runs[0].arm for name, runs in found.arms.items()}
    names = [name for name, arm in own.items() if arm.options.get("budget") == budget or lora <= arm.fields.items()]
    return {name: found.arms[name] for name in names}


def _in_families(found: Comparison) -> dict[str, list[str]]:
    """Return the arms of each row of the source's table, those of the larger budget first."""
    rows: dict[str, list[str]] = {family: [] for family in SOURCE}
    for name in sorted(found.arms, key=lambda name: -parameters(found.arms[name])):
        method = str(found.arms[name][0].arm.fields.get("method")).removesuffix("-mlp")
        if method in FAMILIES:
            rows[FAMILIES[method]].append(name)
    return rows


def _at_budget(found: Comparison) -> Message | None:
    """Say who leads the larger budget, which is what LoRA trains in it."""
    family = _of_budget(found, LARGE)
    if (order := found.order(family)) is None:
        return None
    reference = family[_lora(found) or next(iter(family))]
    return Message("ranking.at_budget", parameters=parameters(reference), ranking=order)


def _lora(found: Comparison) -> str | None:
    """Return LoRA's arm of the larger budget."""
    return next((name for name, own in _of_budget(found, LARGE).items() if own[0].arm.fields["method"] == "lora"), None)


def _source_table(found: Comparison, times: Latencies) -> Table:
    """Return the source's table, its rows first; every arm of a method is a line."""
    known = {name: family for family, members in _in_families(found).items() for name in members}
    labels: dict[str, Any] = {n: Message("methods.family", family=family, arm=n) for n, family in known.items()}
    labels |= {name: name for name in found.arms if name not in labels}
    rows = [{**found.facts(n), "method": label, "latency": in_short(times, n)} for n, label in labels.items()]
    shown = ("method", "adapter_parameters:count", "latency", "step_seconds:seconds:column.training_step")
    return table("table.methods", rows, *shown, score_column(found.metric))


def _source_rows(found: Comparison, times: Latencies) -> list[tuple[Message | str, Message]]:
    """Fill in the source's three rows, each of the arm with the best mean score of its method."""
    rows: list[tuple[Message | str, Message]] = []
    for family, members in _in_families(found).items():
        row = NOT_MEASURED
        if members:
            name = best_arm({member: found.arms[member] for member in members}, found.metric)
            row = Message("methods.row", **found.facts(name), latency=in_short(times, name))
        rows.append((family, row))
    return rows


def _how_to_choose(found: Comparison, times: Latencies, on_forgetting: Sequence[Finding]) -> Message:
    """Fill in the source's last blank: score, then latency, what training costs, and what is forgotten."""
    by_score, by_latency, forgotten = _at_budget(found), added(times), [finding.sentence for finding in on_forgetting]
    criteria = [
        by_score and Message("methods.by_score", ranking=by_score),
        by_latency and Message("methods.by_latency", latencies=sentences(by_latency, _merging(times))),
        _by_speed(found.arms),
        Message("methods.by_forgetting", claims=forgotten) if forgotten else None,
    ]
    return sentences(numbered(criteria), found.recommendation)


def _merging(times: Latencies) -> Message | None:
    """Say which variants can be merged, and which cannot."""
    able = [variant for variant, state in times.beside_base() if state == MERGED]
    others = [variant for variant, _ in times.beside_base() if variant not in able]
    return Message("methods.merging", able=able, others=others) if able and others else None


def _by_speed(trained: Arms) -> Message:
    """Say which method trains fastest; times within the margin of each other are called alike."""
    steps = sorted((mean_of(runs, "step_seconds"), name) for name, runs in trained.items())
    (least, fastest), (most, slowest) = steps[0], steps[-1]
    if most <= (1 + MARGIN) * least:
        return Message("methods.speed_alike", margin=MARGIN)
    return Message("methods.speed", fastest=fastest, least=least, slowest=slowest, most=most)
