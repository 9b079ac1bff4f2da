"""Language models that read pictures in a text, through their own processor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.errors import DataError
from loralab.tasks import encode
from loralab.tasks.batches import padded
from loralab.tasks.catalog import Task
from loralab.tasks.examples import Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.generation import Beside
from loralab.tasks.kinds.causal import Causal
from loralab.tasks.kinds.images import PICTURE_SIDE, small
from loralab.tasks.kinds.kind import SAMPLE_TOKENS
from loralab.tasks.pictured import TYPES, Segment, inputs_of, processed

PIXELS = PICTURE_SIDE * PICTURE_SIDE * 3  # values of a small picture
MAX_SAMPLED_PICTURES = 2
WITH_PICTURES = 1 << 62  # no id of a token: a sample begins with this and the number of its pictures


class ImageText(Causal):
    """A decoder with a tower: conversations with pictures in their questions, or without.

    An example has the ids of the processor, `token_types` of its own or none, and its pictures, which
    are made into pixels batch by batch.
    """

    name = "image-text-to-text"
    sees = True

    def collate(self, examples: Sequence[Example], *, pad_id: int, pictures: Any, longest: int) -> dict[str, Tensor]:
        """Return padded ids, the types of tokens, and what the processor makes of the rows' pictures."""
        batch = super().collate(examples, pad_id=pad_id, pictures=pictures, longest=longest)
        types = padded([example.token_types or (0,) * len(example.input_ids) for example in examples], 0, longest)[0]
        batch |= dict.fromkeys(TYPES, types)
        return batch | inputs_of(pictures, [_opened(example.image) for example in examples])

    def sample(self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any) -> list[Ids]:
        """Return the ends of what the model sees before it answers; of a row with pictures, these too."""
        return [_sample(task, row, tokenizer) for row in rows]

    def sample_batch(self, sample: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """Return such an input as a batch of one row."""
        if sample[0] < WITH_PICTURES:
            batch = super().sample_batch(sample, tokenizer)
            return batch | dict.fromkeys(TYPES, torch.zeros_like(batch["input_ids"]))
        text, pictures = _shown(sample)
        made = processed(tokenizer, [text], [pictures], return_tensors="pt")
        types = next((made[name] for name in TYPES if name in made), torch.zeros_like(made["input_ids"]))
        return {**made, **dict.fromkeys(TYPES, types)}

    def noise(self, model: Any) -> list[Example]:
        """Return rows of unequal length of common ids, none of which stands for a picture."""
        own = vars(model.config)
        taken = {own[name] for name in own if name.endswith(("token_id", "token_index")) and isinstance(own[name], int)}
        free = next(number for number in range(len(taken) + 1) if number not in taken)
        rows = super().noise(model)
        drawn = [tuple(free if token in taken else token for token in row.input_ids) for row in rows]
        return [self.noise_row(number, ids, model.config) for number, ids in enumerate(drawn)]

    def beside(self, task: Task, rows: Sequence[Row], tokenizer: Any) -> Beside:
        """Return what gives the pictures of questions, and the types of their tokens (B, L), padded on the left."""
        return beside(tokenizer, [encode.asked(task, row, tokenizer) for row in rows])


def beside(tokenizer: Any, asked: Sequence[Segment]) -> Beside:
    """Return what gives the inputs of some questions beside their ids."""

    def inputs(numbers: Sequence[int], ids: Tensor) -> dict[str, Tensor]:
        chosen = [asked[number] for number in numbers]
        types = torch.zeros_like(ids)
        for place, own in enumerate(chosen):
            types[place, ids.shape[1] - len(own.ids) :] = torch.tensor(own.types or (0,) * len(own.ids))
        return inputs_of(tokenizer, [_opened(own.pictures) for own in chosen]) | dict.fromkeys(TYPES, types)

    return inputs


def _opened(pictures: Sequence[Any] | None) -> list[Any]:
    return [picture.open() for picture in pictures or ()]


def _sample(task: Task, row: Row, tokenizer: Any) -> Ids:
    """Return the ids of a text; or the number of pictures, their values made small, and the text's codes.

    Of the pictures the first are taken, of the text what stands behind the last.
    """
    if not row.get("images"):
        return encode.prompt_ids(task, row, tokenizer)[-SAMPLE_TOKENS:]
    asked = encode.asked(task, row, tokenizer)
    taken = asked.pictures[:MAX_SAMPLED_PICTURES]
    token = tokenizer.processor.image_token
    text = token * len(taken) + asked.text.rpartition(token)[2][-4 * SAMPLE_TOKENS :]
    values = [value for picture in taken for value in small(picture.open())]
    return (WITH_PICTURES + len(taken), *values, *map(ord, text))


def _shown(sample: Sequence[int]) -> tuple[str, list[Any]]:
    """Return the text and the pictures of a sample.

    Raises:
        DataError: it is not one that was made here.
    """
    from PIL import Image

    end = 1 + min(sample[0] - WITH_PICTURES, MAX_SAMPLED_PICTURES) * PIXELS
    side = (PICTURE_SIDE, PICTURE_SIDE)
    try:
        values = [bytes(sample[start : start + PIXELS]) for start in range(1, end, PIXELS)]
        return "".join(map(chr, sample[end:])), [Image.frombytes("RGB", side, own) for own in values]
    except (ValueError, OverflowError) as error:
        raise DataError(f"a sample with pictures is damaged: {error}", code="damaged", field="sample") from None
