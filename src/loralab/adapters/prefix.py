"""Trained keys and values in front of every layer's own.

Source: Li & Liang 2021, arXiv:2101.00190, section 4; the network that writes them is section 4.3.
The prefix stands at positions 0 to P - 1, so everything else moves P positions on, as where
the prefix is put into a cache (the paper's code, peft). Step 0 is not the base model: attention
goes to the prefix too. No weight of the base can hold it: it cannot be merged.
Axes: P tokens of the prefix, L layers, H key-value heads, D width of a head, B rows, Q queries.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.methods import Prefix
from loralab.adapters.peft_fields import refuse_unknown
from loralab.adapters.positions import (
    CACHE_ARGUMENTS,
    by_name,
    cache_name,
    innermost_with_positions,
    shift_positions_behind,
)
from loralab.adapters.split import require_whole
from loralab.adapters.wrapper import Wrapper
from loralab.errors import ConfigError, TargetError

CANNOT_MERGE = "a prefix cannot be merged: it is keys and values of its own, which no weight of the base can hold"
CANNOT_SHARE = "a prefix stands in front of a row, not in a module"
IGNORE = "split the base alone: fully_shard(..., ignored_params=set(adapter.parameters()))"
MASK = "attention_mask"
PEFT_FIELDS = {
    "num_virtual_tokens",
    "num_layers",
    "num_attention_heads",
    "token_dim",
    "num_transformer_submodules",
    "prefix_projection",
    "encoder_hidden_size",
    "init_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prompt_tuning_init_state_dict_path",
}


class PrefixTable(nn.Module):
    """The keys and values of all layers: one tensor (P, L * 2 * H * D), or a network's output."""

    def __init__(self, config: Prefix, shape: tuple[int, int, int], generator: torch.Generator | None) -> None:
        super().__init__()
        self.tokens, self.shape = config.tokens, shape
        layers, heads, width = shape
        numbers = layers * 2 * heads * width
        drawn = torch.randn(config.tokens, heads * width if config.mlp else numbers, generator=generator)
        self.weight = nn.Parameter(config.init_std * drawn)
        self.down = nn.Linear(heads * width, config.mlp_width) if config.mlp else None
        self.up = nn.Linear(config.mlp_width, numbers) if config.mlp else None
        for layer in (self.down, self.up):
            if layer is not None:
                nn.init.normal_(layer.weight, std=config.init_std, generator=generator)
                nn.init.zeros_(layer.bias)

    def flat(self) -> Tensor:
        """Return all of it, (P, L * 2 * H * D), as peft stores it."""
        if self.down is None or self.up is None:
            return self.weight
        out: Tensor = self.up(torch.tanh(self.down(self.weight)))
        return out

    def cache_with_prefix(self, layer: int, cache: Any) -> "PrefixCache":
        """Return the prefix of one layer before a cache."""
        return PrefixCache(cache, self.of(layer))

    def of(self, layer: int) -> Tensor:
        """Return the keys and values of one layer, (2, H, P, D)."""
        _, heads, width = self.shape
        size = 2 * heads * width
        if self.down is None or self.up is None:
            own = self.weight[:, layer * size : (layer + 1) * size]
        else:
            rows = slice(layer * size, (layer + 1) * size)
            hidden = torch.tanh(self.down(self.weight))
            own = F.linear(hidden, self.up.weight[rows], self.up.bias[rows])
        return own.view(self.tokens, 2, heads, width).permute(1, 2, 0, 3)


class AttentionWithPrefix(Wrapper):
    """An attention module whose queries also see P trained keys and values.

    They are put in where the module asks its cache for the earlier ones, so generation with a
    cache, grouped queries, padding and gradient checkpointing need nothing else.
    """

    cannot_merge = CANNOT_MERGE
    cannot_share = CANNOT_SHARE

    def __init__(self, base: nn.Module, table: Any, layer: int) -> None:
        super().__init__(base)
        # a child of the first layer alone: torch.func.functional_call would set a parameter of two
        # names twice, and put the second's value back in the end
        if layer == 0:
            self.table = table
        else:
            self.__dict__["table"] = table
        self.layer = layer
        self._signature = inspect.signature(base.forward)
        self._cache = cache_name(self._signature) or CACHE_ARGUMENTS[0]
        self._window = window_of(base)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the attention's output.

        Raises:
            AdapterStateError: FSDP has split the prefix, which it puts together for one layer alone.
        """
        require_whole([self.table.weight], "a prefix", IGNORE)
        bound = self._signature.bind(*inputs, **named)
        given = bound.arguments
        prefix_cache = self.table.cache_with_prefix(self.layer, given.get(self._cache))
        given[self._cache] = prefix_cache
        if isinstance(prefix_cache, PrefixCache):
            x = next(value for value in given.values() if isinstance(value, Tensor))
            given[MASK] = self._mask(given.get(MASK), x, prefix_cache)
        return self.base(**by_name(bound))

    def _mask(self, mask: Tensor | None, x: Tensor, prefix_cache: "PrefixCache") -> Tensor | None:
        """Return the mask with the prefix in it; None stays none where nothing is hidden.

        The prefix is visible to all queries, but for those that have it out of their window.
        """
        queries, past = x.shape[1], prefix_cache.past(self.layer)
        if queries == 1 and mask is None:
            prefix_cache.drop(self._beyond(prefix_cache.tokens + past))
        if mask is None:
            causal = getattr(self.base, "is_causal", True)
            if not causal or queries == 1:
                return None
            keys = past + queries
            lower = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(past)
            mask = lower[None, None]
        visible = True if mask.dtype == torch.bool else 0.0
        whole = F.pad(mask, (prefix_cache.tokens, 0), value=visible)
        if self._window is not None and self._beyond(prefix_cache.tokens + past + queries - 1):
            hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            own = torch.arange(prefix_cache.tokens, device=x.device)
            place = torch.arange(queries, device=x.device)[:, None] + prefix_cache.tokens + past
            out = place - own >= self._window  # (Q, P)
            whole[..., : prefix_cache.tokens].masked_fill_(out, hidden)
        return whole

    def _beyond(self, place: int) -> int:
        """Return how many of the first tokens are outside the window of a query at some place."""
        return 0 if self._window is None else max(0, place - self._window + 1)


class PrefixCache:
    """Cache given to an attention module: the real one, if any, with a prefix.

    `own` are keys and values (2, H, P, D).
    """

    def __init__(self, cache: Any, own: Tensor) -> None:
        self._cache = cache
        self._own = own
        self.tokens = own.shape[2]

    def drop(self, count: int) -> None:
        """Leave the first so many tokens out."""
        self._own = self._own[:, :, count:]

    def past(self, layer: int) -> int:
        """Return the number of tokens that the real cache holds."""
        return 0 if self._cache is None else int(self._cache.get_seq_length(layer))

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> tuple[Any, Any]:
        """Append this call's keys and values (B, H, K, D); return those that are attended to."""
        if self._cache is not None:
            keys, values = self._cache.update(keys, values, *rest, **named)
        own = self._own[:, None].expand(2, len(keys), *self._own.shape[1:]).to(keys.dtype)
        return torch.cat([own[0], keys], dim=2), torch.cat([own[1], values], dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def build(model: nn.Module, config: Prefix, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path, one table among them."""
    names = attention_names(model)
    table = PrefixTable(config, key_value_shape(model, len(names)), generator)
    table.to(next(model.parameters()).device)
    return {name: AttentionWithPrefix(model.get_submodule(name), table, layer) for layer, name in enumerate(names)}


def register_hooks(model: nn.Module, modules: Mapping[str, Any]) -> list[Any]:
    """Move the positions of the input behind the prefix."""
    return [shift_positions_behind(innermost_with_positions(model, modules), next(iter(modules.values())).table)]


def prefix_kv(model: nn.Module, modules: Mapping[str, Any]) -> list[Tensor]:
    """Return the keys and values of each layer, (2, H, P, D)."""
    table = next(iter(modules.values())).table
    return [table.of(layer) for layer in range(len(modules))]


def pack(modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return peft's one tensor."""
    return {"prompt_embeddings": next(iter(modules.values())).table.flat()}


def fields(config: Prefix, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: peft's PREFIX_TUNING, without the network."""
    layers, heads, width = next(iter(modules.values())).table.shape
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * width,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * width,
        "modules_to_save": list(config.modules_to_save) or None,
    }


def window_of(attention: Any) -> int | None:
    """Return how many tokens back an attention module sees; None is all."""
    if hasattr(attention, "sliding_window"):
        found: int | None = attention.sliding_window
        return found
    config = getattr(attention, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding" not in kinds[attention.layer_idx]:
        return None
    return getattr(config, "sliding_window", None)


def attention_names(model: nn.Module) -> list[str]:
    """Return the paths of the innermost modules that attend through a cache, layer after layer.

    Raises:
        TargetError: there are none.
        ConfigError: the attention runs in a kernel that takes no mask of ours.
    """
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if kernel not in ("sdpa", "eager", None):
        raise ConfigError(
            f"a prefix needs the attention implementation sdpa or eager, the model has {kernel!r}",
            code="attention_implementation",
            field="model",
        )
    able = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx")
        and cache_name(inspect.signature(module.forward)) is not None
        and MASK in inspect.signature(module.forward).parameters
    ]
    inner = [n for n in able if not any(other.startswith(f"{n}.") for other in able)]
    if not inner:
        raise TargetError(
            f"{type(model).__name__} has no attention with a cache of keys and values, which a prefix needs",
            code="no_attention_cache",
            field="model",
        )
    return inner


def key_value_shape(model: Any, layers: int) -> tuple[int, int, int]:
    """Return (L, H, D) of the model's keys and values."""
    config = model.config.get_text_config()
    queries = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return layers, getattr(config, "num_key_value_heads", None) or queries, width


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Prefix, Mapping[str, Tensor]]:
    """Return the configuration that peft's fields describe."""
    refuse_unknown(fields, PEFT_FIELDS)
    saved = tuple(fields.get("modules_to_save") or ())
    return Prefix(tokens=fields["num_virtual_tokens"], modules_to_save=saved), tensors
