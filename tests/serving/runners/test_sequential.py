"""Request by request, in pieces: what the model says to the whole."""

import itertools
from collections.abc import Sequence

import torch
from tiny import llama

from loralab.adapters.grouped import Bank
from loralab.serving.runners.choose import batch_of
from loralab.serving.runners.sequential import SequentialRunner
from loralab.serving.scheduler import Chunk, TokenSequence


def test_a_piece_of_which_nothing_is_asked_is_read_all_the_same() -> None:
    model = llama()
    tokens = list(range(3, 20))
    row = TokenSequence(number=0, key=None, tokens=tokens)
    single = SequentialRunner(model, Bank(model))

    def read(cuts: Sequence[int]) -> list[int]:
        parts = [single.logits(batch_of([Chunk(row, start, stop)])) for start, stop in itertools.pairwise(cuts)]
        last = parts[-1]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        assert torch.allclose(last[0], expected, atol=1e-4)
        return [len(part) for part in parts]

    assert read([0, 17]) == [1]
    assert read([0, 5, 10, 17]) == [0, 0, 1]
