"""New tokens: into the tokenizer, and a row of the embedding each."""

from collections.abc import Sequence

import torch
from transformers import AddedToken

from loralab.errors import ConfigError, join_limited
from loralab.models.kinds import VISION
from loralab.models.load import Base


@torch.no_grad()
def add_tokens(base: Base, tokens: Sequence[str]) -> tuple[int, ...]:
    """Add tokens that are kept whole, grow the embedding, and return their ids.

    A new row starts as the mean of the rows that its text was cut into before.

    Raises:
        ConfigError: the model reads no text, or a token is empty, named twice or known already.
    """
    if not tokens:
        return ()
    if base.kind == VISION:
        raise ConfigError(f"{base.name} reads pictures; it takes no new tokens", code="no_effect", field="new_tokens")
    known = base.tokenizer.get_vocab()
    if bad := [t for t in tokens if not t.strip() or t in known or list(tokens).count(t) > 1]:
        raise ConfigError(
            f"new_tokens: {join_limited(map(repr, bad))} empty, named twice or known already",
            code="invalid_value",
            field="new_tokens",
        )
    pieces = [base.tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    base.tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = tuple(base.tokenizer.convert_tokens_to_ids(list(tokens)))
    table = base.model.get_input_embeddings().weight
    if max(ids) >= (before := len(table)):
        base.model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = base.model.get_input_embeddings().weight
        table[before:] = 0  # also those of tokens that the model had no row for: never at random
    for row, own in zip(ids, pieces, strict=True):
        table[row] = table[own].float().mean(dim=0).to(table.dtype)
    return ids
