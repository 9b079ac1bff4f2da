"""A trained adapter cut to smaller ranks by SVD, and scored again without training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loralab.adapters.adapter import Adapter
from loralab.adapters.spectrum import decompose
from loralab.studies.evidence import Metric, mean_of
from loralab.studies.measures.layers import low_rank
from loralab.studies.message import Chart, Message
from loralab.studies.statistics import difference
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, items_of, score_on, scored, trained

MEASURE_CUTS = "loralab.studies.measures.cuts:measure"
CUTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
CUT = "cut "  # of the names under which a record holds the items of each cut


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train and score; then score every cut."""
    run = trained(trial, folder, tell)
    found = {}
    whole = factors(run.adapter)
    for rank in (r for r in CUTS if r < trial.arm.fields["rank"]):
        put(run.adapter, {name: truncated(A, B, rank) for name, (A, B) in whole.items()})
        found[f"{CUT}{rank}"] = items_of(score_on(run, "test"))
    put(run.adapter, whole)
    record = scored(trial, run, folder)
    return replace(record, items={**record.items, **found})


def factors(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every low-rank update."""
    return {name: (m.lora_A.detach().clone(), m.lora_B.detach().clone()) for name, m in low_rank(adapter).items()}


def truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest update of a smaller rank, in factors of the old shapes filled up with zeros."""
    left, values, right = decompose(A, B)
    count = min(rank, len(values))
    new_a, new_b = torch.zeros_like(A), torch.zeros_like(B)
    new_b[:, :count] = left[:, :count] * values[:count]
    new_a[:count] = right[:, :count].T
    return new_a, new_b


@torch.no_grad()
def put(adapter: Adapter, new: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Fill the adapter with other factors."""
    for name, (A, B) in new.items():
        module = adapter.modules[name]
        module.lora_A.copy_(A)
        module.lora_B.copy_(B)


def kept_at(records: Sequence[Record], metric: Metric) -> int | None:
    """Return the smallest cut that is shown to keep the score, within the margin; None if none is."""
    cuts = _cuts(records)
    for rank in cuts:
        found = difference(
            [r.items[f"{CUT}{rank}"] for r in records],
            [r.items["score"] for r in records],
            margin=metric.margin_at(abs(mean_of(records, "score"))),
        )
        if found.verdict in ("equivalent", "better"):
            return rank
    return None


def cut_figure(records: Sequence[Record], metric: Metric) -> list[Chart]:
    """Return the score of every cut against its rank."""
    cuts = _cuts(records)
    if not cuts:
        return []
    sign = 1 if metric.rises else -1
    whole = sign * float(np.mean([np.mean(r.items["score"]) for r in records]))
    rows = []
    for rank in cuts:
        items = np.asarray([r.items[f"{CUT}{rank}"] for r in records], dtype=float).mean(axis=0)
        mean, half = sign * float(items.mean()), 1.96 * float(items.std(ddof=1)) / len(items) ** 0.5
        rows.append({"arm": f"r={rank}", "x": rank, "value": mean, "low": mean - half, "high": mean + half})
    title, x, y = Message("rank.cut_chart"), Message("rank.rank_kept"), Message("axis.score", metric=metric.text)
    options = {"log": True, "chance": whole, "percent": metric.rises}
    return [Chart("intervals", "rank-cut", title, rows, x, y, options=options)]


def _cuts(records: Sequence[Record]) -> list[int]:
    shared = set.intersection(*({k for k in r.items if k.startswith(CUT)} for r in records))
    return sorted(int(name.removeprefix(CUT)) for name in shared)
