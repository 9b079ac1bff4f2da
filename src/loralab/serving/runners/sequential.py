"""Runner for models whose attention cannot be replaced: each request through the model's own cache."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from loralab.adapters.adapter import Adapter
from loralab.adapters.grouped import Bank, Span
from loralab.serving.kv_cache import ForwardBatch


class SequentialRunner:
    """A causal model as a function of a pass, one request after the other."""

    def __init__(self, model: Any, bank: Bank) -> None:
        self._model, self._bank = model, bank
        self._caches: dict[Hashable, Any] = {}

    def put(self, key: Hashable, adapter: Adapter) -> None:
        """Take an adapter in."""
        self._bank.put(key, adapter)

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter."""
        self._bank.drop(key)

    def forget(self, request: Hashable) -> None:
        """End a request, or begin it anew."""
        self._caches.pop(request, None)

    def write(self, request: Hashable, table: Sequence[int], places: Sequence[int], prefix_kv: Tensor) -> None:
        """Put some of a prefix's keys and values (L, 2, H, P, D) into a request's cache."""
        cache = self._cache(request, places[0])
        for layer, own in enumerate(prefix_kv[:, :, :, list(places)]):
            cache.update(own[:1], own[1:], layer)

    @torch.no_grad()
    def logits(self, step: ForwardBatch) -> Tensor:
        """Return the logits at the requested positions, (m, V) in fp32."""
        device = next(self._model.parameters()).device
        keys = [span.key for span in step.spans for _ in range(span.stop - span.start)]
        found: dict[int, Tensor] = {}
        for row, request in enumerate(step.requests):
            own = [token for token, r in enumerate(step.rows) if r == row]
            ids = torch.tensor([[step.ids[token] for token in own]], device=device)
            cache = self._cache(request, step.places[own[0]])
            with self._bank.routed([Span(keys[own[0]], 0, len(own))]):
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
            found |= {token: out[i] for i, token in enumerate(own)}
        if not step.logit_positions:  # the first pieces of a long prompt
            return torch.empty(0, 0)
        return torch.stack([found[token] for token in step.logit_positions]).float()

    def _cache(self, request: Hashable, place: int) -> Any:
        """Return the cache of a request that has so many places filled."""
        if place == 0:
            self._caches[request] = DynamicCache()
        return self._caches[request]
