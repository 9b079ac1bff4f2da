"""A few inputs that tell whether two models are the same, small enough to be written down.

A sample is a tuple of whole numbers: token ids, or the values of a small picture. It says nothing
of answers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode, prompt_ids
from loralab.tasks.examples import Ids
from loralab.tasks.forward import call, embed

VISION = "image-classification"
SAMPLES, TOKENS = 8, 64
PICTURE_SIDE = 16  # pixels of a small picture, in three colours
MAX_POSITIONS = 16  # at the end of each text


def sample_inputs(task: Task, tokenizer: Any, *, kind: str, split: str = "validation") -> list[Ids]:
    """Return the first inputs of a split, texts cut to their last tokens, pictures made small.

    Raises:
        DataError: the format does not suit the model.
    """
    rows = task.splits[split][:SAMPLES]
    if kind == VISION:
        return [_small(row["image"].open()) for row in rows]
    if kind == "causal-lm":
        return [prompt_ids(task, row, tokenizer)[-TOKENS:] for row in rows]
    encoded = encode(task, split, tokenizer, kind=kind, max_length=TOKENS, rows=rows)
    return [example.input_ids for example in encoded.examples]


def patterns() -> list[Ids]:
    """Return small pictures for a vision model whose own data is not known: noise, always the same."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (SAMPLES, PICTURE_SIDE * PICTURE_SIDE * 3), generator=draw)
    return [tuple(row) for row in noise.tolist()]


def sample_batch(sample: Sequence[int], *, kind: str, tokenizer: Any) -> dict[str, Tensor]:
    """Return one sample as a batch of one row."""
    if kind == VISION:
        from PIL import Image

        image = Image.frombytes("RGB", (PICTURE_SIDE, PICTURE_SIDE), bytes(sample))
        return {"pixel_values": tokenizer.pixels(image)[None]}
    ids = torch.tensor([list(sample)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def outputs(model: nn.Module, sample: Sequence[int], *, kind: str, tokenizer: Any) -> Tensor:
    """Return the outputs of a model in evaluation mode for a sample, (P, V) in fp32 on the processor.

    Logits of the last positions of a text, or of the classes in one row; the vector of a sentence
    in one row.
    """
    device = next(model.parameters()).device
    batch = sample_batch(sample, kind=kind, tokenizer=tokenizer)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    found = embed(model, batch) if kind == "sentence-encoder" else call(model, batch)
    if kind in ("causal-lm", "token-classification"):
        found = found[0, -MAX_POSITIONS:]
    return found.float().cpu()


def _small(image: Any) -> Ids:
    return tuple(image.convert("RGB").resize((PICTURE_SIDE, PICTURE_SIDE)).tobytes())
