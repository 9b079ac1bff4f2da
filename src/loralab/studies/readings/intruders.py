"""Intruder dimensions of trained weights: LoRA's beside full fine-tuning's, and what they have to do with forgetting."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from loralab.studies.evidence import Metric, claim, mean_of
from loralab.studies.measures.intruders import GENERAL, KEPT, NEAR, REPAIRED, TASK, TOP
from loralab.studies.measures.overlaps import LARGE, SMALL
from loralab.studies.message import Column, Message, Table, table
from loralab.studies.ranking import rank_rows
from loralab.studies.readings.low_rank import Part, Rows, compared
from loralab.studies.statistics import difference
from loralab.studies.study import Finding, Record

SHARES = Metric(name="intruders", margin=5.0)  # half a direction of ten
FORMATS = {"count": ".1f", "nearest": ".2f", "chance": ".2f", "energy": "percent", "relative": "fine percent"}
Runs = Mapping[str, Sequence[Rows]]  # name of a run -> the layers of each seed, in one order


def intruders(records: Sequence[Record], full: str, pairs: str) -> Part:
    """Return the intruders of the full fine-tune and of the LoRA runs."""
    known = [record for record in records if record.tables.get("intruders")]
    if not known:
        return Part()
    lora, whole = ([record for record in known if record.arm.name == name] for name in (pairs, full))
    runs = _in_one_order(lora, whole, full)
    losses = {f"r={rank}": mean_of(lora, f"validation_loss {rank}") for rank in (SMALL, LARGE)}
    losses[full] = mean_of(whole, "validation_loss")
    found = [*_more(runs, full), *_repaired(lora)]
    return Part(changed=[own.sentence for own in found], findings=found, tables=[_table(runs, losses)])


def _in_one_order(lora: Sequence[Record], whole: Sequence[Record], full: str) -> dict[str, list[Rows]]:
    """Return the layers that every run has, by run and seed."""
    found = {
        f"r={rank}": [[row for row in r.tables["intruders"] if row["rank"] == rank] for r in lora]
        for rank in (SMALL, LARGE)
    }
    found[full] = [list(record.tables["intruders"]) for record in whole]
    runs = {run: seeds for run, seeds in found.items() if seeds}
    shared = set.intersection(*({row["name"] for row in rows} for seeds in runs.values() for rows in seeds))
    return {
        run: [
            sorted((row for row in rows if row["name"] in shared), key=lambda row: str(row["name"])) for rows in seeds
        ]
        for run, seeds in runs.items()
    }


def _middle(seeds: Sequence[Rows], key: str) -> float:
    """Return the mean over layers and seeds."""
    return statistics.fmean(float(row[key]) for rows in seeds for row in rows)


def _more(runs: Runs, full: str) -> list[Finding]:
    """Say whether LoRA has more intruders than full fine-tuning; layers are the rows, and larger is more of them."""
    if full not in runs:
        return []
    found = rank_rows({run: [[row["share"] for row in rows] for rows in seeds] for run, seeds in runs.items()}, SHARES)
    names = {
        run: Message("lowrank.intruders_of", run=run, count=TOP * _middle(seeds, "share"), top=TOP)
        for run, seeds in runs.items()
    }
    said = []
    for run in (run for run in runs if run != full):
        change = found.contrast(run, full)
        span = Message("lowrank.difference", low=TOP * change.low, high=TOP * change.high)
        said.append(compared(change, names[run], names[full], span))
    return said


def _repaired(lora: Sequence[Record]) -> list[Finding]:
    """Compare r=8 with itself repaired, on other data and on the task, row by row."""
    found = []
    for name, kind in ((GENERAL, "general_kind"), (TASK, "task_metric")):
        runs = [record for record in lora if record.items.get(name + REPAIRED)]
        if not runs:
            continue
        metric = Metric(name=runs[0].texts[kind])
        repaired, trained = ([record.items[key] for record in runs] for key in (name + REPAIRED, name))
        change = difference(repaired, trained, comparisons=2, margin=metric.margin_at(abs(float(np.mean(trained)))))
        where = runs[0].texts["general"] if name == GENERAL else Message("lowrank.the_task")
        ours = Message("lowrank.repaired", rank=SMALL, kept=KEPT, where=where)
        found.append(claim(change, metric, (ours, Message("lowrank.as_trained", rank=SMALL))))
    return found


def _table(runs: Runs, losses: Mapping[str, float]) -> Table:
    """Return the intruders of every run beside what is needed to judge their number."""
    rows = []
    for run, seeds in runs.items():
        means = {key: _middle(seeds, key) for key in FORMATS if key != "count"}
        rows.append({"run": run, "count": TOP * _middle(seeds, "share"), **means, "loss": losses.get(run)})
    numbers = [
        Column(key, how, Message(f"lowrank.intruder_{key}", top=TOP, near=NEAR))
        for key, how in {**FORMATS, "loss": "plain"}.items()
    ]
    return table("lowrank.intruder_table", rows, "run::lowrank.run_column", *numbers)
