"""Weights of several matrices in one parameter, which no layer stands for: experts above all.

Most mixtures of experts keep `gate_up_proj (E, 2 I, H)` and `down_proj (E, H, I)` as parameters of
one module. They are linear maps, and often most of a model, but not layers: expert_lora.py adapts
the module that holds them.
"""

from torch import nn

from loralab.adapters.bases import looks_linear

EXPERTS = "experts kept as one parameter of all"
STACKED = "matrices kept as one parameter"
MIN_SHARE = 0.01  # share of the weights from which matrices that are not experts are worth a word


def stacked_weights(model: nn.Module) -> dict[str, str]:
    """Return the paths of modules with such parameters -> EXPERTS or STACKED."""
    total = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for path, module in model.named_modules():
        if not path or type(module).__module__.startswith("torch.nn") or looks_linear(module):
            continue
        own = [p for n, p in module._parameters.items() if p is not None and _is_weight(n)]
        if _are_experts(path, module) and any(p.ndim >= 2 for p in own):
            found[path] = EXPERTS
        elif MIN_SHARE * total <= sum(p.numel() for p in own if p.ndim == 3 and min(p.shape) > 1):
            found[path] = STACKED
    return found


def adaptable_experts(model: nn.Module) -> dict[str, str]:
    """Return the paths of the parameters that LoRA can adapt -> that of the module of each."""
    owners = [path for path, why in stacked_weights(model).items() if why == EXPERTS]
    return {f"{path}.{name}": path for path in owners for name in expert_parameters(model.get_submodule(path))}


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that hold one matrix for each expert."""
    named = [(name, p) for name, p in module._parameters.items() if p is not None and _is_weight(name)]
    return [n for n, p in named if p.ndim == 3 and p.is_floating_point() and min(p.shape[1:]) > 1]


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module says that its experts are kept as (E, I, O); peft goes by the same mark."""
    return bool(getattr(module, "is_transposed", False))


def share_of(model: nn.Module, paths: list[str]) -> float:
    """Return the share of a model's weights that some modules' own parameters are."""
    total = {id(p): p.numel() for p in model.parameters()}
    own = {id(p) for path in paths for p in model.get_submodule(path).parameters(recurse=False)}
    return sum(total[key] for key in own) / max(1, sum(total.values()))


def _are_experts(path: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    named = "expert" in path.rpartition(".")[2] or "expert" in kind
    return named and "router" not in kind and "gate" not in path.rpartition(".")[2]


def _is_weight(name: str) -> bool:
    return not any(word in name for word in ("embed", "token", "pos_", "norm", "probe", "bias"))
