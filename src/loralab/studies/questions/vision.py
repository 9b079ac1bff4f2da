"""Q12: LoRA on a Vision Transformer: which layers, against a linear probe and a full fine-tune."""

from collections.abc import Sequence
from dataclasses import replace

from loralab.adapters.methods import FullFineTune
from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.compare import Comparison, compare_arms, score_chart
from loralab.studies.measures.anatomy import MEASURE_ANATOMY, anatomy_table, likeness
from loralab.studies.message import Message, clauses, numbered, sentences
from loralab.studies.places import ALL, CHOICES, able_choices, advised, arm_of
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.tasks.kinds.registry import kind_named
from loralab.training.optim import usual_rate

RANK = 8
PROBE, FULL, ANATOMY = "linear-probe", "full", "anatomy"
SHORT = ("q+v", ALL)
LABELS = [Message(f"vision.ask_{name}") for name in ("architecture", "layers", "performance", "plan")]


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return a linear probe, LoRA by choice of layers, a full fine-tune; what the model is made of."""
    if not kind_named(base.kind).pictures:
        text = f"the study vision needs a vision model and pictures, {base.name} is {base.kind}"
        hint = "take --model dinov2-s --data digits, or a folder of pictures by class"
        raise ConfigError(f"{text}; {hint}", code="no_pictures", field="model")
    able, wanted = able_choices(setup, base), setup.chosen(CHOICES, SHORT if setup.quick else CHOICES)
    rate = _full_rate(setup)
    return [
        Arm(name=PROBE, fields={"method": PROBE}),
        *(arm_of(name, RANK, able[name]) for name in able if name in wanted),
        Arm(name=FULL, fields={"method": FULL} if rate is None else {"method": FULL, "learning_rate": rate}),
        Arm(name=ANATOMY, options={"measure": MEASURE_ANATOMY}, tuned=False, plain=True),
    ]


def _full_rate(setup: StudySetup) -> float | None:
    """Return the rate of the full fine-tune where it is not searched: quick ones all lie above its usual one."""
    return usual_rate(FullFineTune()) if setup.quick and not setup.fixed_lr else None


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return whether LoRA beats the probe, which layers it needs, and how far the full fine-tune is."""
    found = compare_arms(records, setup, aside=(PROBE, FULL), floor=PROBE)
    tables = {name: rows for r in records if r.arm.name == ANATOMY for name, rows in r.tables.items()}
    first, *labels = LABELS
    anatomy, architecture = anatomy_table(tables), (first, likeness(tables))
    if found is None:
        empty = nothing_measured(setup, labels)
        return replace(empty, tables=[anatomy], blanks=[architecture, *empty.blanks])
    findings, layers = _findings(found), _layers(found)
    rate = _full_rate(setup)
    return found.answer(
        sentence=sentences(_against(found), layers),
        findings=findings,
        blanks=[architecture, *zip(labels, (layers, _performance(found), _plan(found, findings, setup)), strict=True)],
        tables=[anatomy, found.scores],
        figures=[score_chart("vision", found.every, found.metric, "axis.trained_part")],
        method=sentences(Message("vision.method"), Message("vision.full_rate", rate=rate) if rate else None),
        advice=advised(found.advice),
        next=_next(found),
    )


def _against(found: Comparison) -> Message:
    """Say how the best choice of layers stands against the probe and the full fine-tune."""
    best = found.ranking.leader
    versus = [_versus(found, best, name) for name in (PROBE, FULL)]
    return Message("vision.against", arm=best, score=found.score(best), parts=versus)


def _versus(found: Comparison, best: str, rival: str) -> Message:
    if rival not in found.every:
        return Message("vision.versus_missing", rival=rival)
    contrast = found.ranking.contrast(best, rival)
    size = found.metric.change(contrast.estimate)
    return Message(f"vision.versus_{contrast.verdict}", rival=rival, score=found.score(rival), size=size)


def _layers(found: Comparison) -> Message:
    """Say which layers, as far as the numbers go."""
    order = found.order(found.arms)
    among = Message("vision.among", ranking=order) if order else Message("vision.one_choice")
    taken = found.recommendation if found.ranking.recommended else Message("vision.not_above_probe")
    return sentences(among, taken)


def _performance(found: Comparison) -> Message:
    """Say every arm's score and cost."""
    return clauses(Message("vision.performance", **found.facts(name)) for name in found.every)


def _findings(found: Comparison) -> list[Finding]:
    """Compare each choice with the probe and the full fine-tune, and the choices pair by pair."""
    across = [found.claim(name, rival) for rival in found.every if rival not in found.arms for name in found.arms]
    return [*across, *found.claims()]


def _plan(found: Comparison, findings: Sequence[Finding], setup: StudySetup) -> Message:
    """Say the next experiment: what this one leaves open, and what it would take."""
    undecided = [Message("vision.settle", claim=f.sentence) for f in findings if f.verdict == "undecided"]
    longer = Message("vision.longer", steps=max(100, 4 * int(setup.fields.get("max_steps", 0))))
    steps = [_next(found), *undecided[:1], longer, Message("vision.own_pictures")]
    return numbered(steps)


def _next(found: Comparison) -> Message:
    """Suggest an experiment: against the probe first, then between choices, then ranks."""
    first = found.ranking.leader
    if PROBE in found.every and found.ranking.contrast(first, PROBE).verdict != "better":
        return Message("vision.more_pictures", arm=first)
    if rivals := found.ranking.open_rivals:
        return Message("vision.equal_size", arm=first, rival=rivals[0])
    return Message("vision.other_ranks", arm=first)
