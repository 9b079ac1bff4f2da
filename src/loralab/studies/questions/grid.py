"""A study of the user's own: any fields of train as lists, every combination an arm."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import by_arm, metric_of, own_interval, scores_table
from loralab.studies.ranking import claims, ranked, recommendation
from loralab.studies.study import Answer, Arm, Ground, Record, Text
from loralab.studies.trained import BASE, MEASURE

__all__ = ["MEASURE", "arms", "conclude"]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """A grid brings its arms along."""
    raise ConfigError(f"the study {ground.study!r} has no arms of its own")


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """Return the cheapest arm that is good enough, and every pair of arms."""
    everything = by_arm(records)
    found = {name: own for name, own in everything.items() if name != BASE}
    if not found:
        return Answer(sentence=Text("No arm has been measured yet.", "還沒有任何組別的結果。"))
    metric = metric_of(records, ground)
    ranking = ranked(found, metric, {BASE: everything.get(BASE, ())})
    rows = []
    for name, own in found.items():
        interval = own_interval(own)
        rows.append({"arm": name, "value": interval.mean, "low": interval.low, "high": interval.high})
    return Answer(
        sentence=recommendation(ranking, found, metric),
        ranking=ranking,
        findings=claims(ranking, metric),
        tables=[scores_table(everything, metric)],
        figures=[
            figures.intervals(
                ground.study,
                Text("Score of every arm", "各組分數"),
                rows,
                x=Text("arm", "組別"),
                y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"),
                percent=metric.rises,
            )
        ],
        advice=_fields(found, ranking.recommended),
        next=Text("Add seeds to the arms that are not decided.", "替尚未分出高下的組別增加隨機種子。"),
    )


def _fields(arms: Mapping[str, Sequence[Record]], name: str | None) -> dict[str, Any]:
    """What the recommended arm sets; its rate is searched for again where it is used."""
    return {} if name is None else {k: v for k, v in arms[name][0].arm.fields.items() if k != "learning_rate"}
