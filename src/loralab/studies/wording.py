"""Messages -> words in English or Traditional Chinese, by the catalogues beside this file.

A catalogue's entry is a template: {score:points} writes the value `score` in the format `points`.
"""

import functools
import math
import re
import string
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from loralab.studies.message import Message

LANGUAGES = ("en", "zh-TW")
UNKNOWN = "–"  # of a number that was not measured
UNITS = ((1e9, 2, "GB"), (1e6, 1, "MB"), (1e3, 1, "kB"), (1.0, 0, "B"))


def say(value: Any, language: str) -> str:
    """Write a message in a language; names and numbers stay as they are.

    Raises:
        KeyError: the catalogue lacks the message, or the message a value.
    """
    return _written(value, "", catalogue(language))


@functools.cache
def catalogue(language: str) -> dict[str, str]:
    """Return all templates of a language by their dotted keys."""
    text = resources.files("loralab.studies").joinpath(f"messages/{language}.toml").read_text(encoding="utf-8")
    return dict(_flat(tomllib.loads(text)))


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in table.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _written(value: Any, spec: str, templates: Mapping[str, str]) -> str:
    """Fill in templates; values that are messages are written in the same language."""
    if spec in JOINS:
        return joined([_written(part, "", templates) for part in value], templates, spec)
    if spec.startswith(PLURAL):
        one, many = spec.removeprefix(PLURAL).split("|")
        return one if value == 1 else many
    if not isinstance(value, Message):
        return formatted(value, spec)
    text = ""
    for words, name, how, _ in string.Formatter().parse(templates[value.key]):
        text = beside(text, words)
        if name is not None:
            text = beside(text, _written(value.values[name], how or "", templates))
    return text


def beside(left: str, right: str) -> str:
    """Put two texts beside each other; a space that a template leaves for Latin letters goes between Chinese signs."""
    if CHINESE.match(left[-2:-1]) and left[-1:] == " " and CHINESE.match(right):
        return left[:-1] + right
    if CHINESE.match(left[-1:]) and right[:1] == " " and CHINESE.match(right[1:]):
        return left + right[1:]
    return left + right


CHINESE = re.compile(r"[\u3000-\u9fff\uff00-\uffef]")
JOINS = ("sentences", "clauses", "names", "commas")
PLURAL = "plural "


def joined(parts: Sequence[str], templates: Mapping[str, str], how: str) -> str:
    """Join words as a language does."""
    if how == "names" and len(parts) > 1:
        return templates["joint.commas"].join(parts[:-1]) + templates["joint.and"] + parts[-1]
    return templates[f"joint.{'commas' if how == 'names' else how}"].join(parts)


def formatted(value: Any, spec: str) -> str:
    """Write a number in one of FORMATS or in a format of Python's; a dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNKNOWN
    return FORMATS[spec](value) if spec in FORMATS else format(value, spec if not isinstance(value, str) else "")


def seconds(value: float) -> str:
    """Write a duration."""
    if value < 1e-3:
        return f"{1e6 * value:.0f} µs"
    return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def size(value: float) -> str:
    """Write a number of bytes."""
    factor, digits, name = next(unit for unit in UNITS if value >= unit[0] or unit[0] == 1)
    return f"{value / factor:.{digits}f} {name}"


def rounded(value: float) -> str:
    """Write a whole number with two digits that count."""
    return f"{int(float(f'{value:.2g}')):,}"


def probability(value: float) -> str:
    """Write a probability in percent; what is not certain is not written as if it were."""
    return "> 99 %" if 0.99 < value < 1 else "< 1 %" if 0 < value < 0.01 else f"{100 * value:.0f} %"


FORMATS: dict[str, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,.0f}",
    "plain": lambda value: f"{value:.3f}",
    "short": lambda value: f"{value:.3g}",
    "rate": lambda value: f"{value:.1e}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "probability": probability,
    "share": lambda value: f"{100 * value:.0f} %",
    "fine percent": lambda value: f"{100 * value:.3g} %",
    "signed percent": lambda value: f"{100 * value:+.1f} %",
    "points": lambda value: f"{100 * value:.1f}",
    "signed points": lambda value: f"{100 * value:+.1f}",
    "signed": lambda value: f"{value:+.3f}",
    "about": rounded,
    "seconds": seconds,
    "bytes": size,
}
