"""Q5: is alpha / r needed? Scalings x ranks x learning rates: what diverges, how fast, how well."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loralab.adapters.methods import SCALINGS, LoRA
from loralab.models.load import Base
from loralab.studies.compare import Comparison, compare_arms
from loralab.studies.evidence import Metric, mean_of, means_of, score_column
from loralab.studies.message import Chart, Message, Table, chart, clauses, names, points, sentences, table
from loralab.studies.rates import rounded
from loralab.studies.readings.sweep import Key, Sweep, diverged
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.training.optim import usual_rate

RANKS, QUICK_RANKS = (4, 16, 64), (4, 64)
# times LoRA's usual rate: wide enough for the best one to move
FACTORS, QUICK_FACTORS = (10**-0.5, 1.0, 10**0.5, 10.0, 10**1.5), (1.0, 5.0, 25.0)
USUAL = "alpha/r"
Claims = Mapping[Key, Finding]


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return every scaling at every rank and learning rate, alpha fixed at 16.

    `--values` takes ranks, scalings or both; with a fixed rate there is that one alone.
    """
    scalings = [value for value in dict.fromkeys(setup.values) if value in SCALINGS]
    ranks = setup.ranks(QUICK_RANKS if setup.quick else RANKS, other=SCALINGS)
    return [
        Arm(
            name=f"{scaling}, r={rank}, {rate:.1e}",
            tuned=False,
            fields={"method": "lora", "rank": rank, "scaling": scaling, "learning_rate": rate},
        )
        for scaling in scalings or SCALINGS
        for rank in ranks
        for rate in _rates(setup)
    ]


def _rates(setup: StudySetup) -> list[float]:
    usual = usual_rate(LoRA())
    if setup.fixed_lr:
        return [float(setup.fields.get("learning_rate", usual))]
    return [rounded(usual * factor) for factor in (QUICK_FACTORS if setup.quick else FACTORS)]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return stability, speed and final score of each scaling, and how its best rate moves with rank."""
    sweep = Sweep.of(records)
    found = _at_best_rates(sweep, setup)
    if found is None:
        _, runs = diverged(list(sweep.cells.values()))
        return Answer(sentence=Message("scaling.all_diverged", runs=runs)) if runs else nothing_measured(setup)
    claims = _claims(sweep, found)
    sentence = sentences(_conclusion(sweep, claims), _drifts(sweep))
    return found.answer(
        sentence=sentence,
        findings=[*claims.values(), *_one_rate(sweep)],
        blanks=[*_blanks(sweep, found.metric), (Message("page.findings"), sentence)],
        tables=[_table(sweep, found.metric)],
        figures=_charts(sweep),
        method=Message("scaling.method_at", target=sweep.target),
        advice=_advice(sweep, claims),
    )


def _at_best_rates(sweep: Sweep, setup: StudySetup) -> Comparison | None:
    """Compare every scaling and rank, each at its own best rate; the usual scaling first among equals."""
    order = sorted(sweep.measured, key=lambda cell: (cell.rank, cell.scaling != USUAL))
    cost = {cell.arm: float(place) for place, cell in enumerate(order)}
    return compare_arms([run for cell in sweep.measured for run in cell.at_best], setup, cost=cost)


def _claims(sweep: Sweep, found: Comparison) -> dict[Key, Finding]:
    """Compare every scaling with alpha / r at each rank, each at its own best rate, as one family."""
    usual = {cell.rank: cell.arm for cell in sweep.measured if cell.scaling == USUAL}
    return {
        (cell.scaling, cell.rank): found.claim(cell.arm, usual[cell.rank])
        for cell in sweep.measured
        if cell.scaling != USUAL and cell.rank in usual
    }


def _one_rate(sweep: Sweep) -> list[Finding]:
    """Say of each scaling whether one learning rate serves every rank."""
    findings = []
    for scaling in sweep.scalings:
        if sweep.drift(scaling) is None or not sweep.of_all_ranks(scaling):
            continue
        verdict, rates = sweep.serving(scaling)
        listed = {"rates": _listed(rates)} if rates else {}
        sentence = Message(f"scaling.one_rate_{verdict}", scaling=scaling, **listed, **_span(sweep))
        findings.append(Finding(sentence=sentence, holds=verdict == "worse", verdict=verdict))
    return findings


def _span(sweep: Sweep) -> dict[str, int]:
    return {"smallest": sweep.ranks[0], "largest": sweep.ranks[-1]}


def _listed(rates: Iterable[float]) -> Message:
    return names(Message("score.rate", value=rate) for rate in rates)


def _conclusion(sweep: Sweep, claims: Claims) -> Message:
    """Tell whether the score depends on the scaling, each at its best rate."""
    if not claims:
        return Message("scaling.no_usual")
    verdicts = [claim.verdict for claim in claims.values()]
    clear = [claim for claim in claims.values() if claim.holds]
    if not clear and not sweep.has_learnt:
        start, low = sweep.fall
        return Message("scaling.too_short", start=start, low=low)
    at = Message("scaling.at_one", rate=sweep.rates[0]) if len(sweep.rates) == 1 else Message("scaling.at_best")
    counts = {"at": at, "count": len(claims), **{v: verdicts.count(v) for v in ("equivalent", "undecided")}}
    if not clear:
        key = "scaling.open" if "undecided" in verdicts else "scaling.equivalent"
        return Message(key, **counts, **_span(sweep))
    strongest = max(clear, key=lambda claim: abs(claim.effect or 0))
    return sentences(Message("scaling.depends", clear=len(clear), **counts), strongest.sentence)


def _drifts(sweep: Sweep) -> Message | None:
    """Say how far the best rate moves from the smallest to the largest rank."""
    drifts = {scaling: drift for scaling in sweep.scalings if (drift := sweep.drift(scaling)) is not None}
    if not drifts:
        return None
    parts = [Message("scaling.drift", scaling=scaling, factor=drift) for scaling, drift in drifts.items()]
    edges = [s for s in drifts if any(sweep.at_edge(cell) for cell in sweep.scalings[s])]
    key = "scaling.drifts_to_edge" if edges else "scaling.drifts"
    return Message(key, parts=parts, **({"edges": edges} if edges else {}), **_span(sweep))


def _blanks(sweep: Sweep, metric: Metric) -> list[tuple[Message, Message]]:
    """Fill in stability, speed and final score as counted: no intervals, so nothing is claimed."""
    stable, fast, scores = [], [], []
    for scaling, cells in sweep.scalings.items():
        lost, runs = diverged(cells)
        worst = max((cell.losses[rate] for cell in cells for rate in cell.ended), default=math.nan)
        stable.append(Message("scaling.diverged", scaling=scaling, lost=lost, runs=runs, worst=worst))
    for cell in sweep.measured:
        arm, steps, score = str(cell), cell.steps_to(sweep.target), metric.value(mean_of(cell.at_best, "score"))
        fast.append(Message("scaling.never" if steps is None else "scaling.steps", arm=arm, steps=steps))
        scores.append(Message("scaling.score_at", arm=arm, score=score, rate=cell.best))
    return [
        (Message("scaling.stability_label"), clauses(stable)),
        (Message("scaling.speed_label"), Message("scaling.speed", target=sweep.target, parts=fast)),
        (Message("scaling.final_label"), Message("scaling.final", metric=metric.text, parts=scores)),
    ]


def _advice(sweep: Sweep, claims: Claims) -> dict[str, Any]:
    """Return a scaling that is better somewhere and worse nowhere; else the usual one.

    With the rate that serves all its ranks; where none does, the rank and the rate of its best run.
    """
    # at one rate for all, none has its best
    if not claims or len(sweep.rates) == 1 or not sweep.has_learnt:
        return {}
    verdicts = {scaling: {c.verdict for key, c in claims.items() if key[0] == scaling} for scaling in sweep.scalings}
    winners = [scaling for scaling, own in verdicts.items() if "better" in own and "worse" not in own]
    chosen = next(iter(winners), USUAL)
    if (rate := sweep.common(chosen)) is not None:
        return {"scaling": chosen, "learning_rate": rate}
    cells = [cell for cell in sweep.measured if cell.scaling == chosen]
    best = min(cells, key=lambda cell: mean_of(cell.at_best, "validation_loss"))
    return {"scaling": chosen, "rank": best.rank, "learning_rate": best.best}


def _table(sweep: Sweep, metric: Metric) -> Table:
    """Return a row for each scaling and rank; where every rate diverged, it lacks what only a run to the end has."""
    rates, rows = ("best_rate", "rates_as_good", "diverged_rates", "steps_to_target:.0f"), []
    scores = ("validation_loss:plain", score_column(metric), "step_seconds:seconds")
    for cell in sweep.cells.values():
        factor, lost = LoRA(rank=cell.rank, scaling=cell.scaling).factor, [r for r in cell.runs if r not in cell.ended]
        row: dict[str, Any] = {"scaling": cell.scaling, "rank": cell.rank, "factor": factor}
        row["diverged_rates"] = _listed(lost) if lost else None
        if runs := cell.at_best:
            row |= means_of(runs, ("validation_loss", "step_seconds")) | {"score": metric.scored(runs)}
            row["best_rate"] = Message("score.rate_edge" if sweep.at_edge(cell) else "score.rate", value=cell.best)
            as_good = [rate for rate, verdict in cell.verdicts.items() if verdict != "better"]
            row |= {"rates_as_good": _listed(sorted(as_good)), "steps_to_target": cell.steps_to(sweep.target)}
        rows.append(row)
    return table("scaling.table", rows, "scaling", "rank", "factor:short", *rates, *scores)


def _charts(sweep: Sweep) -> list[Chart]:
    """Return final losses (a run that diverged has none), where the best rates lie, and the curves at these."""
    losses = points({str(cell): cell.losses for cell in sweep.cells.values()})
    values = [None if math.isnan(point["y"]) else point["y"] for point in losses]
    cells = [{"x": f"{p['x']:.1e}", "y": p["arm"], "value": y} for p, y in zip(losses, values, strict=True)]
    lines = [point for point in losses if not math.isnan(point["y"])]
    steps = points({str(cell): cell.curve for cell in sweep.measured})
    rate, loss, arm = "column.rate", "column.validation_loss", "axis.scaling_and_rank"
    shape = {"digits": ".3f", "height": max(160, 34 * len(sweep.cells))}
    along = ("axis.step", "axis.smoothed_loss", arm)
    return [
        chart("heat", "scaling-losses", "scaling.losses_chart", cells, rate, arm, loss, **shape),
        chart("lines", "scaling-rates", "scaling.rates_chart", lines, rate, loss, arm, log_x=True),
        chart("lines", "scaling-curves", "scaling.curves_chart", steps, *along, chance=sweep.target),
    ]
