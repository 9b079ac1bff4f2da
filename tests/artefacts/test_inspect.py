"""inspect(): one adapter in numbers, or two of them side by side."""

from collections.abc import Callable
from pathlib import Path

import loralab
from loralab.adapters.methods import LoRA
from loralab.adapters.spectrum import compare, describe


def test_one_folder_is_described_and_two_are_compared(
    make_adapter: Callable[..., Path], tiny_llama_folder: Path
) -> None:
    one = make_adapter(tiny_llama_folder)
    other = make_adapter(tiny_llama_folder, LoRA(rank=3), name="other")
    assert loralab.inspect(one) == describe(one)
    assert loralab.inspect(one)["ranks"] == [2]
    assert loralab.inspect(one, other) == compare(one, other)
