"""One line of what a command is doing, where that takes more than a moment."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds that nothing is said; what is wrong with the input is one line, and comes before


@contextmanager
def working(text: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on standard error what is being done, in one line, where that takes more than a moment."""
    timer = threading.Timer(PATIENCE, print, [f"{text} ..."], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet and os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
