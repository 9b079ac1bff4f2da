"""Signs that a run cannot learn: seen before its first step, and after the first few.

They ask for an adapter and nothing else, so that any training loop can look for them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.paths import inside
from loralab.adapters.targets import outer_names
from loralab.adapters.towers import tower_of
from loralab.errors import AdapterStateError, LearningError, join_limited

FIRST_LOOK, SECOND_LOOK = 1, 3  # steps after which gradients, and then weights, are checked
NO_EARLY_GRADIENT = (".lora_E", ".trainable_tokens_delta")  # lambda can be pruned; a token's row waits for it


def require_trainable(adapter: Adapter, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that does not hold exactly what the adapter trains.

    Raises:
        AdapterStateError: the adapter is merged, or its layers are not those of the model.
        LearningError: nothing requires a gradient, or the optimizer holds less or more.
    """
    if adapter.merged:
        raise AdapterStateError(
            "the adapter is merged, so its update would be learnt and not used; call unmerge()",
            code="merged",
            field="adapter",
        )
    named = {n: p for n, p in adapter.named_parameters().items() if p.requires_grad and p.numel()}
    if not named:
        raise LearningError(
            "no parameter of the adapter requires a gradient, so nothing would be learnt; of "
            "several adapters the active one trains",
            code="nothing_trains",
            field="adapter",
        )
    others = {id(p): name for name, p in model.named_parameters()}
    if outside := [name for name, p in named.items() if id(p) not in others]:
        raise AdapterStateError(
            f"the trained model does not hold the adapter's {join_limited(outside)}; give the trainer the "
            "model that the adapter is attached to, and no copy of it",
            code="other_model",
            field="model",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if missing := [name for name, p in named.items() if id(p) not in held]:
        raise LearningError(
            f"the optimizer does not hold the adapter's {join_limited(missing)}; make it after attach, "
            "from adapter.parameters()",
            code="optimizer_lacks",
            field="optimizer",
        )
    if extra := held - {id(p) for p in named.values()}:
        names = sorted(others.get(number, "a tensor outside the model") for number in extra)
        raise LearningError(
            f"the optimizer also holds {join_limited(names)}, which no adapter folder would hold; freeze "
            "it, or name its module in modules_to_save",
            code="optimizer_holds_more",
            field="optimizer",
        )


def require_gradients(adapter: Adapter) -> None:
    """Refuse a first step in which a trained tensor gets no gradient.

    Raises:
        LearningError: names the tensors.
    """
    named = trained(adapter)
    without = [name for name, parameter in named.items() if parameter.grad is None]
    if without and not _may_miss(adapter, without):
        raise LearningError(
            f"no gradient reaches {join_limited(without)}; nothing would be learnt there",
            code="no_gradient",
            field=without[0],
        )


def not_finite(adapter: Adapter, step: int) -> LearningError:
    """Return the error of a step, counted from 1, whose gradient is not finite."""
    named = adapter.named_parameters()
    bad = [n for n, p in named.items() if p.grad is not None and not is_finite(p.grad)]
    return LearningError(
        f"step {step}: the gradient is not finite in {join_limited(bad) or 'its norm'}; "
        "lower the learning rate or use --precision fp32",
        code="gradient_not_finite",
        field=bad[0] if bad else None,
    )


def start_of(adapter: Adapter) -> dict[str, Tensor]:
    """Copy what is trained, for `require_moved`."""
    return {name: p.detach().clone() for name, p in trained(adapter).items()}


def require_moved(adapter: Adapter, started: Mapping[str, Tensor]) -> None:
    """Refuse a run where after some steps a factor that learns first, or a module trained in full, is at its start.

    Raises:
        LearningError: names the tensors that do not.
    """
    still = [
        name
        for name, parameter in trained(adapter).items()
        if not _may_rest(name, started) and torch.equal(parameter, started[name])
    ]
    if still and not _may_miss(adapter, still):
        raise LearningError(
            f"after {SECOND_LOOK} steps these have not moved: {join_limited(still)}", code="not_moved", field=still[0]
        )


def trained(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Return what an optimizer changes, by path."""
    return {name: p for name, p in adapter.named_parameters().items() if p.requires_grad}


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite."""
    return bool(tensor.isfinite().all())


def _may_rest(name: str, started: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor may be still after some steps: of A and B the one whose partner starts at zero."""
    path, _, end = name.rpartition(".")
    if end in ("lora_A", "out_A", "lora_B", "out_B"):
        first = started.get(f"{path}.{end[:-1]}A")
        return end.endswith("B") == (first is not None and not first.any())
    return name.endswith(NO_EARLY_GRADIENT)


def _may_miss(adapter: Adapter, names: Sequence[str]) -> bool:
    """Return whether tensors may be idle in some steps.

    So may weights that exist already, though not all of them; and those in towers, where no row has a picture.
    """
    if len(names) == len(adapter.parameters()):
        return False
    return adapter.spec.trains_base or len(in_towers(adapter, names)) == len(names)


def in_towers(adapter: Adapter, names: Sequence[str]) -> list[str]:
    """Return those of an adapter's tensors that are beside the language part of its model."""
    modules = list(adapter.modules)
    towers = tower_of(adapter.model, modules, outer_names(adapter.model))
    return [name for name in names if inside(name, towers)]
