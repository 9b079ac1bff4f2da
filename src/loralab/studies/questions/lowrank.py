"""Q1: is the update low-rank? Its spectrum, the intrinsic dimension, and shared directions."""

from collections.abc import Sequence
from itertools import chain

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.evidence import Metric, by_arm, claim, mean_of, metric_of, scores_table
from loralab.studies.measures.dimension import MEASURE_DIMENSION, MEASURE_FLOOR
from loralab.studies.measures.frozen import KINDS, MEASURE_FROZEN
from loralab.studies.measures.intruders import KEPT, NEAR
from loralab.studies.measures.intruders import TOP as FIRST
from loralab.studies.measures.overlaps import LARGE, MEASURE_OVERLAPS, SMALL
from loralab.studies.measures.spectra import MEASURE_FULL
from loralab.studies.message import Message, sentences
from loralab.studies.ranking import FLOOR, Arms, ranked
from loralab.studies.readings.dimension import dimension
from loralab.studies.readings.directions import directions
from loralab.studies.readings.intruders import intruders
from loralab.studies.readings.spectra import spectra
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured

FULL, HEAD, PAIRS = "full", "linear head", f"r={SMALL} and r={LARGE}"
SIZES = {  # variant -> d, thorough and quick
    "did": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (1_000, 10_000, 100_000)),
    "said": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (100_000,)),
}
SCALES = ((1.0, 2.5), (2.5,))  # how far theta moves in a step, thorough and quick
FULL_RATE, LORA_RATE = 3e-4, 2e-3


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the base, a full fine-tune, a head alone, three LoRA runs in one, and every d.

    Raises:
        ConfigError: a value is no number of directions.
    """
    quick, asked = setup.quick, _sizes(setup)
    full = {"method": "full", **({"learning_rate": FULL_RATE} if quick else {})}
    subspace = {"measure": MEASURE_DIMENSION, "rates": list(SCALES[quick])}
    head = Arm(name=HEAD, options={"measure": MEASURE_FROZEN}, tuned=False, plain=True)
    return [
        Arm(name=FLOOR, options={"measure": MEASURE_FLOOR}, tuned=False, plain=True),
        Arm(name=FULL, fields=full, options={"measure": MEASURE_FULL}, tuned=not quick),
        *([head] if base.kind in KINDS else []),
        Arm(name=PAIRS, options={"measure": MEASURE_OVERLAPS, "rate": LORA_RATE}, tuned=False),
        *(
            Arm(name=f"{variant.upper()} d={d}", options={**subspace, "variant": variant, "d": d}, tuned=False)
            for variant, sizes in SIZES.items()
            for d in asked or sizes[quick]
        ),
    ]


def _sizes(setup: StudySetup) -> list[int]:
    """Return the d that were asked for."""
    wrong = [value for value in setup.values if not value.isdecimal() or int(value) < 1]
    if wrong:
        asked = f"numbers of directions d, such as 1000,10000; got {wrong[0]!r}"
        raise ConfigError(f"--values of lowrank are {asked}", code="wrong_value", field="values")
    return sorted({int(value) for value in setup.values})


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the spectrum, d90, the overlaps and the intruders, each only as far as it was measured."""
    scored, metric = by_arm(records), metric_of(records, setup)
    d90 = dimension(records, FULL, metric)
    parts = [spectra(records, FULL), d90, directions(records, PAIRS), intruders(records, FULL, PAIRS)]
    labels = [Message(f"lowrank.{name}_label") for name in ("known", "changed", "meaning")]
    if not scored and not any(part.findings for part in parts):
        return nothing_measured(setup, blanks=[(label, NOT_MEASURED) for label in labels])
    against_full = _against_full(scored, metric)
    said, changed = ([*chain(*lists)] for lists in ([p.sentences for p in parts], [p.changed for p in parts]))
    meaning = sentences(Message("lowrank.meaning"), *(d90.sentences or [NOT_MEASURED]))
    blanks = (_known(scored, metric, against_full), sentences(*(changed or [NOT_MEASURED])), meaning)
    scales = {"first": SCALES[0][0], "second": SCALES[0][1], "quick": SCALES[1][0], "rate": LORA_RATE}
    return Answer(
        sentence=sentences(*said) if said else Message("lowrank.neither"),
        findings=[*chain(*(part.findings for part in parts)), *against_full],
        blanks=list(zip(labels, blanks, strict=True)),
        tables=[*chain(*(part.tables for part in parts)), *([scores_table(scored, metric)] if scored else [])],
        figures=[*chain(*(part.figures for part in parts))],
        method=Message("lowrank.how", **scales, small=SMALL, large=LARGE, top=FIRST, near=NEAR, kept=KEPT),
        next=Message(
            "lowrank.between" if any(found.effect is not None for found in d90.findings) else "lowrank.longer"
        ),
    )


def _against_full(scored: Arms, metric: Metric) -> list[Finding]:
    """Compare full fine-tuning with the base, and the head alone with full fine-tuning."""
    if FULL not in scored:
        return []
    found = ranked({FULL: scored[FULL]}, metric, {name: scored.get(name, ()) for name in (FLOOR, HEAD)})
    pairs = ((FULL, FLOOR), (HEAD, FULL))
    return [claim(found.contrast(a, b), metric) for a, b in pairs if {a, b} <= found.means.keys()]


def _known(scored: Arms, metric: Metric, against_full: Sequence[Finding]) -> Message:
    """Fill in what frozen features, or the untrained model, score beside training everything."""
    head = HEAD if HEAD in scored else FLOOR
    if not {head, FULL} <= scored.keys():
        return NOT_MEASURED
    frozen, full = (metric.value(mean_of(scored[name], "score")) for name in (head, FULL))
    known = Message("lowrank.known_head" if head == HEAD else "lowrank.known_base", frozen=frozen, full=full)
    return sentences(known, against_full[-1].sentence)
