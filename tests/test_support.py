"""benchmarks/support.py: a few model types through every step, and reasons where one fails."""

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def support() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("support")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "qwen3_moe", "t5", "vit", "qwen2_vl"])
def test_a_model_type_passes_every_step(name: str, support: Any, tmp_path: Path) -> None:
    row = support.examine(name, tmp_path / "adapter")
    assert {step: cell for step, cell in row["cells"].items() if cell != "yes"} == {}
    assert 0 < row["unadapted"] < 1


def test_a_step_that_fails_says_why(support: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, numbers = support.tiny.build, itertools.count(1)

    def drifting(name: str) -> Any:
        """Return a model of which every build has other weights."""
        model = build(name)
        with torch.no_grad():
            model.lm_head.weight.mul_(next(numbers))
        return model

    monkeypatch.setattr(support.tiny, "build", drifting)
    cells = support.examine("llama", tmp_path / "adapter")["cells"]
    assert [step for step, cell in cells.items() if cell == "yes"] == ["plan", "init", "train", "merge"]


def test_weights_that_are_left_out_in_silence_are_found(
    support: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = support.Trial("llama", tmp_path)
    trial.model.model.layers[0].hidden = nn.Linear(32, 32)
    attach = support.loralab.attach

    def forgetful(model: Any, config: Any, **options: Any) -> Any:
        del model.model.layers[0].hidden
        adapter = attach(model, config, **options)
        model.model.layers[0].hidden = nn.Linear(32, 32)
        return adapter

    monkeypatch.setattr(support.loralab, "attach", forgetful)
    with pytest.raises(support.No, match=r"model\.layers\.0\.hidden\.weight"):
        trial.plan()


def test_every_type_of_the_page_has_a_row_and_every_no_a_reason(support: Any) -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text(encoding="utf-8"))
    assert list(kept["rows"]) == list(support.tiny.KINDS)
    assert len(kept["rows"]) >= 60
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert page == support.page(kept["rows"], kept["versions"])
    for name, row in kept["rows"].items():
        assert set(row["cells"]) == set(support.COLUMNS), name
        assert all(row["cells"].values()), name
