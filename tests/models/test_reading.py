"""Weights come into memory once, with the same numbers, however they are read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils

from loralab.models.load import load


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note how each file of weights is opened."""
    found: list[str] = []
    usual = modeling_utils.safe_open

    def noted(*places: Any, **options: Any) -> Any:
        found.append(options.get("backend", "mmap"))
        return usual(*places, **options)

    monkeypatch.setattr(modeling_utils, "safe_open", noted)
    return found


@pytest.mark.parametrize(("dtype", "last"), [(torch.bfloat16, "pread"), (torch.float32, "mmap")])
def test_a_file_is_mapped_only_where_the_model_stands_on_it(
    tiny_llama_folder: Path, backends: list[str], dtype: torch.dtype, last: str
) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=dtype).state_dict()
    before, threads = modeling_utils.safe_open, torch.get_num_threads()
    found = load(str(tiny_llama_folder), kind="causal-lm", dtype=dtype).model.state_dict()
    assert backends[-1] == last
    assert modeling_utils.safe_open is before
    assert torch.get_num_threads() == threads
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
