"""Q3: why B = 0? Starts of A and B: the model before the first step, the first steps, the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.adapters.methods import INITS
from loralab.models.load import Base
from loralab.studies.compare import Comparison, compare_arms
from loralab.studies.evidence import claim, means_of
from loralab.studies.measures.step_zero import MEASURE_START
from loralab.studies.message import Message, Table, sentences, table
from loralab.studies.ranking import FLOOR
from loralab.studies.readings.starts import LOSS, MOVED, Start, charts_of, first_losses, starts_of
from loralab.studies.study import DIVERGED, NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured

MEASURE = MEASURE_START
ZERO, KAIMING, PISSA = "B = 0", "B Kaiming", "PiSSA"
NAMES = {
    "kaiming": ZERO,
    "zero_a": "A = 0",
    "b_kaiming": KAIMING,
    "gaussian": "A Gaussian",
    "pissa": PISSA,
    "orthogonal": "A orthogonal",
}
USUAL = ("b_kaiming", "gaussian", "pissa")  # beside the reference
# a start away from the base model, and an A that is several times larger, bear smaller steps only:
# the two rates that quick studies try, as multiples of the usual one, would be unfair to them
LOWER = (0.6, 2.0)
LABELS = tuple(Message(f"init.ask_{name}") for name in ("zero", "kaiming", "influence", "why", "knowledge"))


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the usual start, and others at the same rank; `--values` names starts of `--init`."""
    lora, lower = {"method": "lora", "rank": 8}, ("b_kaiming", "gaussian") if setup.quick else ()
    others = (init for init in setup.chosen(INITS, USUAL) if init != "kaiming")
    rates: dict[str, dict[str, Any]] = {init: {"rates": LOWER} for init in lower}
    return [
        Arm(name=ZERO, fields=lora),
        *(Arm(name=NAMES[init], fields={**lora, "init": init}, options=rates.get(init, {})) for init in others),
    ]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return what each start does to the model at step 0, to the first steps, and to the final score."""
    starts = starts_of(records)
    if not starts:
        return nothing_measured(setup, LABELS)
    found = compare_arms(records, setup, aside=())
    finals = {n: found.claim(n, ZERO) for n in found.arms if n != ZERO} if found and ZERO in found.arms else {}
    final = finals.get(KAIMING)
    experiments = [_experiment(name, starts, found) for name in (ZERO, KAIMING)]
    blanks = [*experiments, _influence(starts, final), _why(starts, final), _knowledge(starts)]
    parts: dict[str, Any] = {
        "sentence": _sentence(starts, final),
        "findings": [*_damage(starts), *finals.values()],
        "blanks": list(zip(LABELS, blanks, strict=True)),
        "figures": charts_of(starts),
    }
    table = _start_table(starts)
    if found is None:
        return Answer(**parts, tables=[table])
    # the usual start stands first among equals
    taken = [init for init, name in NAMES.items() if finals and name == found.ranking.recommended]
    return found.answer(**parts, tables=[table, found.scores], advice={"init": taken[0]} if taken else {})


def _damage(starts: Mapping[str, Start]) -> list[Finding]:
    """Compare every start that is not the base model with it."""
    found = {name: start.loss_gained(len(starts)) for name, start in starts.items()}
    names = {name: (Message("init.at_step_0", start=name), FLOOR) for name in starts}
    return [claim(change, LOSS, names[name]) for name, change in found.items() if change is not None]


def _off(start: Start) -> Message:
    """Say how far the logits before training are from the base model's."""
    if all(run.numbers["start_equal"] for run in start.runs):  # bit for bit
        return Message("init.equal")
    if start.is_base:
        return Message("init.rounding", share=start.mean("start_logits"))
    return Message("init.off", logits=start.mean("start_logits"), hidden=start.mean("start_features"))


def _sentence(starts: Mapping[str, Start], final: Finding | None) -> Message:
    """Say what B = 0 and B Kaiming do to the start, and whether that is still seen at the end."""
    pair = [name for name in starts if name in (ZERO, KAIMING)]
    if not pair:
        return Message("init.neither")
    end = None if final is None else Message(f"init.end_{final.verdict}", claim=final.sentence)
    return sentences(*(Message("init.logits", start=name, off=_off(starts[name])) for name in pair), end)


def _experiment(name: str, starts: Mapping[str, Start], found: Comparison | None) -> Message:
    if name not in starts:
        return NOT_MEASURED
    start, end = starts[name], Message("init.diverged")
    if found is not None and name in found.arms:
        end = Message("init.score", metric=found.metric.text, score=found.metric.scored(found.arms[name]))
    before, after = start.mean("base_loss"), start.mean("start_loss")
    return Message("init.experiment", off=_off(start), before=before, after=after, end=end)


def _influence(starts: Mapping[str, Start], final: Finding | None) -> Message:
    """Say what the first steps were like, and how they ended."""
    losses, parts = first_losses(starts), []
    for name in (name for name in (ZERO, KAIMING) if name in starts):
        a, b = (starts[name].gradients(part)[:1] for part in ("A", "B"))
        gradients = Message("init.gradients", a=a[0], b=b[0]) if a and b else Message("init.no_gradients")
        curve = losses.get(name, [])
        mean = float(np.mean(curve)) if curve else None
        parts.append(Message("init.first_steps", start=name, gradients=gradients, count=len(curve), loss=mean))
    if not parts:
        return NOT_MEASURED
    return sentences(*parts, None if final is None else final.sentence)


def _why(starts: Mapping[str, Start], final: Finding | None) -> Message:
    """Call the zero start only as much better as was measured."""
    if KAIMING not in starts or ZERO not in starts:
        return NOT_MEASURED
    start = Message("init.why", zero=_off(starts[ZERO]), kaiming=_off(starts[KAIMING]))
    if final is not None:
        return sentences(start, Message(f"init.why_{final.verdict}"))
    lost = any(run.status == DIVERGED for run in starts[KAIMING].runs)
    return sentences(start, Message("init.kaiming_diverged" if lost else "init.no_score"))


def _knowledge(starts: Mapping[str, Start]) -> Message:
    """Say which starts keep the base model, and whether B must be zero for that."""
    keep = [name for name, start in starts.items() if start.is_base]
    lose = [name for name in starts if name not in keep]
    none = [Message("init.none")]
    known = Message("init.keep", keep=keep or none, lose=lose or none)
    return sentences(known, Message("init.pissa") if PISSA in keep else None)


def _start_table(starts: Mapping[str, Start]) -> Table:
    """Return step 0 and the first steps of every start."""
    means = (*(f"{name}:fine percent" for name in MOVED), "start_kl:.2g", "base_loss:plain", "start_loss:plain")
    steps = ("gradient_A:short", "gradient_B:short", "first_loss:plain", "first_losses:plain")
    losses, rows = first_losses(starts), []
    for name, start in starts.items():
        row: dict[str, Any] = {"start": name, **means_of(start.runs, (*MOVED, "start_kl", "base_loss", "start_loss"))}
        row |= {f"gradient_{part}": next(iter(start.gradients(part)), None) for part in ("A", "B")}
        curve = losses.get(name)
        rows.append(row | ({"first_loss": curve[0], "first_losses": float(np.mean(curve))} if curve else {}))
    return table("table.step_zero", rows, "start", *means, *steps)
