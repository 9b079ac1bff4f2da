"""Every kind, in one place.

The kinds stand on encode.py, forward.py and score.py, which ask for them by name in turn; so they
are imported when the first one is asked for.
"""

from collections.abc import Mapping
from functools import cache

from loralab.errors import ConfigError, join_limited, nearest
from loralab.tasks.kinds.kind import Kind


@cache
def kinds() -> Mapping[str, Kind]:
    """Return all kinds by name; of those that learn from rows of a format, the usual one comes first."""
    from loralab.tasks.kinds.causal import Causal
    from loralab.tasks.kinds.classifier import Classifier
    from loralab.tasks.kinds.image_text import ImageText
    from loralab.tasks.kinds.images import Images
    from loralab.tasks.kinds.multi_label import MultiLabel
    from loralab.tasks.kinds.pairs import Pairs
    from loralab.tasks.kinds.regression import Regression
    from loralab.tasks.kinds.reranker import Reranker
    from loralab.tasks.kinds.scored_pairs import ScoredPairs
    from loralab.tasks.kinds.seq2seq import Seq2Seq
    from loralab.tasks.kinds.tagger import Tagger

    languages: tuple[Kind, ...] = (Causal(), Classifier(), Seq2Seq(), ImageText())
    numbers: tuple[Kind, ...] = (ScoredPairs(), Regression(), Reranker())
    every = (*languages, Tagger(), Pairs(), MultiLabel(), *numbers, Images())
    return {kind.name: kind for kind in every}


def kind_named(name: str) -> Kind:
    """Return the kind of a name.

    Raises:
        ConfigError: there is none.
    """
    found = kinds().get(name)
    if found is None:
        raise ConfigError(
            f"unknown kind of model {name!r} ({join_limited(kinds())}){nearest(name, kinds())}",
            code="unknown_kind",
            field="kind",
        )
    return found


def kinds_for(data_format: str) -> list[Kind]:
    """Return the kinds that learn from rows of a format, the usual one first."""
    return [kind for kind in kinds().values() if data_format in kind.formats]
