"""How far long work has come, for whoever listens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def _length(part: Any) -> int:
    return len(part)


def counted(
    parts: Iterable[T], what: str, total: int, listener: Listener | None = None, size: Callable[[T], int] = _length
) -> Iterator[T]:
    """Yield some parts, and tell before the first and after each how many of `total` things they held so far."""
    tell = listener or (lambda *_: None)
    done = 0
    tell(what, done, total)
    for part in parts:
        yield part
        done += size(part)
        tell(what, done, total)


def stages(shares: Mapping[str, int], listener: Listener | None = None) -> Callable[[str], None]:
    """Return what is to be called with the name of each stage as it begins.

    Args:
        shares: of the time that each stage takes, in their order.
    """
    starts = dict(zip(shares, accumulate(shares.values(), initial=0), strict=False))
    total = sum(shares.values())

    def begin(stage: str) -> None:
        if listener is not None:
            listener(stage, starts[stage], total)

    return begin
