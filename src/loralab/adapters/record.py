"""What loralab.json may hold, as far as anything here reads it.

A field may be absent or null; more fields than these may be there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import AdapterFileError, shown

FORMAT = 1
SECTIONS: dict[str, dict[str, type | list[type]]] = {
    "base": {
        "name": str, "kind": str, "precision": str, "quantize": str, "dtype": str,
        "fingerprint": str, "image_size": int,
    },
    "task": {"name": str, "format": str, "instruction": str, "labels": [str, int]},
    "tokenizer": {"new_tokens": [str], "stop_ids": [int]},
    "training": {"seed": int},
    "metrics": {},
    "method": {},
    "certificate": {},
    "versions": {},
}  # fmt: skip


def require_record(file: Path, record: Mapping[str, Any]) -> None:
    """Refuse a record whose fields are of other types than those who read it expect.

    Raises:
        AdapterFileError: the first such field.
    """
    if record.get("format", FORMAT) != FORMAT:
        raise AdapterFileError(
            f"{file} has format {shown(record['format'])}; this version reads {FORMAT}"
        )
    for name, fields in SECTIONS.items():
        section = _checked(file, name, record.get(name), dict) or {}
        for key, kind in fields.items():
            _checked(file, f"{name}.{key}", section.get(key), kind)
        if section.get("seed", 0) is not None and section.get("seed", 0) < 0:
            raise AdapterFileError(f"{file}: training.seed must be 0 or more")
    for row in _checked(file, "sample", record.get("sample"), list) or ():
        _checked(file, "sample", row, [int])


def _checked(file: Path, name: str, value: Any, kind: type | list[type]) -> Any:
    """The value, if it is null, of the kind, or a list of one of the kinds."""
    kinds = kind if isinstance(kind, list) else [kind]
    held = value if isinstance(kind, list) and isinstance(value, list) else [value]
    listed = isinstance(value, list) == (kind is list or isinstance(kind, list))
    right = all(isinstance(v, tuple(kinds)) and not isinstance(v, bool) for v in held)
    if value is not None and not (listed and right):
        said = f"a list of {kinds[0].__name__}" if isinstance(kind, list) else kind.__name__
        raise AdapterFileError(f"{file}: {name} must be {said}, found {shown(value)}")
    return value
