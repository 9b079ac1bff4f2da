"""Pooling is what a checkpoint of sentence-transformers states, by its formulas."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loralab.errors import ModelError
from loralab.models.sentences import MODES, Pooling, matryoshka, read_pooling

MODULES = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]


def write(folder: Path, modules: list[str], pooling: Any, **files: Any) -> str:
    """Write what sentence-transformers puts beside a model."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    paths = ["", "1_Pooling", "2_Normalize"]
    listed = [{"idx": n, "name": str(n), "path": paths[n], "type": kind} for n, kind in enumerate(modules)]
    for name, content in {"modules.json": listed, "1_Pooling/config.json": pooling, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def of_one_text(states: Tensor, mode: str) -> Tensor:
    """Return the vector of a text without padding, (L, H) -> (H,), written out."""
    rows = [row.double() for row in states]
    if mode in ("cls", "lasttoken"):
        return rows[0] if mode == "cls" else rows[-1]
    if mode == "max":
        return torch.tensor([max(row[i] for row in rows) for i in range(states.shape[1])], dtype=torch.float64)
    weights = [n + 1 if mode == "weightedmean" else 1 for n in range(len(rows))]
    total = sum((w * row for w, row in zip(weights, rows, strict=True)), torch.zeros_like(rows[0]))
    return total / (math.sqrt(len(rows)) if mode == "mean_sqrt_len_tokens" else sum(weights))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_no_vector(mode: str, normalize: bool) -> None:
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    lengths = [7, 1, 4]
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in lengths])
    found = Pooling(modes=(mode,), normalize=normalize).vectors(states, mask)
    for own, row, length in zip(found, states, lengths, strict=True):
        expected = of_one_text(row[:length], mode)
        expected = expected / expected.norm() if normalize else expected
        assert torch.allclose(own.double(), expected, atol=1e-6)


def test_several_modes_stand_one_after_the_other(tmp_path: Path) -> None:
    source = write(tmp_path, MODULES, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True})
    pooling = read_pooling("m", source)
    assert pooling is not None
    assert pooling.modes == ("cls", "mean") and not pooling.normalize
    states, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    assert torch.equal(pooling.vectors(states, mask)[:, :4], states[:, 0])


def test_files_say_what_is_done(tmp_path: Path) -> None:
    files = {
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    }
    modules = [*MODULES, "sentence_transformers.models.Normalize"]
    source = write(tmp_path, modules, {"pooling_mode": "lasttoken"}, **files)
    expected = Pooling(modes=("lasttoken",), normalize=True, max_length=12, lower_case=True, prompt="query: ")
    assert read_pooling("m", source) == expected
    assert expected.written("Big") == "query: big"


def test_another_checkpoint_states_no_pooling(tmp_path: Path) -> None:
    assert read_pooling("m", str(tmp_path)) is None


@pytest.mark.parametrize(
    ("modules", "pooling", "files"),
    [
        ([*MODULES, "sentence_transformers.models.Dense"], {"pooling_mode": "mean"}, {}),
        (MODULES[:1], {}, {}),
        (MODULES, {}, {}),
        (MODULES, {"pooling_mode_attention_tokens": True}, {}),
        (MODULES, {"pooling_mode": "best"}, {}),
        (MODULES, [], {}),
        (MODULES, {"pooling_mode": "mean"}, {"config_sentence_transformers.json": {"default_prompt_name": "q"}}),
    ],
)
def test_what_is_not_supported_is_refused(modules: list[str], pooling: Any, files: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_pooling("m", write(tmp_path, modules, pooling, **files))
    assert (caught.value.code, caught.value.field) == ("pooling_unsupported", "model")


@pytest.mark.parametrize("text", ["no json", "{}", "[1]", "[" * 10**5])
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        read_pooling("m", str(tmp_path))
    assert caught.value.code == "pooling_unsupported"


def test_dimensions_are_those_that_a_model_was_trained_for() -> None:
    assert matryoshka(SimpleNamespace(), 8) == (8,)
    assert matryoshka(SimpleNamespace(is_matryoshka=True), 4) == (1, 2, 3, 4)
    assert matryoshka(SimpleNamespace(matryoshka_dimensions=[4, 2, 99]), 8) == (2, 4, 8)
