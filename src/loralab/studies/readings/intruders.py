"""Intruder dimensions of trained weights: LoRA's beside full fine-tuning's, and what they have to do with forgetting."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loralab.studies.contrast import Ranking, Sample, rank_arms
from loralab.studies.evidence import Metric, claim, finding, mean_of
from loralab.studies.measures.intruders import GENERAL, KEPT, NEAR, REPAIRED, TASK, TOP
from loralab.studies.measures.overlaps import LARGE, SMALL
from loralab.studies.message import Column, Message, Table
from loralab.studies.statistics import difference
from loralab.studies.study import Finding, Record

Rows = Sequence[Mapping[str, Any]]
SHARES = Metric(name="intruders", margin=5.0)  # half a direction of ten


@dataclass(frozen=True, kw_only=True)
class Intruders:
    """The layers of every run, one list for each seed, in one order; what was measured of repairing r=8."""

    full: str
    runs: Mapping[str, Sequence[Rows]]
    losses: Mapping[str, float]
    repairs: Sequence[Record]

    def middle(self, run: str, key: str) -> float:
        """Return the mean over layers and seeds."""
        return statistics.fmean(float(row[key]) for rows in self.runs[run] for row in rows)

    @property
    def ranking(self) -> Ranking:
        """Compare the share of intruders of all runs; layers are the rows, and larger is more of them."""
        arms = {
            run: Sample(
                scores=np.array([[row["share"] for row in rows] for rows in seeds]),
                spread=SHARES.spread_at(self.middle(run, "share")),
                fixed=False,
            )
            for run, seeds in self.runs.items()
        }
        return rank_arms(arms, margin=SHARES.margin_at(1.0), costs=dict.fromkeys(arms, 0.0))

    @property
    def findings(self) -> list[Finding]:
        """Say whether LoRA has more intruders than full fine-tuning, and what repairing them changes."""
        return [*self._more(), *self._repaired()]

    def _more(self) -> list[Finding]:
        if self.full not in self.runs:
            return []
        found, said = self.ranking, []
        names = {
            run: Message("lowrank.intruders_of", run=run, count=TOP * self.middle(run, "share"), top=TOP)
            for run in self.runs
        }
        for run in (run for run in self.runs if run != self.full):
            change = found.contrast(run, self.full)
            span = Message("lowrank.difference", low=TOP * change.low, high=TOP * change.high)
            values = {"a": names[run], "b": names[self.full], "span": span}
            said.append(finding(Message(f"lowrank.{change.verdict}", **values), change))
        return said

    def _repaired(self) -> list[Finding]:
        """Compare r=8 with itself repaired, on other data and on the task, row by row."""
        found = []
        for name in (GENERAL, TASK):
            runs = [record for record in self.repairs if record.items.get(name + REPAIRED)]
            if not runs:
                continue
            metric = Metric(name=runs[0].texts["general_kind" if name == GENERAL else "task_metric"])
            repaired, trained = ([record.items[key] for record in runs] for key in (name + REPAIRED, name))
            change = difference(repaired, trained, comparisons=2, margin=metric.margin_at(abs(float(np.mean(trained)))))
            where = runs[0].texts["general"] if name == GENERAL else Message("lowrank.the_task")
            pair = (
                Message("lowrank.repaired", rank=SMALL, kept=KEPT, where=where),
                Message("lowrank.as_trained", rank=SMALL),
            )
            found.append(claim(change, metric, pair))
        return found

    @property
    def table(self) -> Table:
        """Return the intruders of every run beside what is needed to judge their number."""
        keys = ("nearest", "chance", "energy", "relative")
        rows = [
            {
                "run": run,
                "count": TOP * self.middle(run, "share"),
                **{key: self.middle(run, key) for key in keys},
                "loss": self.losses.get(run),
            }
            for run in self.runs
        ]
        formats = {"count": ".1f", "nearest": ".2f", "chance": ".2f", "energy": "percent", "relative": "fine percent"}
        formats["loss"] = "plain"
        labels = {key: Message(f"lowrank.intruder_{key}", top=TOP, near=NEAR) for key in formats}
        columns = [Column(key, how, labels[key]) for key, how in formats.items()]
        run = Column("run", label=Message("lowrank.run_column"))
        return Table(title=Message("lowrank.intruder_table"), columns=[run, *columns], rows=rows)


def intruders_of(records: Sequence[Record], full: str, pairs: str) -> list[Intruders]:
    """Return the intruders of the full fine-tune and of the LoRA runs; none where none were measured."""
    known = [record for record in records if record.tables.get("intruders")]
    runs: dict[str, list[Rows]] = {}
    for record in known:
        rows = record.tables["intruders"]
        ranks = (SMALL, LARGE) if record.arm.name == pairs else (None,)
        for rank in ranks:
            own = [row for row in rows if row.get("rank") == rank]
            runs.setdefault(full if rank is None else f"r={rank}", []).append(own)
    if not runs:
        return []
    shared = set.intersection(*({row["name"] for row in rows} for seeds in runs.values() for rows in seeds))
    lora = [record for record in known if record.arm.name == pairs]
    losses = {f"r={rank}": mean_of(lora, f"validation_loss {rank}") for rank in (SMALL, LARGE)}
    losses[full] = mean_of([record for record in known if record.arm.name == full], "validation_loss")
    in_order = {run: [_sorted(rows, shared) for rows in seeds] for run, seeds in runs.items()}
    order = [run for run in (f"r={SMALL}", f"r={LARGE}", full) if run in in_order]
    return [Intruders(full=full, runs={run: in_order[run] for run in order}, losses=losses, repairs=lora)]


def _sorted(rows: Rows, names: set[str]) -> Rows:
    return sorted((row for row in rows if row["name"] in names), key=lambda row: str(row["name"]))
