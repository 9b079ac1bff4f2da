"""Cut an answer at its stop strings; nothing is sent that a stop string could still take back."""

from collections.abc import Sequence


class StopStringFilter:
    """The text of one answer.

    Args:
        stops: texts that end it; they are not part of it.

    Attributes:
        told: how many of its characters were told.
        stopped: whether a stop text has ended it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        self._checked = 0  # no stop text counts that ends before
        self.told = 0
        self.stopped = False

    def add(self, text: str, *, exempt: bool = False) -> str:
        """Return the text that is certain now and was not told yet.

        Args:
            exempt: no stop text that ends in here counts.
        """
        self._text += text
        if exempt:
            self._checked = len(self._text)
        return self._certain(final=False)

    def end(self, text: str, *, exempt: bool = False) -> str:
        """Return the rest of the text once it is complete."""
        self._text += text
        if exempt:
            self._checked = len(self._text)
        return self._certain(final=True)

    def _certain(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        known = max(self.told, self._checked)
        places = [self._text.find(s, max(0, known - len(s) + 1)) for s in self._stops]
        found = [place for place in places if place >= 0]
        until = len(self._text)
        if found:
            self.stopped, until = True, max(min(found), self.told)
        elif not final:
            until -= max((overlap(self._text, stop) for stop in self._stops), default=0)
        new, self.told = self._text[self.told : until], max(self.told, until)
        return new


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text could begin a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
