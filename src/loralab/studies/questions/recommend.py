"""The shortest road from data to a good configuration: successive halving over many of them.

Jamieson and Talwalkar 2016, arXiv:1502.07943: all candidates train a ninth of the steps, the best
third of them a third, the best three of those all of them, as long as the user's own run. The
default configuration is always among these. They get seeds until the time is used or it is decided;
validation rows choose, and what is chosen is shown beside the default on test rows that chose nothing.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from loralab.adapters.attach import attach
from loralab.errors import InputError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.contrast import SURE, Ranking
from loralab.studies.evidence import Metric, by_arm, claim, mean_of, metric_of, own_interval, scores_table
from loralab.studies.fields import configured
from loralab.studies.race import POSSIBLE
from loralab.studies.ranking import claims, ranked, recommendation
from loralab.studies.search import SEARCH, Each, Obtain, in_turn, rounded, usual
from loralab.studies.study import DONE, MISSING, Answer, Arm, Cell, Ground, Record, Text
from loralab.studies.study import OldTable as Table
from loralab.studies.trained import BASE, BASE_ARM, MEASURE
from loralab.training.preflight import with_head

__all__ = ["MEASURE", "arms", "conclude", "walk"]
ETA = 3  # of the candidates one in so many goes on, for so many times the steps
ROUNDS = 3
DEFAULT, FINALISTS = "default", 3
LIKELY = 0.75  # probability of being better than the default, for what is recommended over it
FIRST = "lora, r=8, all-linear"  # always a candidate: what one would take without looking
RANKS, TARGETS = (2, 4, 8, 16, 32), ("attention", "all-linear")
RATES = (1.0, 10**0.5, 10.0)  # times the method's usual one
SHAPES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    *((f"lora, r={r}, {t}", {"method": "lora", "rank": r, "target_modules": t}) for t in TARGETS for r in RANKS),
    *((f"rslora, r={r}, all-linear", {"method": "rslora", "rank": r}) for r in (8, 32)),
    *((f"dora, r={r}, all-linear", {"method": "dora", "rank": r}) for r in (8,)),
    *((f"pfeiffer, {w}", {"method": "pfeiffer", "width": w}) for w in (16, 64)),
)


def arms(ground: Ground, base: Base) -> list[Arm]:
    """As many candidates as `ground.values` says, drawn from all that this model can have."""
    number = int(ground.values[0]) if ground.values else ETA ** (ROUNDS - 1)
    able = [(name, fields) for name, fields in SHAPES if _possible(ground, fields, base)]
    every = [with_factor(ground, Arm(name=name, fields=fields), factor) for name, fields in able for factor in RATES]
    certain = [arm for arm in every if arm.name.startswith(FIRST)]
    others = [arm for arm in every if arm not in certain]
    order = np.random.default_rng(0).permutation(len(others))
    chosen = [*certain, *(others[i] for i in order)][:number]
    return [BASE_ARM, default_arm(ground), *chosen]


def default_arm(ground: Ground) -> Arm:
    """What `loralab train` takes where nothing is chosen."""
    plain = Arm(name=DEFAULT, fields={"method": "lora"})
    return Arm(name=DEFAULT, fields={**plain.fields, "learning_rate": usual(ground, plain)})


def walk(ground: Ground, candidates: Sequence[Arm], obtain: Obtain, each: Each = in_turn) -> list[Record]:
    """Two rounds of short runs by validation loss, then whole runs with as many seeds as fit."""
    whole = {arm.name: arm for arm in candidates if arm.name in (BASE, DEFAULT)}
    left = [arm for arm in candidates if arm.name not in whole]
    if DEFAULT in whole:  # first of all: whatever the time is enough for, it is known
        obtain(Cell(measure=MEASURE, ground=ground, arm=whole[DEFAULT], seed=0))
    found: list[Record] = []
    for number in range(ROUNDS - 1):
        cells = [_short(ground, arm, _steps(ground, number)) for arm in left]
        ran = list(zip(left, each(obtain, cells), strict=True))
        found += [_of_round(arm, record, number) for arm, record in ran]
        ended = [(loss_of(record), i) for i, (_, record) in enumerate(ran)]
        ranked_ = sorted(pair for pair in ended if math.isfinite(pair[0]))
        keep = max(1, len(left) // ETA) if number < ROUNDS - 2 else FINALISTS
        left = _one_of_each_rate(ground, [left[i] for _, i in ranked_])[:keep]
    if BASE in whole:
        found.append(obtain(Cell(measure=str(BASE_ARM.options["measure"]), ground=ground, arm=whole[BASE], seed=0)))
    return found + _finals(ground, [*(whole[n] for n in (DEFAULT,) if n in whole), *left], obtain, each)


def _one_of_each_rate(ground: Ground, best_first: Sequence[Arm]) -> list[Arm]:
    """The candidates in turns over multiples of the usual rate: short runs favour rates that whole ones do not bear."""
    turns: dict[float, list[Arm]] = {}
    for arm in best_first:
        turns.setdefault(rounded(float(arm.fields["learning_rate"]) / usual(ground, arm)), []).append(arm)
    return [arm for turn in itertools.zip_longest(*turns.values()) for arm in turn if arm is not None]


def _finals(ground: Ground, arms_: Sequence[Arm], obtain: Obtain, each: Each) -> list[Record]:
    """Whole runs: `seeds` of every finalist, then more of those that can still be the best."""
    found: list[Record] = []
    for seed in range(max(ground.seeds, ground.seeds_max)):
        able = arms_ if seed < ground.seeds else [arm for arm in arms_ if arm.name in _possible_best(found)]
        cells = [Cell(measure=MEASURE, ground=ground, arm=arm, seed=seed) for arm in able]
        ran = [_renamed(record, cell.arm) for record, cell in zip(each(obtain, cells), cells, strict=True)]
        found += ran
        if not ran or any(record.status == MISSING for record in ran):
            break
    return found


def _possible_best(records: Sequence[Record]) -> list[str]:
    """The finalists between which it is not decided, the default among them; none once it is."""
    arms_ = by_arm(on_validation(records))
    if len(arms_) < 2:
        return []
    found = ranked(arms_, metric_of(records))
    return [] if found.decided else [n for n in found.names if found.good[n] >= POSSIBLE or n == DEFAULT]


def on_validation(records: Sequence[Record]) -> list[Record]:
    """The records with their scores on validation rows in place of those on test rows."""
    return [
        replace(
            r, items={"score": r.items["validation"]}, numbers={**r.numbers, "score": r.numbers["validation_score"]}
        )
        for r in records
        if r.items.get("validation") and "validation_score" in r.numbers
    ]


def choose(records: Sequence[Record], metric: Metric) -> str:
    """The finalist of the least expected regret on validation rows, if it is likely to beat the default.

    Args:
        records: of at least one finalist.
    """
    arms_ = by_arm(on_validation(records)) or by_arm(records)
    found = ranked(arms_, metric)
    best = min(found.names, key=lambda name: (found.regret[name], name != DEFAULT))
    if DEFAULT not in found.names or best == DEFAULT:
        return best
    gap = found.contrast(best, DEFAULT)
    error = math.hypot(gap.of_seeds, gap.of_rows)
    likely = stats.norm.cdf(gap.estimate / error) if error else float(gap.estimate > 0)
    return best if likely >= LIKELY else DEFAULT


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
    metric = metric_of(records, ground)
    chosen = choose([r for own in trained.values() for r in own], metric)
    found = ranked(trained, metric, {BASE: finals.get(BASE, ())})
    learnt = BASE not in finals or found.contrast(chosen, BASE).verdict == "better"
    found = replace(found, recommended=chosen if learnt else None, decided=learnt and found.good[chosen] >= SURE)
    floor = [claim(found.contrast(name, BASE), metric) for name in trained if BASE in finals]
    seen = len({r.arm.name for r in rounds})
    rows = []
    for name, own in finals.items():
        interval = own_interval(own)
        rows.append({"arm": name, "value": interval.mean, "low": interval.low, "high": interval.high})
    return Answer(
        sentence=Text(f"Of {seen} configurations:", f"{seen} 個設定中：")
        + recommendation(found, trained, metric)
        + _beside_default(found, trained, metric)
        + _extrapolated(ground),
        ranking=found,
        findings=[*floor, *claims(found, metric)],
        tables=[scores_table(finals, metric), _rounds_table(rounds)],
        figures=[
            figures.old(
                "intervals",
                "recommend",
                Text("The finalists on test rows that chose nothing", "進入最後一輪的設定，以未參與選擇的測試資料評分"),
                rows,
                x=Text("configuration", "設定"),
                y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
                percent=metric.rises,
            )
        ],
        method=Text(
            "Successive halving: every candidate trains a ninth of the steps, the third with the "
            "lowest validation loss a third of them, the best three all of them, beside the default. Each "
            "length has a schedule of its own. Validation rows choose; the scores shown are of test rows.",
            "連續減半法：每個候選設定先訓練九分之一的步數，驗證損失最低的三分之一再訓練三分之一，"
            "其中最好的三個與預設設定一起訓練到底。每一輪都有自己的學習率排程。由驗證資料選擇，分數則來自測試資料。",
        ),
        caution=Text(
            "Short runs favour what learns fast; a larger budget gives slow starters a chance.",
            "短訓練偏好學得快的設定；預算更多時，起步慢的設定才有機會。",
        ),
        advice=dict(trained[chosen][0].arm.fields) if learnt else {},
        next=Text("Give the finalists more seeds.", "替最後一輪的設定增加隨機種子。"),
    )


def _beside_default(found: Ranking, trained: Mapping[str, Sequence[Record]], metric: Metric) -> Text:
    """What the default reaches on the same rows."""
    if DEFAULT not in trained or found.recommended in (None, DEFAULT):
        return Text("", "")
    score = metric.value(mean_of(trained[DEFAULT], "score"))
    return Text(f"The default reaches {score} on the same rows.", f"預設設定在同一批資料上達到 {score}。")


def _extrapolated(ground: Ground) -> Text:
    """That runs were shorter than the one which is recommended."""
    steps = int(ground.fields["max_steps"])
    whole = int(ground.values[1]) if len(ground.values) > 1 else steps
    if steps >= whole:
        return Text("", "")
    return Text(
        f"Every run here took {steps} steps; the run that is recommended takes {whole}, which is an extrapolation.",
        f"這裡每次訓練 {steps} 步；建議的訓練為 {whole} 步，屬於外推。",
    )


def plan_for(seconds_per_step: float, overheads: tuple[float, float], budget: float, steps: int) -> tuple[int, int]:
    """(candidates, steps) that fit a budget: about half for the search, the rest for the finalists.

    Steps are cut, down to a quarter, only where the search and three whole runs do not fit; the
    search has three candidates where nine would take more than half of the time.

    Args:
        overheads: seconds beside the steps, of a short run and of a whole one.
    """
    short, full = overheads
    group = ETA ** (ROUNDS - 1)

    def search(length: int) -> float:
        return (ROUNDS - 1) * length * seconds_per_step + (group + group // ETA) * short

    least = max(8, steps // 4)
    while steps > least and search(steps) + 3 * (steps * seconds_per_step + full) > budget:
        steps = max(least, int(steps * 0.8))
    groups = int(budget / 2 // search(steps))
    most = len(SHAPES) * len(RATES) // group
    return max(ETA, min(groups, most) * group), steps


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
        columns=(
            Text("configuration", "設定"),
            Text("a ninth of the steps", "九分之一步數"),
            Text("a third of the steps", "三分之一步數"),
        ),
        rows=rows,
    )


def _shown(loss: float | None) -> Text | str:
    if loss is None:
        return "–"
    return f"{loss:.4f}" if math.isfinite(loss) else Text("diverged", "發散")
