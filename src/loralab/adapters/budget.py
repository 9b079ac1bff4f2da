"""AdaLoRA's budget: how many triplets stay, and which.

Source: Zhang et al. 2023, arXiv:2303.10512, section 3.3; the order of things is that of the
paper's code: importance is observed after the optimiser's step, before the gradients are dropped.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from loralab.adapters.adalora import LinearWithAdaLoRA
from loralab.adapters.methods import AdaLoRA
from loralab.errors import ConfigError


class RankBudget:
    """Choose which triplets of all modules stay; advanced once an optimiser step.

    Raises:
        ConfigError: the steps are unknown, or leave no time for pruning.
    """

    def __init__(self, modules: Mapping[str, LinearWithAdaLoRA], config: AdaLoRA) -> None:
        self.modules, self.config = dict(modules), config
        self.done = torch.zeros((), dtype=torch.int64)
        self.total_steps = config.total_steps
        self.regularises = True
        self._regularise()

    def leave_regularising(self) -> None:
        """Leave the regulariser's gradient to another process, which adds it before those of all are summed."""
        self.regularises = False
        self._regularise()

    def plan(self, steps: int) -> None:
        """Set the steps of the whole run, where the configuration leaves them open.

        Raises:
            ConfigError: the steps are not those of the configuration, or leave no time for pruning.
        """
        if self.total_steps not in (None, steps):
            raise ConfigError(
                f"total_steps is {self.total_steps}, but the run has {steps} steps",
                code="other_total_steps",
                field="total_steps",
            )
        pruning_window(self.config, steps)
        self.total_steps = steps

    def step(self) -> None:
        """Observe, and prune where it is time to."""
        total = self._steps()
        self.done += 1
        now = int(self.done)
        first, last = pruning_window(self.config, total)
        if now < last or last == 0:
            for module in self.modules.values():
                module.observe()
        due = first < now < last and now % self.config.interval == 0
        if due or now >= last:
            self._allocate(budget_at(now, self.config, len(self.modules), total), frozen=now > last)
        else:
            for module in self.modules.values():
                module.keep(None)
        self._regularise()

    @property
    def ranks(self) -> dict[str, int]:
        """Return the triplets that each module has left."""
        return {name: int(module.kept.sum()) for name, module in self.modules.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that resuming needs."""
        return {"budget.step": self.done}

    def _allocate(self, budget: int, *, frozen: bool) -> None:
        modules = list(self.modules.values())
        if frozen:
            choice = [module.kept.clone() for module in modules]
        else:
            scores = torch.cat([module.importance() for module in modules])
            order = scores.argsort(descending=True, stable=True)
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen[order[:budget]] = True
            choice = list(chosen.split([module.rank for module in modules]))
        for module, kept in zip(modules, choice, strict=True):
            module.keep(kept)

    def _regularise(self) -> None:
        weight = self.config.orthogonality / (2 * len(self.modules)) * self.regularises
        for module in self.modules.values():
            module.regularise(weight)

    def _steps(self) -> int:
        if self.total_steps is None:
            raise ConfigError(
                "AdaLoRA needs total_steps, the optimiser steps of the whole run",
                code="missing_total_steps",
                field="total_steps",
            )
        return self.total_steps


def budget_at(step: int, config: AdaLoRA, modules: int, total: int) -> int:
    """Return the triplets that stay after `step` steps: (14), corrected to end at the target.

    b0 up to t_i, bT from T - t_f on, and between them bT + (b0 - bT) (1 - (t - t_i) /
    (T - t_f - t_i))^3.
    """
    start, target = config.rank * modules, config.target_rank * modules
    first, last = pruning_window(config, total)
    if step <= first:
        return start
    if step >= last:
        return target
    return int(target + (start - target) * (1 - (step - first) / (last - first)) ** 3)


def pruning_window(config: AdaLoRA, total: int) -> tuple[int, int]:
    """Return the step after which pruning begins, t_i, and the one with which it ends, T - t_f.

    Raises:
        ConfigError: nothing is left between them.
    """
    first = total // 10 if config.initial_steps is None else config.initial_steps
    final = 3 * total // 10 if config.final_steps is None else config.final_steps
    if first >= total - final:
        raise ConfigError(
            f"of {total} steps, initial_steps {first} and final_steps {final} leave none for taking ranks away",
            code="no_steps_left",
            field="total_steps",
        )
    return first, total - final
