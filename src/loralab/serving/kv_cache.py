"""Input of one forward pass over many requests, and the cache of keys and values."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.grouped import Span
from loralab.serving.blocks import BLOCK_SIZE


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """Tokens of some requests, those of one adapter together.

    Attributes:
        requests: their names; those of `rows`.
        ids: of the tokens.
        places: of the tokens among all that their request has in the cache, from 0.
        rows: the request of each token, an index into `tables`; a request's tokens stand together.
        tables: the blocks of each request, which reach to its last token.
        spans: the adapter of the tokens, by digest; None is the base.
        asked: indices of the tokens whose logits are wanted.
    """

    requests: Sequence[Hashable]
    ids: Sequence[int]
    places: Sequence[int]
    rows: Sequence[int]
    tables: Sequence[Sequence[int]]
    spans: Sequence[Span]
    logit_positions: Sequence[int]


class KVCache:
    """The memory for keys and values of all requests: (L, blocks, SIZE, groups, d) each."""

    def __init__(self, model: nn.Module, blocks: int) -> None:
        first = next(p for p in model.parameters() if p.is_floating_point())
        layers, groups, width = cache_shape(model)
        shape = (layers, blocks, BLOCK_SIZE, groups, width)
        # not cleared: pages that no request has used yet take no memory
        self.keys = torch.empty(shape, dtype=first.dtype, device=first.device)
        self.values = torch.empty(shape, dtype=first.dtype, device=first.device)

    def copy(self, source: int, target: int, count: int) -> None:
        """Put the first places of a block into another one."""
        for own in (self.keys, self.values):
            own[:, target, :count] = own[:, source, :count]

    def write(self, request: Hashable, table: Sequence[int], places: Sequence[int], prefix_kv: Tensor) -> None:
        """Put some of a prefix's keys and values (L, 2, H, P, D) into their places."""
        block = torch.tensor([table[place // BLOCK_SIZE] for place in places])
        slot = torch.tensor([place % BLOCK_SIZE for place in places])
        own = prefix_kv[:, :, :, list(places)].to(self.keys)  # (L, 2, H, places, D)
        self.keys[:, block, slot] = own[:, 0].transpose(1, 2)
        self.values[:, block, slot] = own[:, 1].transpose(1, 2)


def cache_shape(model: Any) -> tuple[int, int, int]:
    """Return (L, H, D) of a causal model's keys and values."""
    config = model.config.get_text_config()
    queries = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or queries, width


def block_bytes(model: nn.Module) -> int:
    """Return the bytes that the keys and values of one block take."""
    layers, groups, width = cache_shape(model)
    first = next(p for p in model.parameters() if p.is_floating_point())
    return 2 * layers * BLOCK_SIZE * groups * width * first.element_size()
