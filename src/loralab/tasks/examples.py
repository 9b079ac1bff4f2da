"""Encoded rows: what the models are trained and scored on."""

from dataclasses import dataclass
from typing import Any

IGNORED = -100
Ids = tuple[int, ...]
Labels = tuple[float, ...]  # whole numbers, but where amounts are learnt


@dataclass(frozen=True, slots=True)
class Example:
    """A row as numbers, or one answer of it: several examples may have the same `row`.

    `labels` are as long as `input_ids` for a causal model (unshifted) and for tags of words, -100
    where no loss is taken; for a classifier they are the one class index, for a pair the row
    itself. `token_types` tell the two texts of a classified pair apart, where the tokenizer does;
    `second` is the other text of a pair to encode; `words` are those that the labels of tags
    belong to, where they are not -100; `image` a picture (pictures.py), not decoded.
    """

    row: int
    input_ids: Ids
    labels: Labels
    token_types: Ids = ()
    second: Ids = ()
    words: Ids = ()
    image: Any = None

    @property
    def texts(self) -> tuple[Ids, ...]:
        """Return the ids of each text."""
        return self.input_ids, self.second

    @property
    def length(self) -> int:
        """Return the tokens of all texts; a picture counts as one."""
        return len(self.input_ids) + len(self.second) or 1


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples of a split; rows whose answer did not fit at all, or lost its end.

    `notes` say what else of the rows is not learnt, a line each.
    """

    examples: list[Example]
    dropped: Ids = ()
    shortened: Ids = ()
    notes: tuple[str, ...] = ()
