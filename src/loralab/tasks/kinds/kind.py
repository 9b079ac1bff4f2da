"""Kind of a model: how rows become numbers, a loss and a score.

One object for each kind answers everything that differs between them, so that nobody compares
names. What a kind does not say itself is what a reader of one text does.
Axes: B rows, L tokens of a padded row, C classes, M labels that carry loss, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.progress import Listener
from loralab.tasks.batches import padded, texts_of
from loralab.tasks.catalog import Task
from loralab.tasks.examples import IGNORED, Encoded, Example, Ids
from loralab.tasks.formats import Row
from loralab.tasks.forward import ProcessGroup, call

PROBE_LENGTHS = (7, 1, 5, 12)  # tokens of the rows that are compared
PROBE_VOCABULARY = 1000  # ids of them, of a model that counts none too
SAMPLE_TOKENS = 64
MAX_POSITIONS = 16  # at the end of each text


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Rows to score, and what with; `room` is the most tokens that one may have."""

    model: nn.Module
    tokenizer: Any
    task: Task
    encoded: Encoded
    rows: Sequence[Row]
    batch_size: int
    room: int
    among: ProcessGroup | None = None
    generate: bool = False
    max_new_tokens: int = 128
    listener: Listener | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Metrics, and the answer to each row; `row_losses` where losses were taken row by row."""

    metrics: dict[str, float]
    written: Sequence[str]
    row_losses: Sequence[float] = field(default=())


class Kind(ABC):
    """One kind of model.

    Attributes:
        name: as models/kinds.py and the records call it.
        formats: of rows that it learns from (formats.py).
        headed: whether it ends in outputs of its own, of which a new one is trained whole.
        pictures: whether it reads pictures, not text.
        sees: whether it reads pictures in a text.
        writes: whether it answers in text.
        asks: whether it reads a question before a text to classify.
        packs: whether its rows may stand one after the other without padding.
        rows_meet: whether the rows of a pass are compared with each other.
        cuttable: whether a pass may be cut without changing more than memory.
        must_fit: whether a row that is longer than the context cannot be scored.
        main: metrics that may decide which of two models is better, the first that was measured.
    """

    name: str
    formats: tuple[str, ...]
    headed = False
    pictures = False
    sees = False
    writes = False
    asks = False
    packs = False
    rows_meet = False
    cuttable = True
    must_fit = False
    main: tuple[str, ...] = ("accuracy", "loss")

    @abstractmethod
    def encode(
        self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any, *, max_length: int, loss_on: str
    ) -> Encoded:
        """Return the rows of a split as examples of at most `max_length` tokens."""

    @abstractmethod
    def score(self, given: Scoring) -> Scored:
        """Score rows; the model is in evaluation mode, without gradients."""

    def check(self, task: Task, tokenizer: Any) -> None:
        """Refuse at once what `encode` would refuse at the first row; most have nothing to look at."""
        return

    def scale(self, task: Task) -> float | None:
        """Return what scores are divided by; None where they are learnt as they are."""
        return None

    def collate(self, examples: Sequence[Example], *, pad_id: int, pictures: Any, longest: int) -> dict[str, Tensor]:
        """Return the inputs of a model, and the labels; `batches.collate` says more."""
        return texts_of(examples, pad_id, longest) | {"labels": self.labels_of(examples, longest)}

    def labels_of(self, examples: Sequence[Example], longest: int) -> Tensor:
        """Return the labels of a batch: one class a row, (B,)."""
        return torch.tensor([example.labels[0] for example in examples])

    def labelled(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs (M, ...) as the model gives them, labels (M, ...) and rows (M,) of all that carries loss."""
        labels = batch["labels"]
        return call(model, batch), labels, torch.arange(len(labels), device=labels.device)

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each row of outputs, in fp32."""
        return F.cross_entropy(outputs.float(), labels, reduction="none")

    def summed(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses, ()."""
        return F.cross_entropy(outputs.float(), labels, reduction="sum")

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Return the summed loss of a batch and how many labels it sums over; differentiable."""
        outputs, labels, _ = self.labelled(model, batch)
        return self.summed(outputs, labels), labels.numel()

    def count(self, example: Example) -> int:
        """Count the labels of a row that carry loss."""
        return sum(label != IGNORED for label in example.labels)

    def of_job(self, outputs: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Return the outputs and labels of one of several jobs, whose heads may have more classes."""
        return outputs[..., :classes], labels

    def room(self, context: int, tokenizer: Any) -> int:
        """Return the most tokens of a row, of a model that has so many places."""
        return int(min(context, tokenizer.model_max_length))

    def sample(self, task: Task, split: str, rows: Sequence[Row], tokenizer: Any) -> list[Ids]:
        """Return rows as small inputs that tell whether two models are the same (samples.py)."""
        encoded = self.encode(task, split, rows, tokenizer, max_length=SAMPLE_TOKENS, loss_on="answer")
        return [example.input_ids for example in encoded.examples]

    def sample_batch(self, sample: Sequence[int], tokenizer: Any) -> dict[str, Tensor]:
        """Return one such input as a batch of one row."""
        ids = torch.tensor([list(sample)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def outputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return all that a model makes of such a batch, (P, V)."""
        return call(model, batch)

    def noise(self, model: Any) -> list[Example]:
        """Return rows of unequal length of common ids, with loss on some of their tokens."""
        draw = torch.Generator().manual_seed(0)
        config = model.config.get_text_config()
        words = min(getattr(config, "vocab_size", PROBE_VOCABULARY), PROBE_VOCABULARY)
        drawn = [tuple(torch.randint(words, (length,), generator=draw).tolist()) for length in PROBE_LENGTHS]
        return [self.noise_row(number, ids, config) for number, ids in enumerate(drawn)]

    def noise_row(self, number: int, ids: Ids, config: Any) -> Example:
        """Return an example with some token ids."""
        return Example(number, ids, (0,))

    def stop_ids(self, tokenizer: Any) -> Ids:
        """Return the ids that end an answer; none of models that do not write."""
        return ()


def token_labels(examples: Sequence[Example], longest: int) -> Tensor:
    """Return the labels of each token, (B, L), -100 where there is none."""
    return padded([example.labels for example in examples], IGNORED, longest)[0]
