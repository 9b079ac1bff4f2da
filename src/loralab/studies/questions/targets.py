"""Q4: which layers? Every choice at equal rank, and at equal numbers of trained parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.budgets import largest_rank, solved, trained_parameters
from loralab.studies.compare import Comparison, compare_arms, score_chart
from loralab.studies.evidence import by_key, parameters, score_column
from loralab.studies.measures.updates import MEASURE_UPDATES, REFERENCE, layers_table, source_names, update_chart
from loralab.studies.message import Message, Table, sentences, table
from loralab.studies.places import ALL, CHOICES, able_choices, advised, arm_of, singles
from loralab.studies.ranking import FLOOR, Arms
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.trained import BASE_ARM

RANK = 8
UPDATES = "updates"
BUDGET_TOLERANCE = 0.1  # share of the budget by which an arm may miss it
SMALLEST, VALUE, CEILING = (Message(f"targets.{name}") for name in ("smallest", "value", "ceiling"))


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return each choice with rank 8, and with the rank that trains as much as all-linear does with 8.

    Where a choice cannot hold that many, the budget is what the smallest of them can.
    """
    chosen = _chosen(setup, base)
    equal_rank = [arm_of(name, RANK, targets) for name, targets in chosen.items()]
    equal_size = _at_budget(base, chosen, {} if setup.quick or setup.values else singles(base.model))
    distinct = {arm.name: arm for arm in (*equal_rank, *equal_size)}
    updates = Arm(name=UPDATES, options={"measure": MEASURE_UPDATES}, tuned=False, plain=True)
    return [BASE_ARM, *distinct.values(), updates]


def _chosen(setup: StudySetup, base: Base) -> dict[str, Any]:
    """Return the choices to compare; all-linear is always one, and the last."""
    able = able_choices(setup, base)
    if ALL not in able:
        raise ConfigError(f"{base.name} has no linear layers outside its head", code="no_linear_layers", field="model")
    return {name: able[name] for name in able if name in (*(setup.values or able), ALL)}


def _at_budget(base: Base, chosen: Mapping[str, Any], more: Mapping[str, Any]) -> list[Arm]:
    """Return every choice with the rank that comes nearest to a budget all of `chosen` can hold.

    Of `more`, those that can hold it too.
    """
    targets = {**chosen, **more}
    fields = {name: arm_of(name, RANK, own).fields for name, own in targets.items()}
    largest = {name: {**each, "rank": largest_rank(base, each)} for name, each in fields.items()}
    capacity = {name: trained_parameters(base, each) for name, each in largest.items()}
    budget = min(trained_parameters(base, REFERENCE), *(capacity[name] for name in chosen))
    sized = {name: solved(base, fields[name], "rank", budget) for name in fields if capacity[name] >= budget}
    return [
        arm_of(name, solution.size, targets[name])
        for name, solution in sized.items()
        if abs(solution.parameters - budget) <= BUDGET_TOLERANCE * budget
    ]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return who stands first at equal budget and at equal rank, and the three blanks."""
    found = compare_arms(records, setup)
    if found is None:
        return nothing_measured(setup, (SMALLEST, VALUE, CEILING))
    by_rank, by_size = families(records, found.arms)
    tables = {name: rows for r in records if r.arm.name == UPDATES for name, rows in r.tables.items()}
    chart = score_chart("targets", {**by_size, **found.arms}, found.metric, "axis.layers_and_rank")
    size, rank = found.order(by_size), found.order(by_rank)
    return found.answer(
        sentence=sentences(
            size and Message("ranking.at_budget", parameters=_budget(by_size), ranking=size),
            rank and Message("targets.at_rank", rank=RANK, ranking=rank),
            found.recommendation,
        ),
        findings=_findings(found, by_rank, by_size),
        blanks=_blanks(found),
        tables=[layers_table(tables), _size_table(found, by_size), found.scores],
        figures=[chart, update_chart(tables)],
        method=sentences(Message("targets.method"), *source_names(tables)),
        caution=sentences(Message("targets.caution"), _not_at_budget(found.arms, by_size)),
        advice=advised(found.advice),
        next=found.next_step("targets.other_ranks"),
    )


def families(records: Sequence[Record], trained: Arms) -> tuple[Arms, Arms]:
    """Return the arms of equal rank, and those of equal size.

    A choice whose solved rank is 8 itself is one arm in both families. Every arm counts that was
    planned, failed ones too: who is missing must not move another one into a family.
    """
    planned = {record.arm.name for record in records} - {FLOOR, UPDATES}
    alone = {choice for choice, names in by_key(planned, choice_of).items() if len(names) == 1}
    by_rank = {n: own for n, own in trained.items() if rank_of(n) == RANK and choice_of(n) in CHOICES}
    by_size = {n: own for n, own in trained.items() if rank_of(n) != RANK or choice_of(n) in alone}
    return by_rank, by_size


def choice_of(name: str) -> str:
    """Return the choice of an arm, such as "q+v"."""
    return name.rpartition(" r=")[0]


def rank_of(name: str) -> int:
    """Return the rank of an arm."""
    return int(name.rpartition(" r=")[2])


def _budget(by_size: Arms) -> float:
    reference = next((name for name in by_size if choice_of(name) == ALL), next(iter(by_size)))
    return parameters(by_size[reference])


def _findings(found: Comparison, by_rank: Arms, by_size: Arms) -> list[Finding]:
    """Compare the reference with the base, and both families pair by pair."""
    top = f"{ALL} r={RANK}"
    floor = found.over_base([top] if top in found.arms else [])
    pairs = [each for family in (by_size, by_rank) for each in found.claims(family)]
    return [*floor, *{each.sentence: each for each in pairs}.values()]


def _blanks(found: Comparison) -> list[tuple[Message, Message]]:
    """Fill in the smallest that learns, the recommended one, and the best mean."""
    ranking, none = found.ranking, Message("targets.none_learns")
    able = [n for n in ranking.names if FLOOR not in ranking.means or ranking.contrast(n, FLOOR).verdict == "better"]
    described = {name: Message("targets.described", **found.facts(name)) for name in ranking.names}
    ceiling = described[ranking.leader]
    if rivals := ranking.open_rivals:
        ceiling = Message("targets.ceiling_open", best=ceiling, rivals=rivals)
    return [
        (SMALLEST, described[able[0]] if able else none),
        (VALUE, described[ranking.recommended] if ranking.recommended else none),
        (CEILING, ceiling),
    ]


def _size_table(found: Comparison, by_size: Arms) -> Table:
    """Return which arm belongs to which family, and by how much it misses the budget."""
    rows = []
    for name, runs in found.arms.items():
        off = parameters(runs) / _budget(by_size) - 1 if name in by_size else None
        rows.append({**found.facts(name), "layers": choice_of(name), "rank": rank_of(name), "off_budget": off})
    size = ("layers", "rank", "adapter_parameters:count", "off_budget:signed percent")
    return table("table.layers_and_budget", rows, *size, score_column(found.metric), "step_seconds:seconds")


def _not_at_budget(trained: Arms, by_size: Arms) -> Message | None:
    """Say which choices have no arm at the equal budget."""
    missing = {choice_of(name) for name in trained} - {choice_of(name) for name in by_size}
    return Message("targets.not_at_budget", choices=sorted(missing)) if missing else None
