"""The same tensor under the names of two files: tools put other prefixes in front of them."""

from collections.abc import Callable, Iterable, Mapping

SHELLS = {"model", "language_model", "base_model", "_orig_mod", "module", "base_layer", "text_model"}
BUFFERS = (  # numbers that a model works out itself, and that some versions of libraries write
    "inv_freq",
    ".attn.bias",
    ".attention.bias",
    "masked_bias",
    "position_ids",
    "num_batches_tracked",
    "relative_position_index",
)


def aligned(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Return which of `others` each of `names` is, of those that one can tell.

    >>> aligned(["model.layers.0.weight"], ["base_model.model.model.layers.0.weight"])
    {'model.layers.0.weight': 'base_model.model.model.layers.0.weight'}
    """
    left, right = list(names), set(others)
    found = {name: name for name in left if name in right}
    steps: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
        (bare, bare),
        (_without_first, bare),
        (bare, _without_first),
    )
    for own, other in steps:
        taken = set(found.values())
        here = _unique((name for name in left if name not in found), own)
        there = _unique((name for name in right if name not in taken), other)
        found |= {here[key]: there[key] for key in here.keys() & there.keys()}
    return found


def bare(name: str) -> str:
    """Return a name without wrappers and backbones."""
    return ".".join(part for part in name.split(".") if part not in SHELLS)


def is_buffer(name: str) -> bool:
    """Return whether a tensor is no parameter by its name."""
    return name.endswith(BUFFERS)


def _without_first(name: str) -> str:
    """Return a name without that of its backbone, such as `bert` or `transformer`."""
    return bare(name).partition(".")[2]


def _unique(names: Iterable[str], key: Callable[[str], str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    twice = set()
    for name in names:
        own = key(name)
        if own in found:
            twice.add(own)
        found[own] = name
    return {own: name for own, name in found.items() if own not in twice and own}
