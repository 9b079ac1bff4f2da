"""Verdicts of a report as data: verdicts.json."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab import atomic
from loralab.studies.contrast import Ranking
from loralab.studies.evidence import by_arm, mean_of, metric_of
from loralab.studies.study import Answer, Record, StudySetup
from loralab.studies.wording import say

FILE, FORMAT = "verdicts.json", 1
CONTRAST = ("a", "b", "estimate", "low", "high", "verdict", "seeds")


def write(folder: Path, studies: Mapping[str, tuple[StudySetup, Sequence[Record], Answer]]) -> None:
    """Write the verdicts of every study that has some; those of a single one also at the top."""
    found = {
        name: {**(verdicts(answer.ranking, records, setup) if answer.ranking else {}), "claims": claims(answer)}
        for name, (setup, records, answer) in studies.items()
        if answer.ranking or claims(answer)
    }
    single = next(iter(found.values())) if len(found) == 1 else {}
    content = {"format": FORMAT, **single, "studies": found}
    atomic.write_file(folder / FILE, json.dumps(content, indent=1) + "\n")


def verdicts(found: Ranking, records: Sequence[Record], setup: StudySetup) -> dict[str, Any]:
    """Return what was recommended, every arm's score and every contrast.

    Scores and their intervals are in the metric's own sense; estimates of contrasts are positive
    where `a` is better.
    """
    arms, metric = by_arm(records), metric_of(records, setup)
    return {
        "metric": metric.name,
        "margin": found.margin,
        "recommended": _recommended(found, arms),
        "arms": [_arm(name, found, arms[name], 1 if metric.rises else -1) for name in found.means if name in arms],
        "contrasts": [{name: getattr(each, name) for name in CONTRAST} for each in found.contrasts],
    }


def claims(answer: Answer) -> list[dict[str, Any]]:
    """Return every claim of an answer that stands on a comparison, such as that one way forgets less."""
    return [
        {
            "claim": say(each.sentence, "en"),
            "verdict": each.verdict,
            **{name: _finite(getattr(each, name)) for name in ("effect", "low", "high")},
        }
        for each in answer.findings
        if each.verdict
    ]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _recommended(found: Ranking, arms: Mapping[str, Sequence[Record]]) -> dict[str, Any] | None:
    name = found.recommended
    if name is None:
        return None
    own = arms.get(name, ())
    return {
        "arm": name,
        "options": dict(own[0].arm.fields) if own else {},
        "learning_rate": own[0].rate if own else None,
        "expected_regret": found.regret[name],
        "probability_best": found.best[name],
        "probability_within_margin": found.good[name],
        "decided": found.decided,
    }


def _arm(name: str, found: Ranking, own: Sequence[Record], sign: int) -> dict[str, Any]:
    _, *ends = found.means[name]
    low, high = sorted(sign * end for end in ends)
    return {
        "name": name,
        "options": dict(own[0].arm.fields),
        "score": mean_of(own, "score"),
        "low": low,
        "high": high,
        "seeds": len(own),
        "rows": len(own[0].items["score"]),
        "probability_best": found.best.get(name),
        "expected_regret": found.regret.get(name),
    }
