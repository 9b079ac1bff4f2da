"""Training in a random subspace starts at the model, moves only d numbers, and learns."""

from pathlib import Path

import pytest
import torch

from loralab.errors import ConfigError
from loralab.models.load import Base
from loralab.studies.subspace import VARIANTS, Subspace, fit, moving
from loralab.tasks.catalog import Task, find
from loralab.tasks.forward import call
from loralab.training.preflight import load_base
from loralab.training.settings import Training

STEPS = 60


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """Return rows labelled by which of two words a text holds."""
    rows = [f"{n} {'good' if n % 2 else 'bad'} {n % 7},{'x' if n % 2 else 'y'}" for n in range(58)]
    file = tmp_path / "words.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return find(str(file))


@pytest.fixture
def base(deep_bert_folder: Path, task: Task) -> Base:
    """Return a tiny encoder with a new head."""
    return load_base(str(deep_bert_folder), task, "fp32", 0)


def of(base: Base, size: int, variant: str) -> Subspace:
    return Subspace(base.model, size, variant, torch.Generator().manual_seed(0)).eval()


BATCH = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_zero_is_the_base_model(base: Base, variant: str) -> None:
    base.model.eval()
    before = call(base.model, BATCH)
    subspace = of(base, 50, variant)
    assert torch.equal(call(subspace, BATCH), before)
    assert sum(p.numel() for p in subspace.trained()) == 50


def test_all_but_the_tables_moves_and_settling_gives_the_same_answers(base: Base) -> None:
    names = moving(base.model)
    assert "classifier.weight" in names and not any("embeddings.weight" in n for n in names)
    assert len(of(base, 50, "said").scales) == 3  # two layers, and what is outside
    tables = {n: p.clone() for n, p in base.model.named_parameters() if n not in names}
    subspace = of(base, 50, "said")
    with torch.no_grad():
        subspace.theta.normal_()
    moved = call(subspace, BATCH)
    model = subspace.settle()
    torch.testing.assert_close(call(model, BATCH), moved)
    assert all(torch.equal(p, tables[n]) for n, p in model.named_parameters() if n in tables)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(base: Base, task: Task, variant: str) -> None:
    training = Training(max_steps=STEPS, batch_size=16, learning_rate=0.1, max_length=32)
    subspace = of(base, 400, variant)
    frozen = [p.clone() for p in base.model.parameters()]
    losses = fit(subspace, base, task, training)
    assert len(losses) == STEPS
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert all(torch.equal(p, q) for p, q in zip(base.model.parameters(), frozen, strict=True))


def test_said_needs_more_than_its_scales(base: Base) -> None:
    with pytest.raises(ConfigError, match="said has 3 layers here"):
        of(base, 3, "said")
