"""Regular expressions out of a file, matched in bounded time.

Standard library only, until an expression is matched.
"""

import math
import re
from functools import lru_cache
from typing import Any

from loralab.errors import ConfigError, format_value

MAX_LENGTH = 1 << 14  # characters of an expression
MAX_REPEATS = 10_000  # product of the counts in braces, which are written out when compiled
TIMEOUT = 0.2  # seconds of computing for one text; honest expressions take microseconds
BRACES = re.compile(r"\{(\d{0,9}),?(\d{0,9})\}")


def check_expression(pattern: str) -> None:
    """Refuse what is not a regular expression.

    Raises:
        ConfigError: it is not, or is too large.
    """
    _compiled(pattern)


def matches(pattern: str, text: str) -> bool:
    """Return whether the whole of a text matches, as re.fullmatch does.

    Raises:
        ConfigError: it is not a regular expression, or takes too long.
    """
    try:
        return _compiled(pattern).fullmatch(text, timeout=TIMEOUT) is not None
    except TimeoutError:
        raise ConfigError(
            f"the expression {format_value(pattern)} takes too long to match; write a simpler one",
            code="expression_too_slow",
            field="target_modules",
        ) from None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Any:
    """Return the expression as the regex package has it, which can stop in the middle of a match.

    Only what Python's own module takes too is an expression: peft matches with that one.
    """
    import regex

    counts = [int(count) for pair in BRACES.findall(pattern) for count in pair if count]
    if len(pattern) > MAX_LENGTH or math.prod(filter(None, counts)) > MAX_REPEATS:
        raise ConfigError(
            f"the expression {format_value(pattern)} is too large; write a simpler one",
            code="expression_too_large",
            field="target_modules",
        )
    try:
        re.compile(pattern)
        if re.search(r"\{[^\d,}]", pattern):  # approximate matching, in that package alone
            raise re.error("braces must hold counts")
        return regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(
            f"{format_value(pattern)} is not a regular expression: {error}",
            code="invalid_expression",
            field="target_modules",
        ) from None
