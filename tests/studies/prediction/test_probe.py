"""Features are what their definitions say, cost few passes, and leave the run as it was."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loralab.errors import DataError, ModelError
from loralab.studies.prediction.probe import (
    METHOD,
    PARTS,
    ROWS,
    STEPS,
    chosen,
    features_of,
    hidden_size,
    lowest,
    noise_share,
    participation,
)
from loralab.tasks.batches import collate
from loralab.tasks.forward import answer_loss
from loralab.training.preflight import PreparedRun, prepare
from loralab.training.request import Request
from loralab.training.settings import Training


@pytest.fixture
def run(tiny_bert_folder: Path, noise_file: Path) -> Iterator[PreparedRun]:
    """Return a run that the features' own method was prepared for."""
    yield prepare(Request.of(str(tiny_bert_folder), str(noise_file), METHOD, Training(precision="fp32"), None))


def test_features_are_those_of_the_gradients_of_the_first_rows(run: PreparedRun) -> None:
    found, parameters = features_of(run), run.adapter.parameters()
    gradients, losses = [], []
    for part in range(PARTS):
        rows = run.encoded.examples[part * ROWS // PARTS : (part + 1) * ROWS // PARTS]
        total, count = answer_loss(run.base.model.eval(), collate(rows, pad_id=0, kind=run.base.kind), run.base.kind)
        own = torch.autograd.grad(total / count, parameters, allow_unused=True)
        gradients.append(
            torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(own, parameters, strict=True)]
            )
        )
        losses.append(float(total.detach()) / count)
    every = torch.stack(gradients)
    variance_of_mean = every.var(dim=0).sum() / PARTS
    assert found.noise == pytest.approx(float(variance_of_mean / every.mean(dim=0).pow(2).sum()), rel=1e-3)
    assert found.loss == pytest.approx(sum(losses) / PARTS, rel=1e-5)
    assert found.hidden == 32
    assert 1 <= found.gradient_rank <= 16
    assert STEPS[0] <= found.sign_step <= STEPS[-1]


def test_features_leave_the_weights_and_repeat(run: PreparedRun) -> None:
    before = [p.detach().clone() for p in run.base.model.parameters()]
    first = features_of(run)
    assert all(torch.equal(a, b) for a, b in zip(before, run.base.model.parameters(), strict=True))
    assert features_of(run) == first


def test_every_pass_is_counted(run: PreparedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, rows = type(run.path).batch, []
    graded = []

    def counted(path: object, examples: list[object]) -> object:
        rows.append(len(examples))
        graded.append(torch.is_grad_enabled())
        return forward(path, examples)  # type: ignore[arg-type]

    monkeypatch.setattr(type(run.path), "batch", counted)
    assert features_of(run).passes == sum(count * (3 if on else 1) for count, on in zip(rows, graded, strict=True))


def test_fewer_rows_than_it_needs(run: PreparedRun) -> None:
    with pytest.raises(DataError) as caught:
        chosen(run.encoded.examples[: ROWS - 1])
    assert caught.value.code == "few_rows"


def test_noise_of_equal_gradients_is_none_and_of_noise_alone_is_all() -> None:
    same = torch.ones(10)
    assert noise_share(10.0, [same]) == pytest.approx(0)
    draw = torch.randn(PARTS, 10_000, generator=torch.Generator().manual_seed(0))
    assert noise_share(float(draw.pow(2).sum(dim=1).mean()), [draw.mean(dim=0)]) == pytest.approx(1.0, rel=0.05)


def test_participation_counts_equal_singular_values() -> None:
    basis, _ = torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    assert participation(basis) == pytest.approx(6)
    assert participation(basis[:, :1] @ torch.ones(1, 6)) == pytest.approx(1)


def test_the_lowest_point_of_a_parabola() -> None:
    steps = [10**-3.0, 10**-2.5, 10**-2.0, 10**-1.5]
    losses = [(n / 2 - 0.6) ** 2 for n in range(4)]
    assert lowest(steps, losses) == pytest.approx(10 ** (-3 + 0.6))


def test_a_model_without_a_width_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        hidden_size(SimpleNamespace(config=SimpleNamespace(depths=[1, 2])))
    assert caught.value.code == "no_width"
