"""A few inputs that tell whether two models are the same, small enough to be written down.

A sample is a tuple of whole numbers: token ids, or the values of a small picture. It says nothing
of answers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.tasks.catalog import Task
from loralab.tasks.encode import require_suited
from loralab.tasks.examples import Ids
from loralab.tasks.kinds.images import PICTURE_SIDE
from loralab.tasks.kinds.kind import MAX_POSITIONS, SAMPLE_TOKENS
from loralab.tasks.kinds.registry import kind_named

__all__ = ["MAX_POSITIONS", "SAMPLES", "TOKENS", "outputs", "patterns", "sample_batch", "sample_inputs"]
SAMPLES, TOKENS = 8, SAMPLE_TOKENS


def sample_inputs(task: Task, tokenizer: Any, *, kind: str, split: str = "validation") -> list[Ids]:
    """Return the first inputs of a split, texts cut to their last tokens, pictures made small.

    Raises:
        DataError: the format does not suit the model.
    """
    require_suited(task, kind)
    return kind_named(kind).sample(task, split, task.splits[split][:SAMPLES], tokenizer)


def patterns() -> list[Ids]:
    """Return small pictures for a vision model whose own data is not known: noise, always the same."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (SAMPLES, PICTURE_SIDE * PICTURE_SIDE * 3), generator=draw)
    return [tuple(row) for row in noise.tolist()]


def sample_batch(sample: Sequence[int], *, kind: str, tokenizer: Any) -> dict[str, Tensor]:
    """Return one sample as a batch of one row."""
    return kind_named(kind).sample_batch(sample, tokenizer)


@torch.no_grad()
def outputs(model: nn.Module, sample: Sequence[int], *, kind: str, tokenizer: Any) -> Tensor:
    """Return the outputs of a model in evaluation mode for a sample, (P, V) in fp32 on the processor.

    Logits of the last positions of a text, or of the classes in one row; the vector of a sentence
    in one row.
    """
    device = next(model.parameters()).device
    batch = sample_batch(sample, kind=kind, tokenizer=tokenizer)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return kind_named(kind).outputs(model, batch).float().cpu()
