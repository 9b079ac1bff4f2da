"""Q6: does merging change the result? Every dtype and kind of base, and a hundred merges."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loralab.models.load import Base
from loralab.models.quantize import gguf_file
from loralab.studies.contrast import Contrast
from loralab.studies.evidence import MARGIN, Metric, claim, finding, metric_of
from loralab.studies.measures.carried import REFERENCE
from loralab.studies.measures.drift import MEASURE_DRIFT, NOTED
from loralab.studies.measures.merging import AFTER, BEFORE, MEASURE_MERGING, has_fp16
from loralab.studies.message import Chart, Column, Message, Table, chart, points, sentences, table
from loralab.studies.statistics import difference, median_contrast
from loralab.studies.study import NOT_MEASURED, Answer, Arm, Finding, Record, StudySetup, nothing_measured

AGAIN, AWARE, DRIFT = "NF4 → NF4", "NF4 → NF4, trained for it", "100 merges"
DENSE = ("fp32", "bf16", "fp16")
NAMES = {
    **{name: name for name in DENSE},
    "nf4": "NF4",
    "nf4-again": AGAIN,
    "nf4-aware": AWARE,
    "gguf": "GGUF",
    "drift": DRIFT,
}
PACKED = (AGAIN, AWARE)  # forms that end in 4 bits
SLOW_ROWS = 12  # of a dtype that the machine has no instructions for
COMPARED = (32, 8)  # rows whose logits are compared: thorough, quick
FEW_MODULES = 7  # of the hundred merges in a quick study
EXPECTED = 1e-6  # the source's own expectation of the difference in loss
SHOWN = (1, 10, 100)  # merges of the table of drifts
LOSS = Metric(name="loss")
Forms = Mapping[str, Record]
Drift = Mapping[str, Any]  # a row of measures/drift.py: the weights of one dtype


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return the adapter's own run, one arm for each form of the base, and the hundred merges."""
    return [REFERENCE, *(_arm(name, setup) for name in setup.chosen(list(NAMES), usual(setup)))]


def usual(setup: StudySetup) -> list[str]:
    """Return all forms; in a quick study none that the machine would compute very slowly."""
    names = ["fp32", "bf16", *(["fp16"] if has_fp16() or not setup.quick else []), "nf4", "nf4-again"]
    names += ["nf4-aware"] if not setup.quick else []  # it trains a second adapter
    names += ["gguf"] if not setup.quick and gguf_file(setup.model) is not None else []
    return [*names, "drift"]


def _arm(name: str, setup: StudySetup) -> Arm:
    """Return the arm of a form, or of the hundred merges."""
    if name == "drift":
        few = {"precisions": ["fp32", "bf16"], "modules": FEW_MODULES}
        options = {"measure": MEASURE_DRIFT, **(few if setup.quick else {"precisions": list(DENSE)})}
        return Arm(name=DRIFT, options=options, tuned=False, plain=True)
    options = {
        "measure": MEASURE_MERGING,
        "precision": name if name in DENSE else str(setup.fields.get("precision", "auto")),
        "quantize": "none" if name in DENSE else name.partition("-")[0],
        "compared": COMPARED[setup.quick],
        **({"again": True} if NAMES[name] in PACKED else {}),
        **({"aware": True} if name == "nf4-aware" else {}),
        **({"limit": SLOW_ROWS} if name == "fp16" and not has_fp16() else {}),
    }
    return Arm(name=NAMES[name], options=options, tuned=False, plain=True)


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return what merging changed in each form of the base, and what a hundred merges leave."""
    forms = {r.arm.name: r for r in records if "loss_difference" in r.numbers}
    drifts = [row for record in records for row in record.tables.get("drift", ())]
    if not forms and not drifts:
        return nothing_measured(setup, blanks=_blanks(forms))
    metric = metric_of([*forms.values(), *records], setup)
    changes = [_finding(r, own, len(forms)) for own in (LOSS, metric) for r in forms.values()]
    return Answer(
        sentence=_sentence(forms, drifts),
        findings=[*filter(None, changes), *_kept(forms.get(AGAIN)), *(_off(d, len(drifts)) for d in drifts)],
        blanks=_blanks(forms),
        tables=[_forms_table(forms), _drift_table(drifts, records)],
        figures=_charts(forms, drifts),
        caution=sentences(Message("merge.caution"), _fp16(forms.get("fp16"))),
    )


def off(drift: Drift, merges: int) -> float:
    """Return |W - W0| / |W0| after so many merges, the mean of the modules."""
    return float(np.mean([curve[NOTED.index(merges)] for curve in drift["relative"]]))


def _sentence(forms: Forms, drifts: Sequence[Drift]) -> Message:
    """Say fp32 first, then what else moved, then the way back."""
    others = [Message("merge.form", arm=n, **_said(r)) for n, r in forms.items() if n not in ("fp32", *PACKED)]
    kept = _kept_change(forms.get(AGAIN))
    parts = [
        _fp32(forms["fp32"]) if "fp32" in forms else None,
        Message("merge.others", parts=others) if others else None,
        Message("merge.again", kept=1 + kept.estimate) if kept else None,
        Message("merge.aware", gain=forms[AWARE].numbers["gain_kept"]) if AWARE in forms else None,
        _way_back(drifts) if drifts else None,
    ]
    return sentences(*parts) if any(parts) else Message("merge.partial")


def _fp32(record: Record) -> Message:
    within = record.numbers["loss_difference"] < EXPECTED
    same = within and not record.numbers.get("changed")
    return Message("merge.fp32_same" if same else "merge.fp32_below" if within else "merge.fp32_above", **_said(record))


def _way_back(drifts: Sequence[Drift]) -> Message:
    if not all(drift["exact"] for drift in drifts):
        return Message("merge.defect")
    worst = max(drifts, key=lambda drift: off(drift, NOTED[-1]))
    return Message("merge.way_back", precision=worst["precision"], off=off(worst, NOTED[-1]))


def _said(record: Record) -> dict[str, Any]:
    """Return the values that sentences on a form share."""
    n = record.numbers
    answers = Message("merge.answers" if "changed" in n else "merge.tokens", **n)
    size, before = n["loss_difference"], n["loss_before"]
    return {"difference": size, "loss": before, "share": size / abs(before) if before else None, "answers": answers}


def _finding(record: Record, metric: Metric, family: int) -> Finding | None:
    """Compare a model merged with itself unmerged, row by row; None where no row has a value.

    A loss that moves by less than the source expects is rounding.
    """
    kind = " loss" if metric == LOSS else ""
    now, was = (record.items.get(f"{side}{kind}", ()) for side in (AFTER, BEFORE))
    if not now:
        return None
    change = difference([now], [was], comparisons=family, margin=metric.margin_at(abs(float(np.mean(was)))))
    name = record.arm.name
    after = name if name in PACKED else Message("merge.merged", arm=name)
    before = Message("merge.unmerged", arm="NF4" if name in PACKED else name)
    found = claim(change, metric, names=(after, before))
    if metric == LOSS and abs(change.estimate) < EXPECTED:
        return replace(found, sentence=Message("merge.rounding", a=after, b=before, size=abs(change.estimate)))
    return found


def _kept_change(record: Record | None) -> Contrast | None:
    """Compare what packing again keeps of the update with all of it, over layers."""
    kept = record.series.get("kept", ()) if record is not None else ()
    return median_contrast([share - 1 for share in kept], margin=MARGIN / 100) if kept else None


def _kept(record: Record | None) -> list[Finding]:
    """Say how much of the update NF4 keeps, over the layers."""
    change = _kept_change(record)
    if change is None:
        return []
    shares = {"kept": 1 + change.estimate, "low": 1 + change.low, "high": 1 + change.high}
    return [finding(Message("merge.kept", **shares), change)]


def _off(drift: Drift, family: int) -> Finding:
    """Say how far subtracting leaves the weights of a dtype off, over the modules; what is off counts as worse."""
    last = [curve[-1] for curve in drift["relative"]]
    change = difference([[0.0] * len(last)], [last], comparisons=family)
    shares = {"off": -change.estimate, "low": -change.high, "high": -change.low}
    return finding(Message("merge.off", precision=drift["precision"], **shares), change)


def _blanks(forms: Forms) -> list[tuple[Message | str, Message]]:
    """Fill in what the source's program prints, and whether its expectation holds."""
    names = dict.fromkeys(("fp32", *forms))
    told = {
        name: Message("merge.difference", **_said(forms[name])) if name in forms else NOT_MEASURED for name in names
    }
    (first, *others) = [(Message("merge.difference_label", arm=name), said) for name, said in told.items()]
    expected = _expectation(forms["fp32"]) if "fp32" in forms else NOT_MEASURED
    return [first, (Message("merge.expected_label"), expected), *others]


def _expectation(record: Record) -> Message:
    n = record.numbers
    if n["loss_difference"] < EXPECTED:
        return Message("claim.holds")
    unit = float(np.spacing(np.float32(abs(n["loss_before"]))))  # to the next number that fp32 holds
    return Message("merge.not_expected", unit=unit)


def _fp16(record: Record | None) -> Message | None:
    """Say where fp16 was measured on few rows, or not at all."""
    if record is None:
        return Message("merge.no_fp16")
    return Message("merge.slow_fp16", rows=record.numbers["rows"]) if record.arm.options.get("limit") else None


def _forms_table(forms: Forms) -> Table:
    """Return every form of the base, before and after."""
    rows = []
    for name, record in forms.items():
        n = record.numbers
        changed = Message("merge.changed", changed=n["changed"], rows=n["rows"]) if "changed" in n else None
        exact = n["restored"] == n.get("same_logits") == 1 if "restored" in n else None
        restored = None if exact is None else Message("answer.yes" if exact else "answer.no")
        rows.append({**n, "form": name, "changed": changed, "restored": restored})
    losses = ("loss_before:.6f", "loss_after:.6f", "loss_difference:.2g", "relative:.2g")
    outputs = ("kl:.2g", "effect_kl:.2g", "top1:fine percent", "changed")
    weights = ("moved:fine percent", "noise:fine percent", "kept:fine percent", "gain_kept:fine percent", "restored")
    times = ("merge_seconds:seconds", "unmerge_seconds:seconds")
    return table("merge.forms", rows, "form", *losses, *outputs, *weights, *times)


def _drift_table(drifts: Sequence[Drift], records: Sequence[Record]) -> Table:
    """Return both ways back, after 1, 10 and 100 merges."""
    numbers = next((r.numbers for r in records if r.tables.get("drift")), {"modules": 0, "of": 0})
    rows = []
    for drift in drifts:
        back = Message("merge.exact" if drift["exact"] else "merge.not_exact")
        row = {**drift, "differing": float(np.mean(drift["changed"])), "put_back": back}
        rows.append(row | {f"after_{n}": off(drift, n) for n in SHOWN})
    after = (Column(f"after_{n}", ".2g", Message("merge.off_after", merges=n)) for n in SHOWN)
    title = Message("merge.drifts", modules=numbers["modules"], total=numbers["of"])
    logits = ("kl:.2g:column.base_kl", "top1:fine percent")
    return table(title, rows, "precision::column.weights", *after, "differing:fine percent", *logits, "put_back")


def _charts(forms: Forms, drifts: Sequence[Drift]) -> list[Chart]:
    """Return the drift against merges, and how much merging moves beside how much the adapter moves."""
    curves = {drift["precision"]: {n: y for n in NOTED if (y := off(drift, n))} for drift in drifts}
    numbers = {name: record.numbers for name, record in forms.items() if record.numbers["effect_kl"] > 0}
    bars = [{"arm": name, "value": n["kl"] / n["effect_kl"]} for name, n in numbers.items()]
    distance, share = ("axis.merges", "axis.drift", "column.weights"), ("column.form", "axis.share")
    return [
        chart("lines", "merge-drift", "merge.drift_chart", points(curves), *distance, log_x=True, log_y=True),
        chart("bars", "merge-kl", "merge.kl_chart", bars, *share, percent=True),
    ]
