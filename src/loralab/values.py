"""Values that people write, in options and in files: read, or refused in one sentence.

Standard library only.
"""

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, nearest

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices, and propose the nearest."""
    if value not in choices:
        hint = nearest(str(value), choices)
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")


def parse_bytes(name: str, text: str) -> int:
    """ "4GB" -> 4,000,000,000.

    Raises:
        ConfigError: no number with one of the units.
    """
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if unit not in UNITS or not (math.isfinite(amount) and amount > 0):
        raise ConfigError(f"{name} must be like 4GB or 800MB, got {text!r}")
    return int(amount * UNITS[unit])


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is no TOML: {error}") from None
