"""inspect(): an adapter folder in numbers, or two of them side by side."""

from pathlib import Path
from typing import Any

from loralab.adapters.spectrum import compare, describe


def inspect(adapter: str | Path, other: str | Path | None = None) -> Any:
    """Return an adapter in numbers: parameters, norms, spectrum, effective rank, digest, base.

    Args:
        other: a second one; the answer is then the overlap of what the two listen to, a dict for
            each module that they share.

    Raises:
        AdapterFileError: a folder cannot be read, or the two share no module.
    """
    return describe(adapter) if other is None else compare(adapter, other)
