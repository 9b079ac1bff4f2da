"""A study of the user's own: any fields of train as lists, every combination an arm."""

from collections.abc import Sequence

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies import figures
from loralab.studies.evidence import against, best_arm, by_arm, claim, mean_of, metric_of, own_interval, scores_table
from loralab.studies.study import Answer, Arm, Ground, Record, Text
from loralab.studies.trained import MEASURE

__all__ = ["MEASURE", "arms", "conclude"]


def arms(ground: Ground, base: Base) -> list[Arm]:
    """A grid brings its arms along."""
    raise ConfigError(f"the study {ground.study!r} has no arms of its own")


def conclude(records: Sequence[Record], ground: Ground) -> Answer:
    """The best arm against every other one."""
    found = by_arm(records)
    if not found:
        return Answer(sentence=Text("No arm has been measured yet.", "還沒有任何組別的結果。"))
    metric = metric_of(records)
    best = best_arm(found, metric)
    others = against(found, best)
    findings = [claim(name, best, value, metric) for name, value in others.items()]
    beaten = [f for f in findings if f.holds]
    score = metric.value(mean_of(found[best], "score"))
    clear = len(beaten) == len(findings)
    sentence = Text(
        f"{best} has the best score ({score}); it beats {len(beaten)} of {len(findings)} other arms beyond noise.",
        f"{best} 分數最高（{score}）；其他 {len(findings)} 組中，有 {len(beaten)} 組被它以超出雜訊的幅度勝過。",
    )
    rows = []
    for name, own in found.items():
        interval = own_interval(own)
        rows.append({"arm": name, "value": interval.mean, "low": interval.low,
                     "high": interval.high})  # fmt: skip
    return Answer(
        sentence=sentence, findings=findings, tables=[scores_table(found, metric)],
        figures=[figures.intervals(
            ground.study, Text("Score of every arm", "各組分數"), rows, x=Text("arm", "組別"),
            y=Text(f"test {metric.text.en}", f"測試{metric.text.zh}"), percent=metric.rises,
        )],
        advice={k: v for k, v in found[best][0].arm.fields.items() if k != "learning_rate"}
        if clear and findings else {},
        next=Text("Add seeds to the arms that the best one does not beat.",
                  "替尚未分出高下的組別增加隨機種子。"),
    )  # fmt: skip
