"""The shortest road from data to a good configuration: successive halving over many of them.

Jamieson and Talwalkar 2016, arXiv:1502.07943: all candidates train a ninth of the steps, the best
third of them a third, the best third of those all of them. What is left is scored on test rows that
chose nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loralab.adapters.attach import attach
from loralab.errors import InputError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import (
    against,
    best_arm,
    by_arm,
    claim,
    mean_of,
    metric_of,
    own_interval,
    paired,
    scores_table,
)
from loralab.studies.fields import configured
from loralab.studies.search import SEARCH, Each, Obtain, in_turn, rounded, usual
from loralab.studies.study import DONE, Answer, Arm, Cell, Ground, Record, Table, Text
from loralab.studies.trained import MEASURE
from loralab.training.preflight import with_head

__all__ = ["MEASURE", "arms", "conclude", "walk"]
ETA = 3  # of the candidates one in so many goes on, for so many times the steps
ROUNDS = 3
FIRST = "lora, r=8, all-linear"  # always a candidate: what one would take without looking
RANKS, TARGETS = (2, 4, 8, 16, 32), ("attention", "all-linear")
RATES = (1.0, 10**0.5, 10.0)  # times the method's usual one
SHAPES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    *((f"lora, r={r}, {t}", {"method": "lora", "rank": r, "target_modules": t})
      for t in TARGETS for r in RANKS),
    *((f"rslora, r={r}, all-linear", {"method": "rslora", "rank": r}) for r in (8, 32)),
    *((f"dora, r={r}, all-linear", {"method": "dora", "rank": r}) for r in (8,)),
    *((f"pfeiffer, {w}", {"method": "pfeiffer", "width": w}) for w in (16, 64)),
)  # fmt: skip
BASE = "base"
BASE_ARM = Arm(name=BASE, options={"measure": "loralab.studies.trained:untrained"}, tuned=False, plain=True)


def arms(ground: Ground, base: Base) -> list[Arm]:
    """As many candidates as `ground.values` says, drawn from all that this model can have."""
    number = int(ground.values[0]) if ground.values else ETA ** (ROUNDS - 1)
    able = [(name, fields) for name, fields in SHAPES if _possible(ground, fields, base)]
    every = [with_factor(ground, Arm(name=name, fields=fields), factor) for name, fields in able for factor in RATES]
    certain = [arm for arm in every if arm.name.startswith(FIRST)]
    others = [arm for arm in every if arm not in certain]
    order = np.random.default_rng(0).permutation(len(others))
    chosen = [*certain, *(others[i] for i in order)][:number]
    return [*chosen, BASE_ARM]


def walk(ground: Ground, candidates: Sequence[Arm], obtain: Obtain, each: Each = in_turn) -> list[Record]:
    """Two rounds of short runs by validation loss, then whole runs with every seed."""
    left = [arm for arm in candidates if arm.name != BASE]
    found: list[Record] = []
    for number in range(ROUNDS - 1):
        cells = [_short(ground, arm, _steps(ground, number)) for arm in left]
        ran = list(zip(left, each(obtain, cells), strict=True))
        found += [_of_round(arm, record, number) for arm, record in ran]
        ended = [(loss_of(record), i) for i, (_, record) in enumerate(ran)]
        ranked = sorted(pair for pair in ended if math.isfinite(pair[0]))
        left = [left[i] for _, i in ranked[: max(1, len(left) // ETA)]]
    whole = [
        Cell(measure=MEASURE, ground=ground, arm=arm, seed=seed)
        for seed, arm in itertools.product(range(ground.seeds), left)
    ]
    ended_runs = zip(whole, each(obtain, whole), strict=True)
    found += [_renamed(record, cell.arm) for cell, record in ended_runs]
    for arm in (arm for arm in candidates if arm.name == BASE):
        measure = str(arm.options["measure"])
        found.append(obtain(Cell(measure=measure, ground=ground, arm=arm, seed=0)))
    return found


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The best of the finalists, and which of the others it is not known to beat."""
    rounds = [r for r in records if "round" in r.numbers]
    finals = by_arm(r for r in records if "round" not in r.numbers)
    trained = {name: own for name, own in finals.items() if name != BASE}
    if not trained:
        return Answer(
            sentence=Text("No configuration was trained to its end.", "還沒有任何設定訓練完成。"),
            tables=[_rounds_table(rounds)] if rounds else [],
        )
    metric = metric_of(records)
    best = best_arm(trained, metric)
    findings = [claim(best, name, value.turned, metric) for name, value in against(trained, best).items()]
    if BASE in finals and (gain := paired(trained[best], finals[BASE])):
        findings.insert(0, claim(best, "base", gain, metric))
    tied = sum(not f.holds for f in findings[1:])
    score, seen = metric.value(mean_of(trained[best], "score")), len({r.arm.name for r in rounds})
    rows = []
    for name, own in finals.items():
        interval = own_interval(own)
        rows.append({"arm": name, "value": interval.mean, "low": interval.low, "high": interval.high})
    return Answer(
        sentence=Text(
            f"Of {seen} configurations {best} came out best: test {metric.text.en} {score}."
            + (f" {tied} other finalists are not worse beyond noise." if tied else ""),
            f"{seen} 個設定中，{best} 最好：測試{metric.text.zh} {score}。"
            + (f"另有 {tied} 個進入最後一輪的設定並沒有以超出雜訊的幅度輸給它。" if tied else ""),
        ),
        findings=findings, tables=[scores_table(finals, metric), _rounds_table(rounds)],
        figures=[figures.intervals(
            "recommend", Text("The finalists on test rows that chose nothing",
                              "進入最後一輪的設定，以未參與選擇的測試資料評分"),
            rows, x=Text("configuration", "設定"),
            y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"), percent=metric.rises,
        )],
        method=Text(
            "Successive halving: every candidate trains a ninth of the steps, the third with the "
            "lowest validation loss a third of them, the best third of those all of them. Each "
            "length has a schedule of its own.",
            "連續減半法：每個候選設定先訓練九分之一的步數，驗證損失最低的三分之一再訓練三分之一，"
            "其中最好的三分之一訓練到底。每一輪都有自己的學習率排程。",
        ),
        caution=Text("Short runs favour what learns fast; a larger budget gives slow starters a "
                     "chance.", "短訓練偏好學得快的設定；預算更多時，起步慢的設定才有機會。"),
        advice=dict(trained[best][0].arm.fields),
        next=Text("Give the finalists more seeds.", "替最後一輪的設定增加隨機種子。"),
    )  # fmt: skip


def plan_for(seconds_per_step: float, overhead: float, budget: float, steps: int, seeds: int) -> tuple[int, int]:
    """(candidates, steps) that fit a budget: as many groups of nine as there is time for.

    With less time than one group needs, the runs become shorter, down to a quarter.
    """
    group = ETA ** (ROUNDS - 1)

    def cost(groups: int, length: int) -> float:
        runs = group + group // ETA + seeds
        return groups * ((ROUNDS - 1 + seeds) * length * seconds_per_step + runs * overhead)

    groups = max(1, int(budget // cost(1, steps)))
    most = len(SHAPES) * len(RATES) // group
    while steps > 8 and cost(1, steps) > budget:
        steps = int(steps * 0.8)
    return min(groups, most) * group, steps


def with_factor(ground: Ground, shape: Arm, factor: float) -> Arm:
    """A candidate: a shape at so many times its usual learning rate."""
    rate = rounded(usual(ground, shape) * factor)
    fields = {**shape.fields, "learning_rate": rate}
    return Arm(name=f"{shape.name}, {rate:.1e}", fields=fields)


def first_round(ground: Ground, arm: Arm) -> Cell:
    """What every candidate runs."""
    return _short(ground, arm, _steps(ground, 0))


def _possible(ground: Ground, fields: Mapping[str, Any], base: Base) -> bool:
    try:
        method, _ = configured({**ground.fields, **fields})
        attach(base.model, with_head(method, base)).detach()
    except InputError:
        return False
    return True


def _steps(ground: Ground, number: int) -> int:
    """The steps of a round; the first one is number 0."""
    return max(2, int(ground.fields["max_steps"]) // ETA ** (ROUNDS - 1 - number))


def _short(ground: Ground, arm: Arm, steps: int) -> Cell:
    short = Arm(name=arm.name, fields={**arm.fields, "max_steps": steps})
    return Cell(measure=SEARCH, ground=ground, arm=short, seed=0)


def loss_of(record: Record) -> float:
    """What candidates are compared by; infinite where a run gave none."""
    return record.numbers.get("validation_loss", math.inf) if record.status == DONE else math.inf


def _of_round(arm: Arm, record: Record, number: int) -> Record:
    return Record(**{**vars(record), "arm": arm, "numbers": {**record.numbers, "round": number + 1}})


def _renamed(record: Record, arm: Arm) -> Record:
    rate = arm.fields.get("learning_rate")
    return Record(**{**vars(record), "arm": arm, "rate": rate})


def _rounds_table(rounds: Sequence[Record]) -> Table:
    """Every candidate's validation loss in each round, the best first."""
    names = list(dict.fromkeys(r.arm.name for r in rounds))
    losses = {(r.arm.name, int(r.numbers["round"])): loss_of(r) for r in rounds}
    names.sort(
        key=lambda n: (
            [-(losses.get((n, k), math.inf) < math.inf) for k in (2, 1)]
            + [losses.get((n, 2), losses.get((n, 1), math.inf))]
        )
    )
    rows = [[name, *(_shown(losses.get((name, k))) for k in range(1, ROUNDS))] for name in names]
    return Table(
        title=Text("All candidates, by validation loss", "所有候選設定（依驗證損失）"),
        columns=(Text("configuration", "設定"), Text("a ninth of the steps", "九分之一步數"),
                 Text("a third of the steps", "三分之一步數")),
        rows=rows,
    )  # fmt: skip


def _shown(loss: float | None) -> Text | str:
    if loss is None:
        return "–"
    return f"{loss:.4f}" if math.isfinite(loss) else Text("diverged", "發散")
