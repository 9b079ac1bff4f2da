"""Parse and validate user-supplied values.

Standard library only.
"""

import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from loralab import system
from loralab.errors import ConfigError, InputError, format_value, nearest

T = TypeVar("T")

SECONDS = {"S": 1, "M": 60, "H": 3600}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MAX_JSON_BYTES = 1 << 26  # bytes of a file of settings or records
MAX_TOML_BYTES = 1 << 20
MAX_WHOLE = (1 << 64) - 1
MAX_DEPTH = 64  # lists and objects in each other
MAX_KEY_PARTS = 256  # of a dotted key
MAX_TYPED_NAME = 200  # characters of a name that a message can propose to type


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices, and propose the nearest."""
    if value not in choices:
        hint = nearest(str(value)[:80], choices)
        raise ConfigError(
            f"{name} must be one of {', '.join(choices)}, got {format_value(value)}{hint}",
            code="invalid_choice",
            field=name,
        )


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"{name} must be a whole number of at least {least}, got {format_value(value)}",
            code="invalid_count",
            field=name,
        )


def build_config(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass of settings from values of a file, each of the type of its field.

    Raises:
        ConfigError: one is not, or the settings refuse it.
    """
    try:
        found = kind(**values)
    except (TypeError, AttributeError, OverflowError, RecursionError):
        _check_types(kind, values)
        raise
    _check_types(kind, values)
    return found


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ConfigError(
                f"{name} must be {_type_text(hints[name])}, got {format_value(value)}", code="invalid_type", field=name
            )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type; a list counts as a tuple."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (tuple, Sequence):
        return isinstance(value, list | tuple | set | frozenset) and all(_fits(one, inner[0]) for one in value)
    if origin is not None:  # a mapping
        return isinstance(value, Mapping) and all(_fits(one, inner[1]) for one in value.values())
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _type_text(hint: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_type_text(one) for one in inner if one is not NoneType)
    if origin is tuple:
        return f"a list (each {_type_text(inner[0])})"
    names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(hint, "a table")


def parse_bytes(name: str, text: str) -> int:
    """ "4GB" -> 4,000,000,000.

    Raises:
        ConfigError: no number with one of the units.
    """
    amount = _amount(text, UNITS)
    if amount is None:
        raise ConfigError(f"{name} must be like 4GB or 800MB, got {text!r}", code="invalid_size", field=name)
    return int(amount)


def parse_seconds(text: str) -> float:
    """Parse "20m" -> 1200.0; units s, m and h.

    Raises:
        ConfigError: no number with one of the units.
    """
    amount = _amount(text, SECONDS)
    if amount is None:
        raise ConfigError(f"budget must be like 20m, 90s or 1.5h, got {text!r}")
    return amount


def _amount(text: str, units: Mapping[str, int]) -> float | None:
    """Return a positive number of units; None where it is none, or no unit follows it."""
    width = len(next(iter(units)))
    number, unit = text.strip()[:-width], text.strip()[-width:].upper()
    try:
        amount = float(number) * units[unit]
    except (ValueError, KeyError):
        return None
    return amount if 0 < amount < math.inf else None


def join_pairs(values: Mapping[str, str]) -> str:
    r"""{"a": "1"} as `a=1`, which the command line reads back; commas in names become `\,`.

    Names that `is_joinable` refuses cannot be written so.
    """
    return ",".join(f"{_escaped(name)}={_escaped(value)}" for name, value in values.items())


def is_joinable(name: str) -> bool:
    """Tell if a name can be typed in `name=value` pairs, and read in a message."""
    plain = name == name.strip() and "\\" not in name and name.isprintable()
    return 0 < len(name) <= MAX_TYPED_NAME and plain


def split_parts(text: str) -> list[str]:
    r"""Return the parts of `a=1,b=2`; `\,` separates none."""
    return re.split(r"(?<!\\),", text)


def split_pair(part: str) -> tuple[str, str]:
    r"""`a=1` as ("a", "1"), cut at the last `=` that is not written `\=`.

    Raises:
        ValueError: it is not of this form.
    """
    signs = [sign.start() for sign in re.finditer(r"(?<!\\)=", part)]
    if not signs or signs[-1] == 0:
        raise ValueError(part)
    name, value = part[: signs[-1]], part[signs[-1] + 1 :]
    return _unescaped(name).strip(), _unescaped(value).strip()


def _escaped(name: str) -> str:
    return re.sub("[,=]", r"\\\g<0>", name)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([,=])", r"\1", text)


def read_bytes(file: Path, error: type[InputError], most: int | None = None) -> bytes:
    """Return all of a regular file; a pipe or a device might never end.

    Args:
        error: what is raised.
        most: bytes; None is what the machine's memory could hold.

    Raises:
        InputError: it cannot be read, is something else than a file, or is too large.
    """
    limit = system.memory_bytes() if most is None else most
    try:
        place = os.open(file, system.OPEN_FILE)
        try:
            found = os.fstat(place)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{file} cannot be read: it is not a file", code="cannot_read")
            if found.st_size > limit:
                raise error(f"{file} has {found.st_size:,} bytes; at most {limit:,} are read", code="too_large")
            with open(place, "rb", closefd=False) as handle:
                return handle.read(found.st_size)
        finally:
            os.close(place)
    except MemoryError:
        raise error(f"{file} cannot be read: it does not fit into memory", code="too_large") from None
    except (OSError, ValueError) as reason:  # a name with a zero byte is a ValueError
        if isinstance(reason, InputError):
            raise
        said = getattr(reason, "strerror", None) or reason
        raise error(f"{file} cannot be read: {said}", code="cannot_read") from None


def read_json(file: Path, error: type[InputError], *, large: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file of settings or records.

    Args:
        error: what is raised.
        large: whether whole numbers beyond 64 bits are read.

    Raises:
        InputError: it cannot be read, or is something else; of the kind `error`.
    """
    return parse_json(file, read_bytes(file, error, MAX_JSON_BYTES), error, large=large)


def parse_json(file: Path, data: bytes, error: type[InputError], *, large: bool = False) -> dict[str, Any]:
    """`read_json`, of what a file held.

    Raises:
        InputError: it is something else; of the kind `error`.
    """
    if len(data) > MAX_JSON_BYTES:
        raise error(f"{file} has {len(data):,} bytes; at most {MAX_JSON_BYTES:,} are read", code="file_too_large")
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as reason:  # no JSON, no UTF-8; too many digits or brackets
        raise error(f"{file} cannot be read: {reason}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise error(f"{file} must hold a JSON object, found {type(content).__name__}", code="not_an_object")
    _require_plain(file, content, error, large=large)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can spell half of a character, and nothing could write it
        raise error(f"{file} holds half a character (such as \\ud83d)", code="half_character") from None
    return content


def read_toml(file: Path, error: type[InputError] = ConfigError) -> dict[str, Any]:
    """Return the content of a file.

    Raises:
        InputError: it cannot be read, or is not TOML; of the kind `error`.
    """
    data = read_bytes(file, error, MAX_TOML_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as reason:
        raise error(f"{file} cannot be read: {reason}", code="unreadable") from None
    # the parser's time grows with the square of a key's parts
    if any(part.count(".") > MAX_KEY_PARTS for part in re.split(r"[=,\n]", text)):
        raise error(f"{file} has a key of more than {MAX_KEY_PARTS} parts", code="key_too_long")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as reason:  # too many digits or brackets, too
        line = re.search(r"line \d+", str(reason))
        raise error(f"{file} is not TOML: {reason}", code="invalid_toml", field=line and line[0]) from None
    _require_plain(file, content, error)
    return content


def nests_deeper(content: Any, most: int = MAX_DEPTH) -> bool:
    """Return whether lists and objects lie in each other more than `most` deep.

    What writes, copies or shows such a value calls itself at every level, and would fail anywhere.
    """
    return next(islice(_levels(content), most, None), None) is not None


def _levels(content: Any) -> Iterator[list[Any]]:
    """Yield all values at depth 0, 1, ... as long as there are lists or objects among them."""
    level = [content]
    while level:
        yield level
        inner = (v.values() if isinstance(v, dict) else v for v in level if _holds(v))
        level = [value for values in inner for value in values]


def _require_plain(file: Path, content: Any, error: type[InputError], *, large: bool = False) -> None:
    """No nesting that no file of ours has, and no number that no field can hold."""
    for depth, level in enumerate(_levels(content)):
        if depth > MAX_DEPTH:
            raise error(f"{file} is nested more than {MAX_DEPTH} deep", code="nested_too_deep")
        if not large and any(type(value) is int and abs(value) > MAX_WHOLE for value in level):
            raise error(f"{file} holds a whole number beyond 64 bits", code="number_too_large")


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)
