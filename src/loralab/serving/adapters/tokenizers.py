"""The base's tokenizer as each adapter was trained with it: its chat template, its end of text."""

import itertools
import threading
from dataclasses import dataclass
from typing import Any

from loralab.models.identity import tokenizer_changes, warn_of, with_tokenizer_changes
from loralab.models.kinds import CAUSAL
from loralab.models.load import Base
from loralab.serving.adapters.info import AdapterInfo
from loralab.tasks.encode import chat_ids, stop_ids


@dataclass(frozen=True)
class AdapterTokenizer:
    """Tokenizer of an adapter, and the tokens that end its answers.

    Attributes:
        stops: ids that end an answer; none where the base writes no text.
        opening: ids between a question and its answer.
    """

    tokenizer: Any
    stops: frozenset[int] = frozenset()
    opening: tuple[int, ...] = ()


class AdapterTokenizers:
    """The wording of each adapter of a base; for any number of threads.

    The tokenizer is copied once for each wording, not for each adapter: most share the base's own.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self._own = _wording(base)
        self._known: dict[tuple[tuple[str, str | None], ...], AdapterTokenizer] = {}
        self._told: set[str] = set()  # digests of the adapters whose wording was said to differ
        self._lock = threading.Lock()

    def of(self, entry: AdapterInfo | None) -> AdapterTokenizer:
        """Return the wording that an adapter was trained with; None is the base.

        One that differs from the base's own is a BaseMismatchWarning, once for each adapter.

        Raises:
            DataError: the adapter's chat template cannot be used.
        """
        if entry is None or not entry.tokenizer_overrides:
            return self._own
        changed = tokenizer_changes(self._base, dict(entry.tokenizer_overrides))
        if not changed:
            return self._own
        with self._lock:
            if entry.tokenizer_overrides not in self._known:
                self._known[entry.tokenizer_overrides] = _wording(with_tokenizer_changes(self._base, changed))
            if entry.digest not in self._told and not entry.parts:  # told of each part
                self._told.add(entry.digest)
                warn_of(changed, self._base, entry.name)
            return self._known[entry.tokenizer_overrides]


def _wording(base: Base) -> AdapterTokenizer:
    if base.kind != CAUSAL:
        return AdapterTokenizer(base.tokenizer)
    return AdapterTokenizer(base.tokenizer, frozenset(stop_ids(base.tokenizer)), _opening(base.tokenizer))


def _opening(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that two different questions end in alike."""
    questions = (reversed(chat_ids(tokenizer, text)) for text in ("yes", "no"))
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*questions, strict=False))
    return tuple(token for token, _ in alike)[::-1]
