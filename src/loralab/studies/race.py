"""Seeds go where they decide: rules that say, from the records so far, which arms get one more."""

from collections.abc import Collection, Sequence

from loralab.studies.contrast import Ranking
from loralab.studies.evidence import by_arm, metric_of
from loralab.studies.ranking import leader, ranked
from loralab.studies.study import Record, StudySetup

POSSIBLE = 0.05  # an arm that is good enough with less probability is out of the race
WORTH = 0.5  # seed noise below this share of the noise of test rows decides nothing


def possible_best(found: Ranking, always: Collection[str] = ()) -> list[str]:
    """Return the arms that can still be the best, and those that stay always; none once it is decided."""
    if found.decided:
        return []
    return [name for name in found.names if found.good[name] >= POSSIBLE or name in always]


def contenders(records: Sequence[Record], setup: StudySetup) -> list[str]:
    """Return the arms that can still be the best; none once that is decided, or seeds cannot decide it.

    At most as many runs are added as the study began with.
    """
    arms = {name: own for name, own in by_arm(records).items() if not own[0].arm.plain}
    runs, began = sum(map(len, arms.values())), setup.seeds * len(arms)
    if len(arms) < 2 or runs >= 2 * began:
        return []
    found = ranked(arms, metric_of(records, setup))
    able, first = possible_best(found), leader(found)
    pairs = [found.contrast(first, name) for name in able if name != first]
    return able if any(pair.of_seeds > WORTH * pair.of_rows for pair in pairs) else []
