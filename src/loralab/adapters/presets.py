"""Presets "attention" and "mlp": the part of a block that a layer belongs to.

Architectures say it by the names of their modules and classes (transformers': `self_attn`,
`linear_attn`, `feed_forward`, `MambaMixer`, ...). From a layer outwards, the first module that
says something decides; what says nothing within a numbered block belongs to the feed-forward
network, since its layers have the most names. Mixers of recurrent and convolutional blocks,
routers and the like belong to neither.
"""

import re

from torch import nn

ATTENTION, MLP = "attention", "mlp"
CLASSES = {  # how the name of a class ends
    ATTENTION: r"(Attention|Attn)\d*",
    MLP: r"(MLP|Mlp|FeedForward|FFN|MoE|Moe|MoeBlock|MoEBlock|Experts)",
    "": r"(Mamba\d?|Mamba\w*Layer|Mixer|SSM|RecurrentBlock|ShortConv|[ms]?LSTM\w*|Router)",
}
FEED_FORWARD = {"mlp", "mlps", "ffn", "ffns", "ff", "ffw", "moe", "expert", "experts"}
MIXERS = {"mamba", "mixer", "ssm", "conv", "recurrent", "lstm", "mlstm", "slstm", "altup", "laurel"}
NON_NETWORK_LAYERS = ("shared_expert_gate", "linear")  # layers of a block that are not part of its networks
WITHIN_BLOCK = re.compile(r"(?:.*?\.)?\d+\.(.+)")


def place_of(model: nn.Module, path: str) -> str:
    """Tell what a layer is part of: "attention", "mlp", or "" for neither."""
    parts = path.split(".")
    block = WITHIN_BLOCK.fullmatch(path)
    depth = len(block[1].split(".")) if block else len(parts)
    if block and _is_beside(model, path):
        return ""
    for end in range(len(parts), 0, -1):
        within = block is not None and end > len(parts) - depth
        module = model.get_submodule(".".join(parts[:end])) if within else None
        said = _place_named_by(parts[end - 1], module, leaf=end == len(parts))
        if said is not None and (within or said == ATTENTION):
            return said
    return MLP if block else ""


def among_experts(model: nn.Module, path: str) -> bool:
    """Return whether a path is that of experts, or leads through them: each token meets some of them."""
    parts = path.split(".")
    paths = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return any(type(model.get_submodule(own)).__name__.endswith("Experts") for own in paths) or "experts" in parts


def is_router(model: nn.Module, path: str) -> bool:
    """Return whether a module decides which experts a token meets."""
    names = path.split(".")[-2:]
    if type(model.get_submodule(path)).__name__.endswith("Router") or "router" in names:
        return True
    return names[-1] == "gate" and _is_beside(model, path)


def in_attention(path: str) -> bool:
    """Return whether a path leads through attention, by its names alone."""
    said = (_by_name(part, leaf=False) for part in reversed(path.split(".")))
    return next((place for place in said if place is not None), "") == ATTENTION


def _place_named_by(name: str, module: nn.Module | None, *, leaf: bool) -> str | None:
    """Return the part that a module's class, or else its name, names; None if neither does."""
    for place, ending in CLASSES.items():
        if module is not None and not leaf and re.fullmatch(f".*{ending}", type(module).__name__):
            return place
    return _by_name(name, leaf=leaf)


def _by_name(name: str, *, leaf: bool) -> str | None:
    lower = name.lower()
    words = {word.rstrip("0123456789") for word in lower.split("_")}
    if "norm" in lower or words & {"bias", "position"}:
        return None
    if "attn" in lower or "attention" in lower or "att" in words:
        return ATTENTION
    if words & FEED_FORWARD or {"feed", "forward"} <= words or "feedforward" in lower:
        return MLP
    beside = "router" in words or lower.startswith("per_layer_")
    return "" if beside or (words & MIXERS and not leaf) else None


def _is_beside(model: nn.Module, path: str) -> bool:
    """Return whether a plain layer is a router, or a projection between blocks."""
    owner, _, leaf = path.rpartition(".")
    if leaf == "gate":
        return "experts" in dict(model.get_submodule(owner).named_children())
    return leaf in NON_NETWORK_LAYERS and (leaf != "linear" or owner.rpartition(".")[2].isdigit())
