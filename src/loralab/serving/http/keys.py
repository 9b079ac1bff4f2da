"""API keys of a server: rights and quotas. Standard library only.

A file of keys is TOML, one table a key:

    [[key]]
    name = "ci"
    sha256 = "9f86..."            # or key = "..." in plain text
    adapters = ["sst", "news"]    # or ["*"]
    base = true
    admin = false
    requests_per_minute = 60
    tokens_per_day = 200000
"""

import hashlib
import hmac
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loralab.errors import ConfigError, join_limited, nearest
from loralab.values import read_toml

MIN_KEY_CHARACTERS = 16  # characters of a key: fewer can be guessed
MINUTE, DAY = 60, 86_400


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key and its rights. `sha256` (32 bytes) is kept, never the key itself."""

    name: str
    sha256: bytes = field(repr=False)
    adapters: tuple[str, ...] = ("*",)
    base: bool = True
    admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None

    def may_use(self, adapter: str | None) -> bool:
        """Return whether it may ask this adapter; None is the base."""
        if adapter is None:
            return self.base
        return self.sees_all or adapter in self.adapters

    @property
    def sees_all(self) -> bool:
        """Return whether it may use every adapter, those of tomorrow too."""
        return "*" in self.adapters


@dataclass(frozen=True)
class Grant:
    """A request that may go on: its key, the tokens set aside for it, and the day they count to."""

    key: Key
    tokens: int
    day: int


@dataclass(frozen=True)
class Refusal:
    """A quota is used up: why, and the seconds after which it is not."""

    reason: str
    seconds: int


@dataclass
class _Used:
    """Usage of a key: times of the last minute's requests, tokens of the day."""

    requests: deque[float] = field(default_factory=deque)
    day: int = -1
    tokens: int = 0


class Keys:
    """The keys of a server and what they have used since it started. Thread-safe.

    Args:
        clock: seconds since 1970; days of tokens_per_day are those of UTC.
    """

    def __init__(self, keys: Sequence[Key], clock: Callable[[], float] = time.time) -> None:
        self.keys = tuple(keys)
        self._clock = clock
        self._lock = threading.Lock()
        self._used = {key.name: _Used() for key in keys}

    def find(self, secret: str | None) -> Key | None:
        """Return the key with this secret; takes the same time whichever it is, or if there is none."""
        digest = hashlib.sha256((secret or "").encode()).digest()
        found = None
        for key in self.keys:  # to the end: the place of a key must not show in the time
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found if secret else None

    def admit(self, key: Key, tokens: int) -> Grant | Refusal:
        """Count one request and set aside the most tokens that it can take.

        What is set aside is given back by `settle`, so that many requests at once cannot exceed
        the quota together. A request that is refused counts for nothing.
        """
        with self._lock:
            used, now = self._today(key), self._clock()
            while used.requests and used.requests[0] <= now - MINUTE:
                used.requests.popleft()
            most = key.requests_per_minute
            if most is not None and len(used.requests) >= most:
                seconds = int(used.requests[0] + MINUTE - now) + 1 if used.requests else MINUTE
                return Refusal(f"key {key.name} may send {most} requests a minute", seconds)
            if key.tokens_per_day is not None and used.tokens + tokens > key.tokens_per_day:
                left = max(0, key.tokens_per_day - used.tokens)
                return Refusal(
                    f"key {key.name} has {left} of its {key.tokens_per_day} tokens a day left, and "
                    f"the request may take {tokens}",
                    int(DAY - now % DAY) + 1,
                )
            used.requests.append(now)
            used.tokens += tokens
            return Grant(key, tokens, used.day)

    def settle(self, grant: Grant, tokens: int) -> None:
        """Settle a finished request: it used so many tokens, counted to the day that it began on."""
        with self._lock:
            today = self._today(grant.key)
            if today.day == grant.day:
                today.tokens += tokens - grant.tokens

    def used_today(self, key: Key) -> int:
        """Return the number of tokens that were used or are set aside."""
        with self._lock:
            return self._today(key).tokens

    def _today(self, key: Key) -> _Used:
        used, day = self._used[key.name], int(self._clock() // DAY)
        if used.day != day:
            used.day, used.tokens = day, 0
        return used


def read(path: str | Path) -> Keys:
    """Return the keys of a TOML file.

    Raises:
        ConfigError: it cannot be read, or an entry is wrong; no message shows a key.
    """
    path = Path(path)
    try:
        content = read_toml(path)
    except ConfigError as error:
        if error.code != "invalid_toml":
            raise ConfigError(f"--keys {error}", code=error.code, field="keys") from None
        # the parser's own message may quote what it read
        line = f" ({error.field})" if error.field else ""
        raise ConfigError(f"--keys {path} is not TOML{line}", code="invalid_toml", field="keys") from None
    entries = content.pop("key", None)
    if content or not isinstance(entries, list) or not entries:
        raise ConfigError(f"--keys {path} must hold [[key]] tables and nothing else", code="not_keys", field="keys")
    found = [_key(entry, f"--keys {path}: key {n}") for n, entry in enumerate(entries, 1)]
    for what, values in (("name", [k.name for k in found]), ("key", [k.sha256 for k in found])):
        if len(set(values)) < len(values):
            raise ConfigError(f"--keys {path}: two keys have the same {what}", code="repeated_value", field=what)
    return Keys(found)


_KINDS: dict[str, tuple[type, str]] = {
    "name": (str, "a text"),
    "key": (str, "a text"),
    "sha256": (str, "64 hexadecimal digits"),
    "adapters": (list, 'a list of names, or ["*"]'),
    "base": (bool, "true or false"),
    "admin": (bool, "true or false"),
    "requests_per_minute": (int, "a whole number above 0"),
    "tokens_per_day": (int, "a whole number above 0"),
}


def _key(entry: Mapping[str, Any], where: str) -> Key:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a table", code="not_a_table", field="key")
    for name, value in entry.items():
        if name not in _KINDS:
            raise ConfigError(
                f"{where} has no {name} ({join_limited(_KINDS)}){nearest(name, _KINDS)}",
                code="unknown_field",
                field=name,
            )
        kind, expected = _KINDS[name]
        if not isinstance(value, kind) or (kind is int and not _is_count(value)):
            raise ConfigError(f"{where}: {name} must be {expected}", code="invalid_value", field=name)
    if not entry.get("name"):
        raise ConfigError(f"{where} needs a name", code="missing_field", field="name")
    if not all(isinstance(name, str) for name in entry.get("adapters", [])):
        raise ConfigError(f"{where}: adapters must be {_KINDS['adapters'][1]}", code="invalid_value", field="adapters")
    given = {f.name: entry[f.name] for f in fields(Key) if f.name in entry}
    if "adapters" in given:
        given["adapters"] = tuple(given["adapters"])
    return Key(**{**given, "sha256": _sha256(entry, where)})


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and bool(value >= 1)


def _sha256(entry: Mapping[str, Any], where: str) -> bytes:
    if ("key" in entry) == ("sha256" in entry):
        raise ConfigError(f"{where} needs either key or sha256", code="key_or_sha256", field="key")
    if "key" in entry:
        if len(entry["key"]) < MIN_KEY_CHARACTERS:
            raise ConfigError(
                f"{where}: key must have at least {MIN_KEY_CHARACTERS} characters", code="short_key", field="key"
            )
        return hashlib.sha256(entry["key"].encode()).digest()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", entry["sha256"]):
        raise ConfigError(f"{where}: sha256 must be {_KINDS['sha256'][1]}", code="invalid_value", field="sha256")
    return bytes.fromhex(entry["sha256"])
