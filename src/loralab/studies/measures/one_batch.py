"""The first training rows of a study as one batch: what is measured without a run of its own."""

from collections.abc import Callable

from torch import Tensor

from loralab.models.load import Base
from loralab.studies.study import StudySetup
from loralab.studies.subspace import together
from loralab.tasks.catalog import Task
from loralab.tasks.encode import encode
from loralab.tasks.forward import answer_loss

ROWS = 16


def first_rows(setup: StudySetup, base: Base, task: Task) -> dict[str, Tensor]:
    """Return the first rows of train as the model reads them, padded."""
    rows = task.splits["train"][:ROWS]
    encoded = encode(task, "train", base.tokenizer, kind=base.kind, max_length=setup.max_length, rows=rows)
    return together(base, encoded.examples)


def mean_loss(base: Base, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return what computes the mean loss of a batch over its labels, without dropout."""

    def loss() -> Tensor:
        total, count = answer_loss(base.model.eval(), batch, base.kind)
        return total / max(1, count)

    return loss
