"""Models of pictures that end in classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.tasks.catalog import Task
from loralab.tasks.examples import Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.kinds.classifier import Classifier

PICTURE_SIDE = 16  # pixels of a small picture, in three colours


class Images(Classifier):
    """A picture and its class. `Pictures` stand in the place of a tokenizer."""

    name = "image-classification"
    formats = ("image-label",)
    pictures = True
    cuttable = False

    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return pictures as they are, not decoded."""
        numbers = {label: index for index, label in enumerate(task.labels)}
        labels = [(numbers[row["label"]],) for row in rows]
        pairs = enumerate(zip(rows, labels, strict=True))
        return Encoded(examples=[Example(index, (), own, image=row["image"]) for index, (row, own) in pairs])

    def collate(self, examples: Sequence[Example], *, pad_id: int, pictures: Any, longest: int) -> dict[str, Tensor]:
        """Return pixel_values (B, C, S, S) and the classes (B,)."""
        pixels = [pictures.pixels(example.image.open()) for example in examples]
        return {"pixel_values": torch.stack(pixels), "labels": self.labels_of(examples, longest)}

    def room(self, context: int, tokenizer: Any) -> int:
        """Return all places, which have no effect."""
        return context

    def sample(self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any) -> list[Ids]:
        """Return the values of small pictures."""
        return [small(row["image"].open()) for row in rows]

    def sample_batch(self, sample: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """Return a small picture as a batch of one."""
        from PIL import Image

        image = Image.frombytes("RGB", (PICTURE_SIDE, PICTURE_SIDE), bytes(sample))
        return {"pixel_values": tokenizer.pixels(image)[None]}

    def noise(self, model: Any) -> list[Example]:
        """Return two pictures."""
        return [Example(number, (), (0,), image=_Grey()) for number in range(2)]


class _Grey:
    """A picture that is nowhere stored."""

    def open(self) -> Any:
        from PIL import Image

        return Image.new("RGB", (8, 8), (99, 128, 155))


def small(image: Any) -> Ids:
    """Return the values of a picture, made small."""
    return tuple(image.convert("RGB").resize((PICTURE_SIDE, PICTURE_SIDE)).tobytes())
