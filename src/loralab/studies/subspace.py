"""Training in a random subspace: all weights move, but only along d directions drawn beforehand.

Source: Aghajanyan et al. 2020, arXiv:2012.13255. DID (equation 1): theta = theta0 + P theta_d.
SAID (equation 3): theta_i = theta0_i + lambda_i (P theta_{d - m})_i, one learnt lambda for each
of m layers. Everything but the tables of embeddings goes through P, a new head included: a step
reads few rows of a table. theta_d starts at zero: step 0 is the base model.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loralab.adapters.paths import layer_number
from loralab.errors import ConfigError, LearningError
from loralab.models.load import Base
from loralab.studies.fastfood import Fastfood
from loralab.tasks.batches import Batches, collate
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.examples import Example
from loralab.tasks.forward import answer_loss
from loralab.training.optim import learning_rate
from loralab.training.settings import Training

VARIANTS = ("did", "said")


class Subspace(nn.Module):
    """A frozen model whose weights are read at theta0 + P theta_d.

    Args:
        module: kept and frozen.
        size: d, all that is trained, the m lambdas of SAID included.
        variant: one of VARIANTS.
        generator: of P.

    Raises:
        ConfigError: SAID has nothing left for theta beside its lambdas.
    """

    def __init__(self, module: nn.Module, size: int, variant: str, generator: torch.Generator) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.start = moving(module)
        numbers = [layer_number(name) for name in self.start]  # None is outside of all layers
        layers = list(dict.fromkeys(numbers))
        self.layer = [layers.index(number) for number in numbers]
        scales = len(layers) if variant == "said" else 0
        if size <= scales:
            needed = f"said has {scales} layers here, so d must be above that; got {size}"
            raise ConfigError(needed, code="wrong_value", field="values")
        device = next(iter(self.start.values())).device
        self.theta = nn.Parameter(torch.zeros(size - scales, device=device))
        self.scales = nn.Parameter(torch.ones(scales, device=device)) if scales else None
        self.project = Fastfood(size - scales, self.large, generator).to(device)

    @property
    def large(self) -> int:
        """Return D: how many weights move."""
        return sum(value.numel() for value in self.start.values())

    def trained(self) -> list[nn.Parameter]:
        """Return theta_d, and the lambdas."""
        return [self.theta, *([] if self.scales is None else [self.scales])]

    def values(self) -> dict[str, Tensor]:
        """Return every weight that moves, where it is now, in its own dtype."""
        parts = self.project(self.theta).split([value.numel() for value in self.start.values()])
        found = {}
        for layer, part, (name, start) in zip(self.layer, parts, self.start.items(), strict=True):
            own = part if self.scales is None else self.scales[layer] * part
            found[name] = (start.float() + own.view_as(start)).to(start.dtype)
        return found

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the model with these weights."""
        return functional_call(self.module, self.values(), inputs, named)

    @torch.no_grad()
    def settle(self) -> nn.Module:
        """Write these weights into the model, and return it."""
        own = dict(self.module.named_parameters())
        for name, value in self.values().items():
            own[name].copy_(value)
        return self.module


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every weight that goes through P: all but the tables of embeddings."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(p) for table in tables for p in table.parameters(recurse=False)}
    return {name: value.detach().clone() for name, value in model.named_parameters() if id(value) not in left_out}


def fit(subspace: Subspace, base: Base, task: Task, training: Training) -> list[float]:
    """Train with AdamW as `train` does: same rows, same order, same schedule; return the losses.

    Raises:
        LearningError: the loss is not finite.
    """
    assert training.max_steps is not None
    examples = encode(task, "train", base.tokenizer, kind=base.kind, max_length=training.max_length).examples
    batches = Batches(lengths=tuple(e.length for e in examples), batch_size=training.batch_size, seed=training.seed)
    optimizer = torch.optim.AdamW(subspace.trained(), weight_decay=0.0)
    losses = []
    subspace.train()
    for step in range(training.max_steps):
        (rows,) = batches.step(step)
        batch = together(base, [examples[i] for i in rows])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step, training.max_steps)
        loss, count = answer_loss(subspace, batch, base.kind)
        if not math.isfinite(loss.item()):
            where = f"step {step + 1}: the loss is not finite; lower the learning rate"
            raise LearningError(where, code="loss_not_finite", field="loss")
        (loss / max(1, count)).backward()
        nn.utils.clip_grad_norm_(subspace.trained(), training.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / max(1, count))
    subspace.eval()
    return losses


def together(base: Base, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return examples as one batch, where the model is."""
    device = next(base.model.parameters()).device
    batch = collate(examples, pad_id=base.tokenizer.pad_token_id or 0, kind=base.kind, pictures=base.tokenizer)
    return {name: tensor.to(device) for name, tensor in batch.items()}
