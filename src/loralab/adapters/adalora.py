"""AdaLoRA: the update as P diag(lambda) Q, whose smallest triplets are taken away in training.

Source: Zhang et al. 2023, arXiv:2303.10512; equation numbers are the paper's. Three places where
the paper and its code differ, and what is done here:

- The printed budget (14) does not end at the target; the code's form is used (budget.py).
- The regulariser (4) is the un-squared Frobenius norm, averaged over all P and Q, as in the code.
  Its gradient is added to those of P and Q after a backward pass: the reported loss is the task's.
- Equal importances never prune more than asked: exactly the budget's number of triplets stays.

A is Q (R, I), B is P (O, R), E is lambda (R, 1), the names that peft uses.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from loralab.adapters.bases import dense_weight, is_conv1d, is_linear, linear_shape
from loralab.adapters.eager import is_plain_tensor
from loralab.adapters.fused import BaseWithUpdate, can_fuse, linears_with_updates
from loralab.adapters.lora import lora_fields
from loralab.adapters.methods import AdaLoRA, LoRA
from loralab.adapters.peft_fields import PREFIX
from loralab.adapters.split import require_whole
from loralab.adapters.targets import target_names
from loralab.adapters.wrapper import Wrapper, to_wide
from loralab.errors import AdapterFileError, AdapterStateError, ConfigError
from loralab.values import check_count

NAMES = ("lora_A", "lora_B", "lora_E")


class LinearWithAdaLoRA(Wrapper):
    """A frozen linear layer plus (alpha / r) P diag(lambda) Q x, with lambda = 0 at the start."""

    def __init__(self, base: nn.Module, config: AdaLoRA, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        if not is_linear(base):
            raise ConfigError(f"{type(base).__name__} is not a linear layer", code="not_linear", field="target_modules")
        self.config, self.rank = config, config.rank
        self.scaling = config.alpha / config.rank
        self.transposed = is_conv1d(base)
        self.out_features, self.in_features = linear_shape(base)
        self.dropout = nn.Dropout(config.dropout)
        device = self.base.weight.device
        A = nn.init.normal_(torch.empty(config.rank, self.in_features), 0, 0.02, generator)
        B = nn.init.normal_(torch.empty(self.out_features, config.rank), 0, 0.02, generator)
        self.lora_A, self.lora_B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        self.lora_E = nn.Parameter(torch.zeros(config.rank, 1, device=device))
        self.register_buffer("kept", torch.ones(config.rank, dtype=torch.bool, device=device))
        for name in NAMES:
            zeros = torch.zeros_like(getattr(self, name))
            self.register_buffer(f"sensitivity_{name}", zeros)
            self.register_buffer(f"uncertainty_{name}", zeros.clone())
        self._in_step: Tensor | None = None  # lambda, when it was last known to be in step
        self._orthogonality = 0.0
        self._hooks: dict[str, RemovableHandle] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle gets: not the hooks, which are on these parameters."""
        return {**self.__dict__, "_hooks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another one, and regularise as that did."""
        super().__setstate__(state)
        self.regularise(self._orthogonality)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) -> (..., O)."""
        if self.merged:
            return self.base(x)
        if self.training and torch.is_grad_enabled() and type(self.lora_E) is nn.Parameter:
            self._require_stepped()  # torch.func calls with other values than the optimiser's
        # the number of triplets that are left depends on values: a compiler cannot know it
        fixed_size = self.training or not is_plain_tensor(x)
        A, B, factor = self._all() if fixed_size else self.factors()
        if not len(A):
            return self.base(x)
        if can_fuse(self.base, x) and not self._drops:
            return linears_with_updates(x, [BaseWithUpdate(self.base, A, B, factor)])[0]
        y: Tensor = self.base(x)
        low = F.linear(self.dropout(x).to(A.dtype), A)  # (..., R)
        return y + F.linear(low, B).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the triplets that are left, as A (r, I), B (O, r) of a plain LoRA with factor 1."""
        A, B, factor = self._all()
        return A[self.kept], B[:, self.kept], factor

    def tensors(self) -> dict[str, Tensor]:
        """Return what is left as a plain LoRA; empty where no triplet is left."""
        A, B, _ = self.factors()
        return {"lora_A.weight": A, "lora_B.weight": B} if len(A) else {}

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the weight with the update in it."""
        A, B, _ = self.factors()
        total = to_wide(dense_weight(self.base)) + B @ A
        return {"weight": total.T if self.transposed else total}

    def importance(self) -> Tensor:
        """Return S of each triplet (9), (R,): lambda's score plus the mean ones of its P and Q."""
        if self.config.importance == "magnitude":
            return self.lora_E.detach().abs()[:, 0]
        scores = {name: self._score(name) for name in NAMES}
        return scores["lora_E"][:, 0] + scores["lora_A"].mean(1) + scores["lora_B"].mean(0)

    @torch.no_grad()
    def observe(self) -> None:
        """Smooth sensitivity (10, 11) and its uncertainty (12), after the optimiser's step.

        As in the paper's code: the weights after the step times the gradients before it.
        """
        beta1, beta2 = self.config.beta1, self.config.beta2
        for name in NAMES:
            weight: nn.Parameter = getattr(self, name)
            if weight.grad is None:
                raise AdapterStateError(
                    "adapter.step() found no gradients; call it between optimizer.step() and optimizer.zero_grad()",
                    code="no_gradients",
                    field="step",
                )
            now = (weight * weight.grad).abs()
            smooth: Tensor = getattr(self, f"sensitivity_{name}")
            unsure: Tensor = getattr(self, f"uncertainty_{name}")
            smooth.mul_(beta1).add_(now, alpha=1 - beta1)
            unsure.mul_(beta2).add_((now - smooth).abs(), alpha=1 - beta2)

    @torch.no_grad()
    def keep(self, kept: Tensor | None) -> None:
        """Set lambda to zero but for `kept` (R,); None lets pruned triplets that grew come back."""
        if kept is None:
            self.kept.logical_or_(self.lora_E[:, 0] != 0)
        else:
            self.kept.copy_(kept)
            self.lora_E[~self.kept] = 0.0
        self._in_step = self.lora_E.detach().clone()

    def regularise(self, weight: float) -> None:
        """Add the gradient of weight * |Q Q' - I| and |P' P - I| (4) at the next backward pass.

        Nothing is added, and what was to be is forgotten, with a weight of 0.
        """
        self._orthogonality = weight
        for name in ("lora_A", "lora_B"):
            parameter: nn.Parameter = getattr(self, name)
            pending = [True]  # once a step, however many backward passes it accumulates

            def add(p: Tensor, name: str = name, pending: list[bool] = pending) -> None:
                if pending and p.grad is not None:
                    require_whole([p], "AdaLoRA", "take lora, or split the base alone")
                    pending.clear()
                    p.grad += weight * _orthogonality_gradient(p.detach(), rows=name == "lora_A")

            if name in self._hooks:
                self._hooks.pop(name).remove()
            if weight:
                learns = parameter.requires_grad  # not while another adapter acts
                self._hooks[name] = parameter.requires_grad_().register_post_accumulate_grad_hook(add)
                parameter.requires_grad_(learns)

    def refreshed(self) -> None:
        """Take note that the weights were set from outside."""
        self._in_step = None

    def extra_repr(self) -> str:
        """Return the ranks and scaling, for print(model)."""
        return f"rank={int(self.kept.sum())} of {self.rank}, scaling={self.scaling:g}"

    @property
    def _drops(self) -> bool:
        return bool(self.training and self.dropout.p)

    def _all(self) -> tuple[Tensor, Tensor, float]:
        """Return all triplets; outside training, lambda is 0 for those that were taken away."""
        E: Tensor = self.lora_E.T * self.scaling  # (1, R)
        return self.lora_A, self.lora_B * (E if self.training else E * self.kept), 1.0

    def _score(self, name: str) -> Tensor:
        smooth: Tensor = getattr(self, f"sensitivity_{name}")
        if self.config.importance == "sensitivity":
            return smooth
        return smooth * getattr(self, f"uncertainty_{name}")  # (13)

    def _require_stepped(self) -> None:
        # by value: fused optimisers do not count up the tensor's version
        now = self.lora_E.detach()
        if self._in_step is None:
            self._in_step = now.clone()
        elif not torch.equal(now, self._in_step.to(now.device)):
            raise AdapterStateError(
                "the optimiser has stepped and adapter.step() was not called: no rank would ever "
                "be taken away; call it once after every optimizer.step()",
                code="step_not_called",
                field="step",
            )


def build(model: nn.Module, config: AdaLoRA, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path."""
    names: Sequence[str] = target_names(model, config)
    return {n: LinearWithAdaLoRA(model.get_submodule(n), config, generator) for n in names}


def fields(config: AdaLoRA, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: what is left is a plain LoRA, with a rank for each module."""
    left = {name: module for name, module in modules.items() if bool(module.kept.any())}
    ranks = [len(module.tensors()["lora_A.weight"]) for module in left.values()]
    usual = statistics.mode(ranks)
    shown = LoRA(rank=usual, alpha=usual, dropout=config.dropout, modules_to_save=config.modules_to_save)
    return lora_fields(shown, left, paths, factor=1.0)


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[LoRA, Mapping[str, Tensor]]:
    """Return the plain LoRA that peft's ADALORA file amounts to: lambda and the factor go into B.

    peft divides by init_r + 1e-5, whatever ranks are left; modules without any are left out.
    """
    check_count("init_r", fields["init_r"])
    factor = (fields["lora_alpha"] or fields["init_r"]) / (fields["init_r"] + 1e-5)
    found = {k: t for k, t in tensors.items() if not k.endswith(NAMES)}
    ranks = {}
    for key in (k for k in tensors if k.endswith(".lora_E")):
        path = key.removesuffix(".lora_E")
        E, A, B = tensors[key], tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
        if not E.ndim == A.ndim == B.ndim == 2:
            raise AdapterFileError(
                f"lora_E, lora_A and lora_B of {path} must have two dimensions", code="wrong_shape", field=path
            )
        if len(A):
            ranks[path.removeprefix(PREFIX)] = len(A)
            found[f"{path}.lora_A.weight"] = A
            found[f"{path}.lora_B.weight"] = B * (E.T * factor)
    if not ranks:
        raise AdapterFileError(
            "every module of this AdaLoRA file has rank 0: it holds nothing", code="no_ranks", field="rank"
        )
    patterns = {re.escape(name): rank for name, rank in sorted(ranks.items(), key=_longest)}
    config = LoRA(
        rank=max(ranks.values()),
        alpha=max(ranks.values()),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules="|".join(map(re.escape, ranks)),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )
    return config, found


def _longest(item: tuple[str, int]) -> int:
    return -len(item[0])


def _orthogonality_gradient(weight: Tensor, *, rows: bool) -> Tensor:
    """Return d |W W' - I| / dW for orthogonal rows, d |W' W - I| / dW for columns; Frobenius norm."""
    own = weight if rows else weight.T  # (R, n)
    gap = own @ own.T - torch.eye(len(own), device=own.device)
    gradient = 2 * (gap @ own) / gap.norm().clamp_min(1e-12)
    return gradient if rows else gradient.T
