"""New tokens get rows of the embedding that are known, whatever the tokenizer held before."""

from pathlib import Path

import torch

from loralab.models.load import load
from loralab.models.tokens import add_tokens


def test_a_new_token_begins_as_the_mean_of_its_pieces_and_other_new_rows_as_nothing(tiny_llama_folder: Path) -> None:
    tables = []
    for _ in range(2):
        base = load(str(tiny_llama_folder))
        base.tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # has no row
        rows = base.model.get_input_embeddings().num_embeddings
        pieces = base.tokenizer("good film", add_special_tokens=False)["input_ids"]
        (number,) = add_tokens(base, ["good film"])
        table = base.model.get_input_embeddings().weight.detach()
        assert number == rows + 1 == len(table) - 1
        assert torch.allclose(table[number], table[pieces].mean(dim=0))
        assert not table[rows].any()
        tables.append(table)
    assert torch.equal(*tables)
