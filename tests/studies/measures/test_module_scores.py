"""Scores of modules are those of plain loops over tokens, singular values and autograd."""

from pathlib import Path
from typing import Any

import pytest
import torch
from studies.conftest import setup_of
from tiny import IDS, gpt2, llama
from torch import nn

from loralab.adapters.bases import dense_weight
from loralab.adapters.targets import linear_names
from loralab.studies.measures.module_scores import MEASURE_SCORES, by_type, condition, feature_norm, scores_of
from loralab.studies.study import DONE, Arm, Trial
from loralab.studies.trained import measured


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_feature_norm_is_that_of_each_token_beside_noise_of_its_length() -> None:
    W, z = torch.randn(5, 8, generator=draw()), torch.randn(2, 3, 8, generator=draw(1))
    z[0, 1] = 0  # no length to compare with
    tokens = [token for token in z.reshape(-1, 8) if token.any()]
    noise = torch.randn(len(tokens), 8, generator=draw(7))
    expected = [
        float((W @ t).norm() / (W @ (n * t.norm() / n.norm())).norm()) for t, n in zip(tokens, noise, strict=True)
    ]
    assert feature_norm(W, z, draw(7)) == pytest.approx(sum(expected) / len(expected))


def test_noise_scores_one_and_what_the_weight_amplifies_more() -> None:
    W = torch.randn(60, 80, generator=draw())
    noise = torch.randn(500, 80, generator=draw(1))
    assert feature_norm(W, noise, draw(2)) == pytest.approx(1, abs=0.03)
    first = torch.linalg.svd(W).Vh[:1]
    assert feature_norm(W, 3 * first, draw(2)) == pytest.approx(
        float(torch.linalg.matrix_norm(W, 2) / W.norm()) * 80**0.5, rel=0.3
    )


@pytest.mark.parametrize("make", [llama, gpt2])
def test_gradients_and_conditions_of_a_model(make: Any) -> None:
    model = make(2).requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in linear_names(model)}
    rows = {row["name"]: row for row in scores_of(lambda: model(input_ids=IDS, labels=IDS).loss, layers)}
    assert rows.keys() == layers.keys()
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in layers.items():
        assert rows[name]["gradient"] == pytest.approx(float(layer.weight.grad.norm()), rel=1e-4)
        expected = float(torch.linalg.cond(dense_weight(layer).detach()))
        assert rows[name]["condition"] == pytest.approx(expected, rel=1e-3)
    types = by_type(list(rows.values()))
    assert sum(row["count"] for row in types) == len(rows)
    first = types[0]
    own = [row["nfn"] for row in rows.values() if row["type"] == first["type"]]
    assert first["nfn"] == pytest.approx(sum(own) / len(own))


def test_padding_does_not_count() -> None:
    layer = nn.Linear(8, 5, bias=False)
    x = torch.randn(2, 4, 8, generator=draw())
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    padded = x.masked_fill(mask[..., None] == 0, 100.0)
    found = [scores_of(lambda x=x: layer(x).sum(), {"0.a": layer}, mask=mask)[0]["nfn"] for x in (x, padded)]  # type: ignore[misc]
    assert found[0] == found[1] != scores_of(lambda: layer(padded).sum(), {"0.a": layer})[0]["nfn"]


def test_a_singular_matrix_has_no_condition() -> None:
    assert condition(torch.ones(3, 3)) > 1e6


def test_a_study_scores_the_base_before_training(tiny_bert_folder: Path, noise_file: Path, tmp_path: Path) -> None:
    setup = setup_of("targets", tiny_bert_folder, noise_file)
    arm = Arm(name="scores", options={"measure": MEASURE_SCORES}, tuned=False)
    record = measured(Trial(measure=MEASURE_SCORES, setup=setup, arm=arm, seed=0), tmp_path, lambda event: None)
    assert record.status == DONE, record.reason
    assert {row["type"] for row in record.tables["types"]} == {row["type"] for row in record.tables["modules"]}
    assert all(row["nfn"] > 0 and row["gradient"] > 0 for row in record.tables["modules"])
