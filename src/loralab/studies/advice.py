"""The first words of a report: one configuration that was trained and scored as a whole, beside the default.

Several studies of one model and data add up to a choice only where their arms met the same rows for
as many steps. What else they propose has not been trained together: these are candidates.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.studies.catalog import RECOMMEND
from loralab.studies.commands import apply_command, flat, search_command
from loralab.studies.compare import Comparison
from loralab.studies.evidence import Metric, by_arm, by_key, means_of, metric_of, parameters
from loralab.studies.fields import configured
from loralab.studies.message import Message, sentences
from loralab.studies.ranking import FLOOR, ranked
from loralab.studies.section import Section
from loralab.studies.study import Record, StudySetup

RATE = "learning_rate"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommendation of the studies of one model and data.

    Attributes:
        sentence: the recommended arm and the default with their scores; None where no arm has one.
        is_decided: whether that arm is good enough with probability SURE.
        decide: where it is not, the command that would decide it, if one is known to.
        command: trains the recommended arm; empty where none is.
        candidates: (study, its number, fields, its answer) of each study that proposes something else.
        search: the command that trains configurations beside the default.
    """

    setup: StudySetup
    sentence: Message | None
    is_decided: bool
    decide: str
    command: str
    candidates: Sequence[tuple[str, str, str, Message]]
    search: str

    @property
    def verdict(self) -> str:
        """Return it as marks are named; empty where no arm is to be taken."""
        return "" if not self.command else "decided" if self.is_decided else "undecided"

    @property
    def title(self) -> Message:
        """Return the heading."""
        titles = {"decided": "page.recommended", "undecided": "page.not_decided", "": "page.none_recommended"}
        return Message(titles[self.verdict], model=self.setup.model, data=self.setup.data)


def grouped(sections: Sequence[Section]) -> list[list[Section]]:
    """Return the sections that stand on the same model and data, if any of them gives advice."""
    groups = by_key(sections, lambda each: (each.setup.model, each.setup.data)).values()
    return [group for group in groups if any(s.answer.advice or s.answer.ranking for s in group)]


def advised(group: Sequence[Section]) -> Advice:
    """Return the recommended arm of some studies of one model and data, and what else they propose."""
    setup, found = group[0].setup, _compared(group)
    chosen = None if found is None else _chosen(found, searched=group[0].name == RECOMMEND)
    runs: Sequence[Record] = () if found is None or chosen is None else found.arms[chosen]
    fields = dict(runs[0].arm.fields) if runs else {}
    if runs and runs[0].rate:
        fields[RATE] = runs[0].rate
    return Advice(
        setup=setup,
        sentence=None if found is None else _sentence(found, chosen),
        is_decided=found is None or chosen is None or found.ranking.is_sure(chosen),
        decide=next((each.decide for each in group if each.decide), ""),
        command=apply_command(setup, fields, runs),
        candidates=_candidates(group, fields),
        search=search_command(setup),
    )


def _compared(group: Sequence[Section]) -> Comparison | None:
    """Compare all arms of the studies that met the same rows for as many steps; the largest such family."""
    families = by_key(group, lambda each: _met(each.setup)).values()
    family = max(families, key=lambda family: sum(len(_able(each)) for each in family))
    records = [record for each in family for record in each.records]
    metric = metric_of(records, family[0].setup)
    if len(family) == 1 and (arms := _able(family[0])):
        ranking = family[0].answer.ranking
        return Comparison(every=by_arm(records), arms=arms, metric=metric, ranking=ranking)
    return _joined(family, metric)


def _met(setup: StudySetup) -> str:
    """Return what the arms of studies must share to have met the same rows for as many steps."""
    same = [setup.fields, setup.rows, setup.mapping, setup.metric, setup.quick]
    return json.dumps(same, sort_keys=True, default=list)


def _joined(family: Sequence[Section], metric: Metric) -> Comparison | None:
    """Compare the arms of several studies; of those that are one configuration, the one of most runs stands."""
    arms: dict[str, tuple[str, Sequence[Record]]] = {}
    floor: dict[str, Sequence[Record]] = {}
    for each in family:
        floor |= {name: own for name, own in by_arm(each.records).items() if name == FLOOR}
        for name, own in _able(each).items():
            key = json.dumps([own[0].arm.fields, own[0].rate], sort_keys=True, default=list)
            if key not in arms or len(own) > len(arms[key][1]):
                arms[key] = (f"{name} ({each.label})", own)
    if not arms:
        return None
    able = dict(arms.values())
    return Comparison(every={**able, **floor}, arms=able, metric=metric, ranking=ranked(able, metric, floor))


def _able(section: Section) -> dict[str, list[Record]]:
    """Return the runs of the arms that a study could recommend."""
    names = section.answer.ranking.names if section.answer.ranking else ()
    return {name: runs for name, runs in by_arm(section.records).items() if name in names}


def _default(found: Comparison) -> str | None:
    """Return the arm that is the default configuration, at whatever rate; None where no arm is."""
    usual = configured({})
    fields = {name: {k: v for k, v in runs[0].arm.fields.items() if k != RATE} for name, runs in found.arms.items()}
    return next((name for name, own in fields.items() if configured(own) == usual), None)


def _chosen(found: Comparison, *, searched: bool) -> str | None:
    """Return the arm to recommend; the default, unless one is shown to be better, or as good at less cost.

    Args:
        searched: a search has weighed the default already.
    """
    name, default = found.ranking.recommended, _default(found)
    if name is None or name not in found.arms:
        return None
    if searched or default in (None, name):
        return name
    verdict = found.ranking.contrast(name, default).verdict
    cheaper = parameters(found.arms[name]) < parameters(found.arms[default])
    return name if verdict == "better" or (verdict == "equivalent" and cheaper) else default


def _sentence(found: Comparison, chosen: str | None) -> Message:
    """Say the score and the costs of what is recommended, and those of the default on the same rows."""
    if chosen is None:
        return Message("ranking.nothing")
    costs = means_of(found.arms[chosen], ("step_seconds", "peak_bytes", "file_bytes"))
    score, default = found.metric.scored(found.arms[chosen]), _default(found)
    ranking = found.ranking
    risk = {"probability": ranking.best[chosen], "regret": found.metric.change(ranking.regret[chosen])}
    whole = Message("page.whole", arm=chosen, metric=found.metric.text, score=score, **risk, **costs)
    if not ranking.is_sure(chosen):
        whole = sentences(Message("page.kept" if chosen == default else "page.open"), whole)
    if default is None:
        return sentences(whole, Message("page.no_default"))
    if chosen == default:
        rival = ranking.recommended  # risks less than the default, though that is not shown
        risk_less = None if rival is None or rival == default else found.claim(rival, default).sentence
        return sentences(whole, Message("page.default_stands"), risk_less)
    beside = Message("page.default", arm=default, score=found.metric.scored(found.arms[default]))
    return sentences(whole, beside, found.claim(chosen, default).sentence)


def _candidates(group: Sequence[Section], fields: Mapping[str, Any]) -> list[tuple[str, str, str, Message]]:
    """Return what each of several studies proposes that the recommended arm does not have."""
    found = []
    for each in group if len(group) > 1 else ():  # what a single one proposes was trained as a whole
        others = {k: v for k, v in each.answer.advice.items() if fields.get(k) != v}
        if others:
            shown = ", ".join(f"{name} = {flat(value)}" for name, value in others.items())
            found.append((each.name, each.label, shown, each.answer.sentence))
    return found
