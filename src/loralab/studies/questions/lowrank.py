"""Q1: is the update low-rank? Its spectrum, the intrinsic dimension, and shared directions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.evidence import Metric, by_arm, claim, finding, mean_of, metric_of, scores_table
from loralab.studies.measures import intruders
from loralab.studies.measures.dimension import MEASURE_DIMENSION, MEASURE_FLOOR
from loralab.studies.measures.frozen import KINDS, MEASURE_FROZEN
from loralab.studies.measures.overlaps import LARGE, MEASURE_OVERLAPS, RANKS, SEEDS, SIDES, SMALL, TOP
from loralab.studies.measures.spectra import MEASURE_FULL
from loralab.studies.message import Chart, Column, Message, Table, sentences
from loralab.studies.ranking import Arms, ranked
from loralab.studies.readings.directions import Dimension, Pairs, Reached, Spectra, dimension_of, pairs_of, spectra_of
from loralab.studies.readings.intruders import intruders_of
from loralab.studies.study import Answer, Arm, Finding, Record, StudySetup, nothing_measured
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]

BASE, FULL, HEAD, PAIRS = "base", "full", "linear head", f"r={SMALL} and r={LARGE}"
SIZES = {  # variant -> d, thorough and quick
    "did": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (1_000, 10_000, 100_000)),
    "said": ((100, 1_000, 10_000, 30_000, 100_000, 300_000), (100_000,)),
}
SCALES = ((1.0, 2.5), (2.5,))  # how far theta moves in a step, thorough and quick
FULL_RATE, LORA_RATE = 3e-4, 2e-3
METHOD = {"quick": SCALES[1][0], "first": SCALES[0][0], "second": SCALES[0][1], "rate": LORA_RATE, "small": SMALL}
METHOD |= {"large": LARGE, "top": intruders.TOP, "near": intruders.NEAR, "kept": intruders.KEPT}
LABELS = tuple(Message(f"lowrank.{name}_label") for name in ("known", "changed", "meaning"))
MISSING = Message("answer.not_measured")


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the base, a full fine-tune, a head alone, three LoRA runs in one, and every d.

    Raises:
        ConfigError: a value is no number of directions.
    """
    quick = setup.quick
    full = {"method": "full", **({"learning_rate": FULL_RATE} if quick else {})}
    head = Arm(name=HEAD, options={"measure": MEASURE_FROZEN}, tuned=False, plain=True)
    asked = _sizes(setup)
    return [
        Arm(name=BASE, options={"measure": MEASURE_FLOOR}, tuned=False, plain=True),
        Arm(name=FULL, fields=full, options={"measure": MEASURE_FULL}, tuned=not quick),
        *([head] if base.kind in KINDS else []),
        Arm(name=PAIRS, options={"measure": MEASURE_OVERLAPS, "rate": LORA_RATE}, tuned=False),
        *(_subspace(variant, d, quick) for variant, sizes in SIZES.items() for d in asked or sizes[quick]),
    ]


def _subspace(variant: str, d: int, quick: bool) -> Arm:
    options = {"measure": MEASURE_DIMENSION, "variant": variant, "d": d, "rates": list(SCALES[quick])}
    return Arm(name=f"{variant.upper()} d={d}", options=options, tuned=False)


def _sizes(setup: StudySetup) -> list[int]:
    """Return the d that were asked for."""
    wrong = [value for value in setup.values if not value.isdecimal() or int(value) < 1]
    if wrong:
        asked = f"numbers of directions d, such as 1000,10000; got {wrong[0]!r}"
        raise ConfigError(f"--values of lowrank are {asked}", code="wrong_value", field="values")
    return sorted({int(value) for value in setup.values})


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the spectrum, d90 and the overlaps, each only as far as it was measured."""
    scored, metric = by_arm(records), metric_of(records, setup)
    spectra, pairs, subspaces = spectra_of(records, FULL), pairs_of(records, PAIRS), dimension_of(records, FULL)
    if not scored and not spectra and not pairs:
        return replace(nothing_measured(setup), blanks=[(label, MISSING) for label in LABELS])
    intruding = intruders_of(records, FULL, PAIRS)
    few, shared = [*map(_spectrum, spectra)], [*chain(*map(_shared, pairs))]
    d90 = [*chain(*(_d90(dimension, metric) for dimension in subspaces))]
    order, against_full = [*chain(*map(_order, pairs))], _against_full(scored, metric)
    parts = [*(found.sentence for found in (*few, *d90)), *(_overlap(shared) for _ in pairs)]
    changed = [Message("lowrank.size", relative=update.middle("relative")) for update in spectra]
    changed += [*(found.sentence for found in few), *(_amplified(pair, order) for pair in pairs)]
    claims = [*chain(*(own.findings for own in intruding))]
    changed += [found.sentence for found in claims]
    meaning = [Message("lowrank.meaning"), *([found.sentence for found in d90] or [MISSING])]
    blanks = (_known(scored, metric, against_full), sentences(*(changed or [MISSING])), sentences(*meaning))
    dimensions = [_dimension_table(dimension.rows(metric), metric) for dimension in subspaces]
    scores = [scores_table(scored, metric)] if scored else []
    curves = [_curve_chart(dimension, metric) for dimension in subspaces]
    return Answer(
        sentence=sentences(*parts) if parts else Message("lowrank.neither"),
        findings=[*few, *d90, *shared, *order, *claims, *against_full],
        blanks=list(zip(LABELS, blanks, strict=True)),
        tables=[
            *map(_modules_table, spectra),
            *dimensions,
            *map(_order_table, pairs),
            *(own.table for own in intruding),
            *scores,
        ],
        figures=[*chain(*(update.charts for update in spectra)), *curves, *chain(*map(_phi_charts, pairs))],
        method=Message("lowrank.how", **METHOD),
        next=Message("lowrank.between" if any(found.effect is not None for found in d90) else "lowrank.longer"),
    )


def _spectrum(spectra: Spectra) -> Finding:
    """Say whether the update needs fewer directions than a random matrix, and whether few."""
    change, medians = spectra.fewer, {key: spectra.middle(key) for key in ("rank90", "random_rank90", "most")}
    outcome = {"better": "low" if spectra.are_low else "some", "undecided": "unclear"}.get(change.verdict, "chance")
    facts = Message("lowrank.facts", low=change.low, high=change.high, **medians)
    return finding(Message(f"lowrank.spectrum_{outcome}", facts=facts), change)


def _d90(dimension: Dimension, metric: Metric) -> list[Finding]:
    """Say d90 of each variant, or that there is none."""
    reached = dimension.d90(metric)
    if not reached:
        return [] if reached is None else [Finding(sentence=Message("lowrank.no_gain"), holds=False)]
    return [d90_finding(variant.upper(), d90, dimension.large) for variant, d90 in reached.items()]


def d90_finding(variant: str, d90: Reached, large: int) -> Finding:
    """Say d90 of a variant of D = large weights; it holds where its whole interval was reached."""
    largest, has_end, is_known = d90.tried[-1], math.isfinite(d90.high), d90.kind in ("found", "at_most")
    ends = Message("lowrank.ends" if has_end else "lowrank.no_end", low=d90.low, high=d90.high, largest=largest)
    values = {"variant": variant, "large": large}
    values |= {"d90": d90.value, "share": d90.value / max(1, large)} if is_known else {}
    tried = [Message("lowrank.d", d=d) for d in d90.tried]
    sentence = Message(f"lowrank.d90_{d90.kind}", ends=ends, largest=largest, tried=tried, **values)
    effect, low, high = (d90.value, d90.low, d90.high if has_end else None) if is_known else (None, None, None)
    return Finding(sentence=sentence, holds=is_known and has_end, effect=effect, low=low, high=high)


WHERE = {
    (pair, side): {"pair": Message(f"lowrank.{pair}", small=SMALL, large=LARGE), "side": Message(f"lowrank.{side}")}
    for pair, side in product((RANKS, SEEDS), SIDES)
}


def _shared(pairs: Pairs) -> list[Finding]:
    """Say whether the strongest direction of one update is among the first of another, on both sides."""
    findings = []
    for which, names in WHERE.items():
        change, phi, chance = pairs.first(*which)
        a, b = (
            Message("lowrank.first_directions", top=TOP, phi=phi, **names),
            Message("lowrank.by_chance", chance=chance),
        )
        span = Message("lowrank.difference", low=change.low, high=change.high)
        findings.append(finding(Message(f"lowrank.{change.verdict}", a=a, b=b, span=span), change))
    return findings


def _overlap(shared: Sequence[Finding]) -> Message:
    """Say the largest overlap above chance."""
    above = [finding for finding in shared if finding.verdict == "better"]
    return max(above, key=lambda f: f.effect or 0.0).sentence if above else Message("lowrank.none_shared")


def _order(pairs: Pairs) -> list[Finding]:
    """Say what W has in the directions of an update; without a size, since most of it is no surprise."""
    findings = []
    for (name, rank), change in pairs.order.items():
        values = {which: Message(f"lowrank.{name}_{which}", rank=rank, other=LARGE) for which in ("a", "b")}
        span = Message("lowrank.ratio", low=math.exp(change.low), high=math.exp(change.high))
        said = finding(Message(f"lowrank.{change.verdict}", span=span, **values), change)
        findings.append(replace(said, effect=None, low=None, high=None))
    return findings


def _amplified(pairs: Pairs, order: Sequence[Finding]) -> Message:
    """Say the amplification beside that of random directions, and how much of the order holds."""
    held = sum(finding.verdict == "better" for finding in order)
    whole = "whole" if held == len(order) else "part"
    factors = {r: {"factor": pairs.middle(r, "factor"), "chance": pairs.by_chance(r)} for r in (SMALL, LARGE)}
    said = [Message("lowrank.factor", rank=rank, **values) for rank, values in factors.items()]
    return Message(f"lowrank.order_{whole}", factors=said, held=held, of=len(order))


def _against_full(scored: Arms, metric: Metric) -> list[Finding]:
    """Compare full fine-tuning with the base, and the head alone with full fine-tuning."""
    if FULL not in scored:
        return []
    found = ranked({FULL: scored[FULL]}, metric, {name: scored.get(name, ()) for name in (BASE, HEAD)})
    pairs = ((FULL, BASE), (HEAD, FULL))
    return [claim(found.contrast(a, b), metric) for a, b in pairs if {a, b} <= found.means.keys()]


def _known(scored: Arms, metric: Metric, against_full: Sequence[Finding]) -> Message:
    """Fill in what frozen features, or the untrained model, score beside training everything."""
    head = HEAD if HEAD in scored else BASE
    if not {head, FULL} <= scored.keys():
        return MISSING
    frozen, full = (metric.value(mean_of(scored[name], "score")) for name in (head, FULL))
    known = Message("lowrank.known_head" if head == HEAD else "lowrank.known_base", frozen=frozen, full=full)
    return sentences(known, against_full[-1].sentence)


def _modules_table(spectra: Spectra) -> Table:
    """Return every kind of module over its layers: size of the update and its ranks beside chance."""
    rows = []
    for kind, own in spectra.kinds.items():
        shape, relative = " × ".join(map(str, own[0]["shape"])), spectra.middle("relative", kind)
        ranks = {key: spectra.beside_chance(key, kind) for key in ("rank90", "effective", "stable")}
        rows.append({"kind": kind, "shape": shape, "relative_update": relative, **ranks})
    columns = [Column("kind"), Column("shape"), Column("relative_update", "fine percent")]
    columns += [Column("rank90"), Column("effective"), Column("stable")]
    return Table(title=Message("lowrank.update_table"), columns=columns, rows=rows)


D, SUBSPACE = Message("lowrank.d_column"), Message("lowrank.variant_column")


def _dimension_table(rows: Sequence[Mapping[str, Any]], metric: Metric) -> Table:
    score = Message("axis.score", metric=metric.text)
    share = Column("of", "fine percent", Message("lowrank.of_column"))
    columns = (Column("arm", label=SUBSPACE), Column("x", "count", D), share, Column("score", label=score))
    return Table(title=Message("lowrank.dimension_table"), columns=columns, rows=rows)


def _order_table(pairs: Pairs) -> Table:
    """Return table 7 of the paper: what W has in the directions of the update, of chance, of itself."""
    keys = ("update", "chance", "inside", "own", "weight", "factor")
    rows = [{"rank": rank, **{key: pairs.middle(rank, key) for key in keys}} for rank in (SMALL, LARGE)]
    numbers = [Column(key, ".2f", Message(f"lowrank.{key}_column")) for key in keys]
    return Table(title=Message("lowrank.order_table"), columns=[Column("rank"), *numbers], rows=rows)


def _curve_chart(dimension: Dimension, metric: Metric) -> Chart:
    """Return the score against d; dashed: what d90 has to reach."""
    goal = dimension.goal if metric.rises or dimension.goal is None else -dimension.goal
    title, y = Message("lowrank.curve_chart"), Message("axis.score", metric=metric.text)
    options = {"log_x": True, "chance": goal, "percent": metric.rises}
    return Chart("lines", "lowrank-dimension", title, dimension.rows(metric), D, y, SUBSPACE, options)


def _phi_charts(pairs: Pairs) -> list[Chart]:
    """Return phi less its chance level, for every pair and side, the median of modules."""
    j, i, value = (Message(f"lowrank.{name}") for name in ("j", "i", "above_chance"))
    titles = {"-".join(which): Message("lowrank.phi_chart", **names) for which, names in WHERE.items()}
    return [
        Chart("heat", f"lowrank-phi-{name}", title, pairs.phi(*name.split("-")), j, i, value)
        for name, title in titles.items()
    ]
