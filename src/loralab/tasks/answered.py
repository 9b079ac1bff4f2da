"""Conversations as examples: what fits, what is cut, what is left out, and the notes that count it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

from loralab.errors import DataError, join_limited
from loralab.tasks.chat_options import ChatOptions
from loralab.tasks.examples import IGNORED, Encoded, Example, Ids
from loralab.tasks.pictured import Segment
from loralab.tasks.turns import common_length


@dataclass(kw_only=True)
class Answered:
    """The examples of some conversations, and what was left out of them.

    `longest` is the length of the longest example before it was cut; `answers` counts all answers,
    `learnt` those to be learnt, `unlearnt` holds the rows without any. `cut_up` counts the rows that
    are several samples, `pieces` these, `inside` the answers in them, `lost` those that do not fit. `pictures` and
    `picture_tokens` count the pictures of the examples and the tokens that stand for them.
    """

    max_length: int
    loss_on: str
    options: ChatOptions
    examples: list[Example] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    shortened: list[int] = field(default_factory=list)
    unlearnt: list[int] = field(default_factory=list)
    longest: int = 0
    answers: int = 0
    learnt: int = 0
    cut_up: int = 0
    pieces: int = 0
    inside: int = 0
    lost: int = 0
    pictures: int = 0
    picture_tokens: int = 0

    def take(self, row: int, samples: Sequence[Sequence[Segment]], answers: int) -> None:
        """Add the examples of one conversation, as many as there are samples, of some answers."""
        learnt = sum(segment.learnt for segments in samples for segment in segments)
        self.answers += answers
        self.learnt += learnt
        if not samples:
            self.unlearnt.append(row)
            return
        before: Ids = ()
        kept = whole = 0
        for segments in samples:
            ids = sum((s.ids for s in segments), ())
            labels = sum((s.ids if s.learnt else (IGNORED,) * len(s.ids) for s in segments), ())
            pictures = sum((s.pictures for s in segments), ())
            types = sum((s.types or (0,) * len(s.ids) for s in segments), ()) if pictures else ()
            self.longest = max(self.longest, len(ids))
            if all(label == IGNORED for label in labels[1 : self.max_length]) or self._cuts_picture(segments):
                continue
            if self.loss_on == "all":
                known = common_length(before, ids)  # learnt in the example before this one
                labels = (IGNORED,) * known + ids[known:]
                labels = tuple(IGNORED if kind else label for kind, label in zip_longest(types, labels, fillvalue=0))
            cut = slice(self.max_length)
            self.examples.append(Example(row, ids[cut], labels[cut], types[cut], image=pictures or None))
            self.pictures += len(pictures)
            self.picture_tokens += sum(map(bool, types))
            kept, whole, before = kept + 1, whole + (len(ids) <= self.max_length), ids
        if not kept:
            self.dropped.append(row)
        elif whole < len(samples):
            self.shortened.append(row)
        if len(samples) > 1:
            self.cut_up += 1
            self.pieces += len(samples)
            self.inside += learnt
            self.lost += sum(map(self._lost, samples))

    def _cuts_picture(self, segments: Sequence[Segment]) -> bool:
        """Return whether the cut would fall before the end of a piece that has pictures."""
        ends = list(accumulate(len(segment.ids) for segment in segments))
        return any(s.pictures and end > self.max_length for s, end in zip(segments, ends, strict=True))

    def _lost(self, segments: Sequence[Segment]) -> int:
        """Return how many answers of a sample begin beyond what fits."""
        start = lost = 0
        for segment in segments:
            lost += segment.learnt and start >= self.max_length
            start += len(segment.ids)
        return lost

    def encoded(self, name: str, split: str) -> Encoded:
        """Return all of it; errors call the rows by `name` and `split`.

        Raises:
            DataError: there is nothing to learn.
        """
        if not self.examples and not self.dropped:
            raise DataError(
                f"{name}: no answer of the {len(self.unlearnt)} {split} rows is marked to be learnt; use --learn all "
                "to learn every one",
                code="nothing_marked",
                field="learn",
            )
        if not self.examples:
            raise DataError(
                f"{name}: the answers of all {len(self.dropped)} {split} rows are cut off at {self.max_length} tokens "
                f"(rows {join_limited((str(i + 1) for i in self.dropped), 5)}); the longest needs --max-length "
                f"{self.longest}",
                code="answers_cut_off",
                field="max_length",
            )
        return Encoded(
            examples=self.examples,
            dropped=tuple(self.dropped),
            shortened=tuple(self.shortened),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        if self.pictures:
            seen = [example for example in self.examples if example.image]
            total = sum(example.length for example in self.examples)
            yield (
                f"{self.pictures:,} pictures in {len(seen):,} of {len(self.examples):,} samples; they take "
                f"{self.picture_tokens:,} of {total:,} tokens"
            )
        if self.cut_up:
            lost = f"; {self.lost:,} of them do not fit in {self.max_length} tokens" if self.lost else ""
            yield (
                f"{self.cut_up:,} conversations of {self.inside:,} answers: they are {self.pieces:,} samples, as the "
                f"chat template writes earlier turns in another way{lost}"
            )
        if self.learnt < self.answers:
            how = "the last of each row" if self.options.learn == "last" else "as the rows mark them"
            none = f"; {len(self.unlearnt):,} rows have none" if self.unlearnt else ""
            yield f"{self.learnt:,} of {self.answers:,} answers are learnt, {how}{none}"
        if self.options.thoughts != "keep":
            done = "read and not learnt" if self.options.thoughts == "mask" else "left out"
            yield f"thoughts in answers are {done}"
