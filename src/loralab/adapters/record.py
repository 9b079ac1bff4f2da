"""Schema of the parts of loralab.json that are read.

Another tool may have written into it, or a stranger. What is of another type than those who read
it expect tells nothing: it is left out, as if it had not been there.
"""

import math
from collections.abc import Mapping
from typing import Any

FORMAT = 1
Kind = type | tuple[type, ...]  # a type, or what a list holds
SECTIONS: dict[str, dict[str, Kind]] = {
    "base": {
        "name": str,
        "kind": str,
        "precision": str,
        "quantize": str,
        "dtype": str,
        "fingerprint": str,
        "image_size": int,
    },
    "task": {"name": str, "format": str, "instruction": str, "labels": (str, int), "digest": str, "scale": float},
    "tokenizer": {"new_tokens": (str,), "stop_ids": (int,), "chat_template": str, "eos_token": str, "digest": str},
    "from_adapter": {"path": str, "digest": str},
    "training": {"seed": int, "learn": str, "thoughts": str, "merge_aware": str},
    "metrics": {},
    "method": {},
    "certificate": {},
    "versions": {},
}
MAX_COUNT = 1 << 63  # of a whole number


def sound(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without the fields that are of other types than expected."""
    found = dict(record)
    for name, fields in SECTIONS.items():
        if name not in found:
            continue
        if not isinstance(found[name], dict):
            del found[name]
            continue
        found[name] = {
            key: value
            for key, value in found[name].items()
            if value is None or key not in fields or _is(value, fields[key])
        }
    if "metrics" in found:
        found["metrics"] = {split: _numbers(own) for split, own in found["metrics"].items()}
    sample = found.get("sample")
    if not (isinstance(sample, list) and all(_is(row, (int,)) for row in sample)):
        found.pop("sample", None)
    return found


def _is(value: Any, kind: Kind) -> bool:
    """Return whether a value is of a type, or a list of some; whole numbers count from 0."""
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(_is_one(one, kind) for one in value)
    return _is_one(value, (kind,))


def _is_one(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, int):
        return int in kinds and not isinstance(value, bool) and 0 <= value < MAX_COUNT
    return isinstance(value, kinds)


def _numbers(values: Any) -> dict[str, float]:
    """Return the metrics that are numbers."""
    if not isinstance(values, dict):
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and -MAX_COUNT < value < MAX_COUNT and math.isfinite(value)
    }
