"""Runner for transformers models with replaceable attention: all tokens of a step in one row.

The model's own modules run on (1, N) tokens of many requests. Only attention knows of requests: it
puts keys and values into their blocks, and lets every token see what its request has there. The
adapters stand in a Bank (adapters/grouped.py). Axes: N tokens, H heads, K key heads, D numbers a
head, B requests, T places.
"""

import functools
import inspect
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.adapters.adapter import Adapter
from loralab.adapters.grouped import Bank, spans_of
from loralab.adapters.prefix import window_of
from loralab.serving.blocks import BLOCK_SIZE
from loralab.serving.kv_cache import ForwardBatch, KVCache

NAME = "loralab-serving"  # of our attention in transformers' table
MAX_SHARED = 16  # tokens of a request whose attention is computed together with others of as many
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "head_mask")


class PackedRunner:
    """A causal model as one function of a pass."""

    def __init__(self, model: Any, pool: KVCache, bank: Bank) -> None:
        self._model, self._pool, self._bank = model, pool, bank
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
        self._places = "position_ids" in inspect.signature(model.base_model.forward).parameters

    def put(self, key: Hashable, adapter: Adapter) -> None:
        """Take an adapter in."""
        self._bank.put(key, adapter)

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter."""
        self._bank.drop(key)

    def write(self, request: Hashable, table: Sequence[int], places: Sequence[int], prefix_kv: Tensor) -> None:
        """Put some of a prefix's keys and values into the cache."""
        self._pool.write(request, table, places, prefix_kv)

    @torch.no_grad()
    def logits(self, step: ForwardBatch) -> Tensor:
        """Return the logits at the requested positions, (m, V) in fp32."""
        device = self._pool.keys.device
        ids, places = (torch.tensor([own], device=device) for own in (step.ids, step.places))
        options = {"position_ids": places} if self._places else {}
        config, before = self._model.config, self._model.config._attn_implementation
        config._attn_implementation = NAME
        try:
            with self._bank.routed(step.spans):
                # a mask of four axes is passed on as it is: none is made that nobody reads
                states = self._model.base_model(
                    input_ids=ids,
                    attention_mask=ids.new_zeros(1, 1, 1, 1),
                    use_cache=False,
                    cached=CacheSlots(step, self._pool),
                    **options,
                ).last_hidden_state
            if not step.logit_positions:
                return states.new_empty(0, 0)
            keys = [span.key for span in step.spans for _ in range(span.stop - span.start)]
            with self._bank.routed(spans_of([keys[i] for i in step.logit_positions])):
                own = states[:, list(step.logit_positions)]
                return self._model.get_output_embeddings()(own)[0].float()
        finally:
            config._attn_implementation = before


@dataclass(frozen=True)
class _Group:
    """Tokens whose keys are fetched together: rows (B, Q) of one request each."""

    tokens: Tensor  # (B, Q)
    tables: Tensor  # (B, blocks)
    places: Tensor  # (B, Q)
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    @functools.cached_property
    def place(self) -> Tensor:
        """Return the places that the tables hold, (T)."""
        return torch.arange(self.tables.shape[1] * BLOCK_SIZE, device=self.tables.device)

    @functools.cached_property
    def beyond(self) -> Tensor:
        """Return which places come after the last token, (B, T, 1, 1)."""
        return (self.place > self.places[:, -1:])[..., None, None]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores, (B, 1, Q, T): the layers of a pass share it."""
        key = window, dtype
        if key not in self.masks:
            seen = self.place <= self.places[..., None]
            if window is not None:
                seen &= self.place > self.places[..., None] - window
            self.masks[key] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[
                :, None
            ]
        return self.masks[key]


class CacheSlots:
    """Where the tokens of a pass find and put keys and values."""

    def __init__(self, step: ForwardBatch, pool: KVCache) -> None:
        self.pool = pool
        device = pool.keys.device
        blocks = [step.tables[r][p // BLOCK_SIZE] for r, p in zip(step.rows, step.places, strict=True)]
        self.block = torch.tensor(blocks, device=device)
        self.slot = torch.tensor([p % BLOCK_SIZE for p in step.places], device=device)
        own: dict[int, list[int]] = {}
        for token, row in enumerate(step.rows):
            own.setdefault(row, []).append(token)
        alike: dict[tuple[int, int], dict[int, list[int]]] = {}  # by length; long ones each alone
        for row, tokens in own.items():
            alike.setdefault((len(tokens), row if len(tokens) > MAX_SHARED else 0), {})[row] = tokens
        self.groups = [_group(step, part, device) for part in alike.values()]

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Compute attention: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys[self.block, self.slot] = k.to(keys.dtype)
        values[self.block, self.slot] = v.to(values.dtype)
        out = torch.empty_like(q)
        for group in self.groups:
            own_k, own_v = keys[group.tables].flatten(1, 2), values[group.tables].flatten(1, 2)
            # what an earlier request left there has no weight, but 0 times infinity is not a number
            own_k, own_v = own_k.masked_fill_(group.beyond, 0), own_v.masked_fill_(group.beyond, 0)
            found = F.scaled_dot_product_attention(
                q[group.tokens].transpose(1, 2),
                own_k.transpose(1, 2).to(q.dtype),
                own_v.transpose(1, 2).to(q.dtype),
                attn_mask=group.mask(window, q.dtype),
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[group.tokens] = found.transpose(1, 2)
        return out


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cached: CacheSlots | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: query (1, H, N, D) -> (1, N, H, D).

    Raises:
        NotImplementedError: the model asks for what is not known here, or passes nothing on.
    """
    asked = [name for name in UNSUPPORTED_ARGUMENTS if options.get(name) is not None]
    if cached is None or asked or query.shape[2] != key.shape[2] or options.get("dropout"):
        raise NotImplementedError(f"attention with {asked or 'a cache or a way of its own'}")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    window = options.get("sliding_window")
    if window is None and window_of(module) is not None:  # in a mask that nobody reads here
        raise NotImplementedError("attention with a window of its own")
    return cached.attended(module.layer_idx, q, k, v, scale, window)[None], None


def _group(step: ForwardBatch, rows: dict[int, list[int]], device: torch.device) -> _Group:
    """Group requests with equally many tokens; tables are filled up to the longest."""
    tokens = torch.tensor(list(rows.values()), device=device)
    longest = 1 + max(step.places[own[-1]] for own in rows.values())
    width = -(-longest // BLOCK_SIZE)
    tables = [list(step.tables[row][:width]) for row in rows]
    tables = [[*table, *[table[0]] * (width - len(table))] for table in tables]
    places = torch.tensor(step.places, device=device)[tokens]
    return _Group(tokens, torch.tensor(tables, device=device), places)
