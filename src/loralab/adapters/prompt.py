"""Prompt tuning: trained embeddings in front of the input.

Source: Lester et al. 2021, arXiv:2104.08691, section 2. In a causal model the prompt's states do
not depend on what follows: one pass over the prompt alone gives its keys and values in every
layer, and they are a prefix (prefix.py). So the input keeps its length, for users and for
generation. A model that reads in both directions really gets a longer input (`PrependPrompt`).
Step 0 is not the base model. Axes: P tokens, E width of the embedding.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.adapters.attach import attach
from loralab.adapters.bases import shared_copy
from loralab.adapters.eager import is_plain_tensor
from loralab.adapters.methods import Prompt
from loralab.adapters.peft_fields import refuse_unknown
from loralab.adapters.positions import by_name, innermost_with_positions, shift_positions_behind
from loralab.adapters.prefix import (
    CANNOT_MERGE,
    CANNOT_SHARE,
    IGNORE,
    PEFT_FIELDS,
    AttentionWithPrefix,
    PrefixCache,
    attention_names,
)
from loralab.adapters.split import require_whole
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterStateError, TargetError


class Embeddings(nn.Module):
    """The prompt (P, E), and what it amounts to in each layer of the present forward pass."""

    one_pass_at_a_time = True

    def __init__(self, start: Tensor, layers: int) -> None:
        super().__init__()
        self.tokens = len(start)
        self.weight = nn.Parameter(start)
        self.layers = layers
        self.states: list[Tensor] = []  # keys and values (2, H, P, D) of each layer
        self.recording = False
        self._made_of: Tensor | None = None  # the weight's values that the states belong to

    def cache_with_prefix(self, layer: int, cache: Any) -> Any:
        """Return the prompt's keys and values before a cache; while they are recorded, a recorder."""
        return self if self.recording else PrefixCache(cache, self.states[layer])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record one layer's keys and values (1, H, P, D)."""
        self.states.append(torch.stack([keys[0], values[0]]))
        return keys, values

    def is_current(self) -> bool:
        """Return whether the states may be used again: the prompt has not changed.

        Compared by value: fused optimisers and `.data` do not count up a tensor's version.
        """
        if self._made_of is None or not is_plain_tensor(self.weight):
            return False
        return torch.equal(self._made_of, self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast all tensors (nn.Module) and drop the states."""
        self.states, self._made_of = [], None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: not the states, which belong to a graph."""
        return {**self.__dict__, "states": [], "_made_of": None}

    def record(self, inner: nn.Module) -> None:
        """Send the prompt once through the model without its head."""
        require_whole([self.weight], "a prompt", IGNORE)
        self.states, self.recording = [], True
        embedding: Any = inner.get_input_embeddings()  # type: ignore[operator]
        prompt = self.weight.to(embedding.weight.dtype)[None]
        try:
            with _without_checkpoints(inner):
                inner(inputs_embeds=prompt, use_cache=False)
        finally:
            self.recording = False
        keeps = torch.is_grad_enabled() or inner.training
        self._made_of = None if keeps else self.weight.detach().clone()


def build(model: Any, config: Prompt, generator: torch.Generator | None) -> dict[str, Wrapper]:
    """Return the wrappers by path, one table of embeddings among them.

    The prompt starts as the embeddings of tokens drawn from the vocabulary, as in section 3.2.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise TargetError(
            f"{type(model).__name__} has no words that a prompt could stand before", code="no_embeddings", field="model"
        )
    vocabulary: Tensor = embedding.weight
    rows = torch.randint(len(vocabulary), (config.tokens,), generator=generator)
    start = vocabulary.detach()[rows.to(vocabulary.device)].float().clone()
    names = _causal_attention(model)
    table = Embeddings(start, len(names) or model.config.num_hidden_layers)
    if not names:
        path = next(name for name, module in model.named_modules() if module is embedding)
        return {path: PromptHolder(embedding, table)}
    return {name: AttentionWithPrefix(model.get_submodule(name), table, layer) for layer, name in enumerate(names)}


def register_hooks(model: Any, modules: Mapping[str, Any]) -> list[Any]:
    """Work out the prompt's keys and values before each forward pass, and move the positions."""
    first = next(iter(modules.values()))
    table: Embeddings = first.table
    if isinstance(first, PromptHolder):
        inner = getattr(model, "base_model", model)
        hook = PrependPrompt(table, keeps="ForSequenceClassification" in type(model).__name__)
        return [inner.register_forward_pre_hook(hook, with_kwargs=True), inner.register_forward_hook(hook.after)]
    inner = innermost_with_positions(model, modules)
    return [shift_positions_behind(inner, table), inner.register_forward_pre_hook(Prepare(table), with_kwargs=True)]


class Prepare:
    """A hook before a model without its head: works out what the prompt amounts to."""

    def __init__(self, table: Embeddings) -> None:
        self.table = table

    def __call__(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Record the prompt's keys and values, unless those at hand still hold."""
        if self.table.recording:
            return
        if _reentrant(module):
            raise AdapterStateError(
                "prompt tuning does not work with reentrant gradient checkpointing; use use_reentrant=False",
                code="reentrant_checkpointing",
                field="gradient_checkpointing",
            )
        if torch.is_grad_enabled() or not self.table.is_current():
            self.table.record(module)


class PromptHolder(Wrapper):
    """The embedding of a model that reads in both directions: keeps the prompt for the hook."""

    cannot_merge = CANNOT_MERGE
    cannot_share = CANNOT_SHARE

    def __init__(self, base: nn.Module, table: Embeddings) -> None:
        super().__init__(base)
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """Return the words' own rows."""
        out: Tensor = self.base(ids)
        return out


class PrependPrompt:
    """Hooks around a model without its head: the prompt goes in before the words.

    Args:
        keeps: leave the prompt's states in the output, as peft does before a classifier, which
            reads the first of them; else they are cut off again.
    """

    def __init__(self, table: Embeddings, *, keeps: bool) -> None:
        self.table, self.keeps = table, keeps

    def __call__(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return the longer input."""
        bound = inspect.signature(module.forward).bind(*inputs, **named)
        given = bound.arguments
        words = given.get("inputs_embeds")
        if words is None:
            words = module.get_input_embeddings()(given.pop("input_ids"))
        require_whole([self.table.weight], "a prompt", IGNORE)
        prompt = self.table.weight.to(words.dtype).expand(len(words), -1, -1)
        given["inputs_embeds"] = torch.cat([prompt, words], dim=1)
        for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
            if given.get(name) is not None:
                given[name] = F.pad(given[name], (self.table.tokens, 0), value=value)
        return (), by_name(bound)

    def after(self, module: Any, inputs: Any, output: Any) -> Any:
        """Return the output without the prompt's part."""
        if not self.keeps:
            output.last_hidden_state = output.last_hidden_state[:, self.table.tokens :]
        return output


def prefix_kv(model: nn.Module, modules: Mapping[str, Any]) -> list[Tensor]:
    """Return what the prompt (P, E) amounts to in each layer, (2, H, P, D), worked out aside."""
    weight = next(iter(modules.values())).table.weight
    stage = attach(shared_copy(model), Prompt(tokens=len(weight)))
    table: Embeddings = next(iter(stage.modules.values())).table
    table.weight.copy_(weight)
    table.record(innermost_with_positions(stage.model, stage.modules))
    return table.states


def pack(modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return peft's one tensor."""
    return {"prompt_embeddings": next(iter(modules.values())).table.weight}


def fields(config: Prompt, modules: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Return adapter_config.json: peft's PROMPT_TUNING."""
    table: Embeddings = next(iter(modules.values())).table
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": config.tokens,
        "token_dim": table.weight.shape[1],
        "num_layers": table.layers,
        "num_attention_heads": None,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "modules_to_save": list(config.modules_to_save) or None,
    }


def parse(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Prompt, Mapping[str, Tensor]]:
    """Return the configuration that peft's fields describe."""
    refuse_unknown(fields, PEFT_FIELDS)
    saved = tuple(fields.get("modules_to_save") or ())
    return Prompt(tokens=fields["num_virtual_tokens"], modules_to_save=saved), tensors


def _causal_attention(model: nn.Module) -> list[str]:
    """Return the paths of the attention of a causal model; none for one that reads in both directions."""
    try:
        names = attention_names(model)
    except TargetError:
        if any(end in type(model).__name__ for end in ("ForCausalLM", "LMHead")):
            raise
        return []
    causal = all(getattr(model.get_submodule(name), "is_causal", True) for name in names)
    return names if causal else []


def _reentrant(model: nn.Module) -> bool:
    """Return whether some block recomputes in the way that needs all tensors as inputs."""
    for module in model.modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if call is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(call, "keywords", {}).get("use_reentrant", True))
    return False


@contextmanager
def _without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Switch checkpoints off: the prompt's keys and values are used outside of the blocks that make them."""
    on = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing")]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]
