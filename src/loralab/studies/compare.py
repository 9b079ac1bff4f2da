"""compare_arms(): the conclusion that most questions share; a question adds what is its own."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.studies import evidence
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import COMMONEST, Metric, by_arm, by_key, claim, commonest, mean_of, metric_of
from loralab.studies.message import Chart, Message, Table, chart, sentences
from loralab.studies.ranking import FLOOR, Arms, ranked
from loralab.studies.study import Answer, Finding, Record, StudySetup


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The arms of a study side by side.

    Attributes:
        every: all arms that have a score.
        arms: those that can be recommended; the others, such as the untrained base, cannot.
    """

    every: Arms
    arms: Arms
    metric: Metric
    ranking: Ranking

    @property
    def recommendation(self) -> Message:
        """Say what to take, how sure that is, and what would decide it where it is not."""
        found, name = self.ranking, self.ranking.recommended
        if name is None:
            return Message("ranking.nothing" if COMMONEST not in found.means else "ranking.nothing_learnt")
        facts = Message(
            "ranking.facts",
            arm=name,
            score=self.score(name),
            parameters=evidence.parameters(self.arms[name]),
            probability=found.best[name],
            regret=self.metric.change(found.regret[name]),
        )
        if found.decided:
            return Message("ranking.take", facts=facts)
        closest = found.closest_rival
        way = "seeds" if closest.asks_seeds else "rows" if closest.rows_needed is not None else "more"
        needed = {"seeds": closest.seeds_needed, "rows": closest.rows_needed, "rival": closest.b}
        return sentences(Message("ranking.open", facts=facts), Message(f"ranking.{way}_would_tell", **needed))

    @property
    def advice(self) -> dict[str, Any]:
        """Return the fields of the recommended arm; its rate is searched for again where it is used."""
        name = self.ranking.recommended
        fields = {} if name is None else self.arms[name][0].arm.fields
        return {key: value for key, value in fields.items() if key != "learning_rate"}

    def score(self, name: str) -> Message:
        """Return the mean score of an arm as it is written."""
        return self.metric.value(mean_of(self.every[name], "score"))

    def order(self, family: Arms) -> Message | None:
        """Say who leads some of the arms, to follow "at equal ..."; None where there are not two."""
        if len(family) < 2:
            return None
        names = [name for name in self.ranking.names if name in family]
        top = max(names, key=lambda name: self.ranking.means[name][0])
        rivals = (name for name in names if name != top)
        verdicts = by_key(rivals, lambda name: str(self.ranking.contrast(top, name).verdict))
        order = ("better", "equivalent", "undecided")
        parts = [Message(f"ranking.{verdict}", arms=own) for verdict in order if (own := verdicts.get(verdict))]
        return Message("ranking.leader", arm=top, score=self.score(top), parts=parts)

    def next_step(self, otherwise: str) -> Message:
        """Suggest seeds for the arms that are not decided; where all are, what a message says of the leader."""
        leader, rivals = self.ranking.leader, self.ranking.open_rivals
        return Message("ranking.add_seeds", arms=[leader, *rivals]) if rivals else Message(otherwise, arm=leader)

    def over_base(self, names: Sequence[str] | None = None) -> list[Finding]:
        """Compare some arms with what needs no training, the best of that; none is the cheapest alone."""
        means = self.ranking.means
        floor = max(
            (name for name in (FLOOR, COMMONEST) if name in means), key=lambda name: means[name][0], default=None
        )
        able = self.ranking.names[:1] if names is None else names
        return [] if floor is None else [self.claim(name, floor) for name in able]

    def claim(self, a: str, b: str) -> Finding:
        """Say how two arms differ."""
        return claim(self.ranking.contrast(a, b), self.metric)

    def claims(self, names: Iterable[str] | None = None) -> list[Finding]:
        """Compare every pair of some arms once, the better mean first; none is all that can be recommended."""
        means = self.ranking.means
        wanted = sorted(self.ranking.names if names is None else names, key=lambda name: -means[name][0])
        return [self.claim(a, b) for a, b in itertools.combinations(wanted, 2)]

    def chart(self, name: str, x: str, *, at: Callable[[str], float] | None = None, **options: Any) -> Chart:
        """Return the score of every arm with its interval.

        Args:
            at: the place of an arm on the axis, where arms are numbers.
        """
        return score_chart(name, self.arms, self.metric, x, at=at, **options)

    def facts(self, name: str) -> dict[str, Any]:
        """Return what tables and sentences tell of an arm."""
        return evidence.facts(name, self.every[name], self.metric)

    @property
    def scores(self) -> Table:
        """Return the table of all scores."""
        return evidence.scores_table(self.every, self.metric)

    def answer(self, **its_own: Any) -> Answer:
        """Return the answer, with a question's own parts in place of the usual ones, which are then not made."""
        usual: dict[str, Callable[[], Any]] = {
            "sentence": lambda: self.recommendation,
            "ranking": lambda: self.ranking,
            "findings": lambda: [*self.over_base(), *self.claims()],
            "tables": lambda: [self.scores],
            "advice": lambda: self.advice,
        }
        return Answer(**its_own, **{name: make() for name, make in usual.items() if name not in its_own})


def compare_arms(
    records: Sequence[Record],
    setup: StudySetup,
    *,
    aside: Sequence[str] = (FLOOR,),
    floor: str = FLOOR,
    cost: Mapping[str, float] | None = None,
) -> Comparison | None:
    """Compare all arms that have a score; None where there is none.

    Args:
        aside: arms that are compared, but never recommended.
        floor, cost: as in `ranked`.
    """
    every, metric = by_arm(records), metric_of(records, setup)
    arms = {name: own for name, own in every.items() if name not in aside}
    if not arms:
        return None
    others = {name: own for name, own in every.items() if name in aside} | commonest(records)
    ranking = ranked(arms, metric, others, floor=floor, cost=cost)
    return Comparison(every=every, arms=arms, metric=metric, ranking=ranking)


def score_chart(
    name: str, arms: Arms, metric: Metric, x: str, *, at: Callable[[str], float] | None = None, **options: Any
) -> Chart:
    """Return the scores of some arms with their intervals."""
    rows = []
    for arm, records in arms.items():
        value, low, high = evidence.own_interval(records)
        rows.append({"arm": arm, "value": value, "low": low, "high": high, **({} if at is None else {"x": at(arm)})})
    y = Message("axis.score", metric=metric.text)
    return chart("intervals", name, f"{name}.chart", rows, x, y, percent=metric.rises, **options)
