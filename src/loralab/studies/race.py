"""Seeds go where they decide: which arms of a study get one more."""

from collections.abc import Sequence

from loralab.studies.evidence import by_arm, metric_of
from loralab.studies.ranking import leader, ranked
from loralab.studies.study import Record, StudySetup

POSSIBLE = 0.05  # an arm that is good enough with less probability is out of the race
WORTH = 0.5  # seed noise below this share of the noise of test rows decides nothing


def contenders(records: Sequence[Record], setup: StudySetup) -> list[str]:
    """Return the arms that can still be the best; none once that is decided, or seeds cannot decide it.

    At most as many runs are added as the study began with.
    """
    arms = {name: own for name, own in by_arm(records).items() if not own[0].arm.plain}
    runs, began = sum(map(len, arms.values())), setup.seeds * len(arms)
    if len(arms) < 2 or runs >= 2 * began:
        return []
    found = ranked(arms, metric_of(records, setup))
    if found.decided:
        return []
    able = [name for name in found.names if found.good[name] >= POSSIBLE]
    first = leader(found)
    pairs = [found.contrast(first, name) for name in able if name != first]
    return able if any(pair.of_seeds > WORTH * pair.of_rows for pair in pairs) else []
