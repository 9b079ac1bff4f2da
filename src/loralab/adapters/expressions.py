"""Regular expressions out of a file, matched in bounded time.

Python's matcher tries one way after another: "(a+)+b" takes it hours on a path of forty letters.
An expression that could take long is matched another way: for all ways at once, as the set of
places that its parts can lead to. That knows no back-references, which are refused.

Standard library only.
"""

import re
import re._constants as ops  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from loralab.errors import ConfigError, shown

LONGEST = 1 << 17  # characters of an expression
REPEATS = 32  # how often something without a limit is thought to match, in an estimate
MANY = 10**5  # ways that are tried one after another
Places = frozenset[int]

_CATEGORIES = {
    ops.CATEGORY_DIGIT: r"\d", ops.CATEGORY_NOT_DIGIT: r"\D", ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S", ops.CATEGORY_WORD: r"\w", ops.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip
_LOOPS = (ops.MAX_REPEAT, ops.MIN_REPEAT)


def check_expression(pattern: str) -> None:
    """Refuse what is no regular expression, or none that can be matched in bounded time.

    Raises:
        ConfigError: so it is.
    """
    _compiled(pattern)


def matches(pattern: str, text: str) -> bool:
    """Whether the whole of a text matches; as re.fullmatch."""
    return _compiled(pattern)(text)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> Callable[[str], bool]:
    try:
        if len(pattern) > LONGEST:
            raise ConfigError(f"the expression {shown(pattern)} is too long ({len(pattern):,})")
        parsed = parser.parse(pattern)
        if _ways(parsed) <= MANY:
            whole = re.compile(pattern)
            return lambda text: whole.fullmatch(text) is not None
    except re.error as error:
        raise ConfigError(f"{shown(pattern)} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError) as error:  # of brackets, or of a number of repeats
        raise ConfigError(f"the expression {shown(pattern)} is too large: {error}") from None
    if parsed.state.flags & ~ops.SRE_FLAG_UNICODE or not _is_known(parsed):
        raise ConfigError(
            f"the expression {shown(pattern)} could take for ever; write a simpler one"
        )
    return lambda text: len(text) in _ends(parsed, text, frozenset((0,)))


def _ways(nodes: Any) -> float:
    """In how many ways an expression could match, roughly; infinite where repeats nest."""
    ways = 1.0
    for op, value in nodes:
        if op in (*_LOOPS, ops.POSSESSIVE_REPEAT):
            least, most, inner = value
            own = _ways(inner)
            if most > 1:
                own = float("inf") if own > 1 else min(most - least + 1, REPEATS)
            ways *= own + (most == 1)
        elif op is ops.BRANCH:
            ways *= sum(map(_ways, value[1]))
        elif op in (ops.SUBPATTERN, ops.ATOMIC_GROUP, ops.ASSERT, ops.ASSERT_NOT):
            ways *= _ways(value if op is ops.ATOMIC_GROUP else value[-1])
        elif op is ops.GROUPREF_EXISTS:
            ways *= 2 * REPEATS
    return ways


def _is_known(nodes: Any) -> bool:
    """Whether the sets of places can stand for all of an expression."""
    plain = (*_STEPS, ops.ASSERT, ops.ASSERT_NOT)
    for op, value in nodes:
        if op is ops.SUBPATTERN and (value[1] or value[2]):
            return False  # it has flags of its own
        inner = value[1] if op is ops.BRANCH else [value[-1]] if op in _NESTED else []
        if op not in plain or not all(map(_is_known, inner)):
            return False
    return True


def _ends(nodes: Any, text: str, starts: Places) -> Places:
    """The places where a sequence can end that begins at one of some places."""
    for op, value in nodes:
        starts = _STEPS[op](op, value, text, starts)
        if not starts:
            break
    return starts


def _one(op: Any, value: Any, text: str, starts: Places) -> Places:
    return frozenset(i + 1 for i in starts if i < len(text) and _is(op, value, text[i]))


def _is(op: Any, value: Any, character: str) -> bool:
    """Whether a character is a literal, one of a range, a category or a set of these."""
    code = ord(character)
    if op is ops.LITERAL or op is ops.NOT_LITERAL:
        return bool((code == value) == (op is ops.LITERAL))
    if op is ops.RANGE:
        return bool(value[0] <= code <= value[1])
    if op is ops.CATEGORY:
        return re.fullmatch(_CATEGORIES[value], character) is not None
    if op is ops.ANY:
        return character != "\n"
    negated = value[0][0] is ops.NEGATE
    return any(_is(kind, own, character) for kind, own in value[negated:]) != negated


def _loop(op: Any, value: Any, text: str, starts: Places) -> Places:
    least, most, inner = value
    now, found = starts, frozenset[int]()
    for count in range(most + 1):
        if count >= least:
            now, found = now - found, found | now
        after = _ends(inner, text, now) if count < most else frozenset[int]()
        if not after:
            break
        if count < least and after == now:  # and so it will be however often
            return now
        now = after
    return found


def _branch(op: Any, value: Any, text: str, starts: Places) -> Places:
    return frozenset[int]().union(*(_ends(own, text, starts) for own in value[1]))


def _group(op: Any, value: Any, text: str, starts: Places) -> Places:
    return _ends(value[-1], text, starts)


def _at(op: Any, value: Any, text: str, starts: Places) -> Places:
    """Begin, end, and edges of words."""
    if value in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
        return starts & {0}
    if value in (ops.AT_END, ops.AT_END_STRING):
        return starts & {len(text)}
    edges = {i for i in starts if _word(text, i - 1) != _word(text, i)}
    return starts & edges if value is ops.AT_BOUNDARY else starts - edges


def _word(text: str, place: int) -> bool:
    return 0 <= place < len(text) and re.fullmatch(r"\w", text[place]) is not None


def _look(op: Any, value: Any, text: str, starts: Places) -> Places:
    """What must stand ahead or behind, or must not."""
    direction, inner = value

    def found(place: int) -> bool:
        if direction > 0:
            return bool(_ends(inner, text, frozenset((place,))))
        return any(place in _ends(inner, text, frozenset((i,))) for i in range(place + 1))

    return frozenset(i for i in starts if found(i) == (op is ops.ASSERT))


_NESTED = (*_LOOPS, ops.SUBPATTERN, ops.ASSERT, ops.ASSERT_NOT)
_STEPS: dict[Any, Callable[[Any, Any, str, Places], Places]] = {
    **dict.fromkeys((ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN), _one),
    **dict.fromkeys(_LOOPS, _loop), ops.BRANCH: _branch, ops.SUBPATTERN: _group, ops.AT: _at,
    ops.ASSERT: _look, ops.ASSERT_NOT: _look,
}  # fmt: skip
