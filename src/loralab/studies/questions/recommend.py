"""The shortest road from data to a good configuration: many of them, halved again and again (halving.py).

Validation rows choose, and what is chosen is shown beside the default on test rows that chose nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from loralab.models.load import Base
from loralab.studies import halving
from loralab.studies.compare import Comparison, compare_arms, score_chart
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import Metric, by_arm, by_key
from loralab.studies.message import Message, Table, sentences, table
from loralab.studies.prepare import reason_invalid
from loralab.studies.ranking import LIKELY, ranked
from loralab.studies.rates import loss_of
from loralab.studies.study import Answer, Arm, Record, StudySetup
from loralab.studies.trained import BASE, BASE_ARM

DEFAULT, ROUNDS = halving.DEFAULT, halving.ROUNDS
walk = halving.walk  # which trials come next is decided on the way (search.py)


def arms(setup: StudySetup, base: Base) -> list[Arm]:
    """Return as many candidates as `setup.values` says, drawn from all that this model can have."""
    number = int(setup.values[0]) if setup.values else halving.ETA ** (ROUNDS - 1)
    shapes = [Arm(name=name, fields=fields) for name, fields in halving.SHAPES]
    able = [shape for shape in shapes if not reason_invalid(setup, shape, base)]
    every = [halving.with_factor(setup, shape, factor) for shape in able for factor in halving.RATES]
    certain = [arm for arm in every if arm.name.startswith(halving.FIRST)]
    others = [arm for arm in every if arm not in certain]
    order = np.random.default_rng(0).permutation(len(others))
    chosen = [*certain, *(others[i] for i in order)][:number]
    return [BASE_ARM, halving.default_arm(setup), *chosen]


def conclude(records: Sequence[Record], setup: StudySetup) -> Answer:
    """Return the best of the finalists, beside the default, and which of the others it is not known to beat."""
    rounds = [r for r in records if "round" in r.numbers]
    found = compare_arms([r for r in records if "round" not in r.numbers], setup)
    if found is None:
        return Answer(sentence=Message("recommend.nothing"), tables=[_rounds_table(rounds)])
    found = replace(found, ranking=_decided(found))
    chosen = found.ranking.recommended
    of = Message("recommend.of", count=len({r.arm.name for r in rounds}))
    return found.answer(
        sentence=sentences(of, found.recommendation, *_beside_default(found), _extrapolated(setup)),
        findings=[*found.over_base(list(found.arms)), *found.claims()],
        tables=[found.scores, _rounds_table(rounds)],
        figures=[score_chart("recommend", found.every, found.metric, "axis.configuration")],
        advice={} if chosen is None else dict(found.arms[chosen][0].arm.fields),
    )


def _decided(found: Comparison) -> Ranking:
    """Return the ranking on test rows with what the validation rows chose; nothing that has learnt nothing."""
    ranking, chosen = found.ranking, choose([r for own in found.arms.values() for r in own], found.metric)
    learnt = BASE not in ranking.means or ranking.contrast(chosen, BASE).verdict == "better"
    return replace(ranking, recommended=chosen if learnt else None)


def choose(records: Sequence[Record], metric: Metric) -> str:
    """Return the finalist of the least expected regret on validation rows, if it is likely to beat the default.

    Args:
        records: of at least one finalist.
    """
    arms_ = by_arm(halving.on_validation(records)) or by_arm(records)
    found = ranked(arms_, metric)
    best = min(found.names, key=lambda name: (found.regret[name], name != DEFAULT))
    if DEFAULT not in found.names or best == DEFAULT:
        return best
    return best if found.contrast(best, DEFAULT).likely >= LIKELY else DEFAULT


def _beside_default(found: Comparison) -> list[Message]:
    """Say what the default reaches on the same rows, where another configuration is recommended."""
    chosen = found.ranking.recommended
    if DEFAULT not in found.arms or chosen in (None, DEFAULT):
        return []
    return [Message("recommend.default", score=found.score(DEFAULT)), found.claim(chosen, DEFAULT).sentence]


def _extrapolated(setup: StudySetup) -> Message | None:
    """Say that runs were shorter than the one which is recommended, where they were."""
    steps = int(setup.fields["max_steps"])
    whole = int(setup.values[1]) if len(setup.values) > 1 else steps
    return None if steps >= whole else Message("recommend.extrapolated", steps=steps, whole=whole)


def _rounds_table(rounds: Sequence[Record]) -> Table:
    """Return every candidate's validation loss in each round, the best first."""
    runs = by_key(rounds, lambda r: r.arm.name)
    losses = {name: {int(r.numbers["round"]): loss_of(r) for r in own} for name, own in runs.items()}
    # those that went furthest first
    names = sorted(losses, key=lambda name: [losses[name].get(n, math.inf) for n in range(ROUNDS - 1, 0, -1)])
    lost = Message("recommend.diverged")
    rows = [
        {"arm": name, **{f"round_{n}": loss if math.isfinite(loss) else lost for n, loss in losses[name].items()}}
        for name in names
    ]
    return table("recommend.rounds", rows, "arm::axis.configuration", "round_1:.4f", "round_2:.4f")
