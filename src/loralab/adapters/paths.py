"""Paths of modules: what they end with, lead through, and which block they are in.

A name means a path where it is the path or its end, cut at a dot, as in peft.
"""

import re
from collections.abc import Iterable, Sequence

from loralab.adapters.expressions import matches
from loralab.adapters.methods import Names


def ends_with(path: str, wanted: str) -> bool:
    """Return whether `wanted` is the path or its end, cut at a dot."""
    return path == wanted or path.endswith("." + wanted)


def inside(path: str, parents: Iterable[str]) -> bool:
    """Return whether a path is one of some paths, or leads through one."""
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def selected_by(path: str, names: Names) -> bool:
    """Return whether names, or an expression for the whole path, select a path; None selects none."""
    if isinstance(names, str):
        return matches(names, path)
    return any(ends_with(path, name) for name in names or ())


def matches_pattern(path: str, pattern: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern means this path."""
    return matches(rf"(.*\.)?({pattern})", path)


def layer_number(path: str, patterns: Sequence[str] = ()) -> int | None:
    """Return the first number in a path, which is its block (later ones are experts); None outside."""
    for pattern in map(re.escape, patterns) if patterns else (r"[^.]+",):
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(found[1])
    return None


def endings(paths: Iterable[str]) -> list[str]:
    """Return the last name of each path, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
