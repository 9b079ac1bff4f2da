"""Quicker forwards for modules that are known, checked one by one against what they replace.

Three patches, each on instances and undone on leaving: RMS norms, gated feed-forward networks, and
attention of the Llama kind. All other models meet packed rows through transformers' table of
attention functions. A module that computes anything else keeps its own forward.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.adapters.grouped import together
from loralab.training.fast.attention import FlashRows, Packing, attend
from loralab.training.fast.functions import rms_norm, swiglu

ATTENTION_NAME = "loralab"  # of our attention in transformers' table
LLAMA_LIKE = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
PATCH_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
Forward = Callable[..., Any]


def attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | FlashRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: query (B, H, L, D) -> (B, L, H, D).

    Raises:
        NotImplementedError: packed rows, and the model asks for what `attend` cannot do.
    """
    if packing is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    asked = [
        name
        for name in ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")
        if options.get(name) is not None
    ]
    if asked or options.get("dropout") or query.shape[:1] + query.shape[2:3] != key.shape[:1] + key.shape[2:3]:
        raise NotImplementedError(f"packed attention with {asked or 'dropout or a cache'}")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return attend(q, k, v, packing, scale)[None], None


def known_modules(model: nn.Module) -> list[tuple[nn.Module, Forward]]:
    """Return the modules that have a quicker forward, checked, each with it."""
    found = ((module, _quicker(module)) for module in model.modules())
    return [(module, forward) for module, forward in found if forward is not None]


@contextlib.contextmanager
def patched(model: nn.Module, quicker: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Yield the model with quicker forwards and our attention; the same model as before on leaving."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
    config: Any = getattr(model, "config", None)
    ours = getattr(config, "_attn_implementation", None) == "sdpa"
    for module, forward in quicker:
        module.__dict__["forward"] = types.MethodType(forward, module)
    if ours:
        config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        for module, _ in quicker:
            del module.__dict__["forward"]
        if ours:
            config._attn_implementation = "sdpa"


def _quicker(module: nn.Module) -> Forward | None:
    """Return the quicker forward of a module that is known and agrees."""
    if "forward" in module.__dict__:  # somebody else was here first
        return None
    name = type(module).__name__
    if name.endswith("RMSNorm") and _agrees(module, _norm_forward):
        return _norm_forward
    if name.endswith("MLP") and _is_gated(module) and _agrees(module, _gated_forward):
        return _gated_forward
    if name in LLAMA_LIKE and getattr(module, "sliding_window", None) is None:
        return _attention_forward  # whether it agrees, only the whole model can tell: forward_path.py
    return None


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    if self.weight.requires_grad:
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, eps)


def _is_gated(module: Any) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(hasattr(module, part) for part in parts)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, upper = together(x, (self.gate_proj, self.up_proj))
    if isinstance(self.act_fn, nn.SiLU) or type(self.act_fn).__name__ == "SiLUActivation":
        return self.down_proj(swiglu(gate, upper))
    return self.down_proj(self.act_fn(gate) * upper)


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    packing: Packing | FlashRows | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    if packing is None:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **options)
    if past_key_values is not None or (self.training and self.attention_dropout):
        raise NotImplementedError("packed attention with dropout or a cache")
    x = hidden_states[0]
    q, k, v = (y.view(len(x), -1, self.head_dim) for y in together(x, (self.q_proj, self.k_proj, self.v_proj)))
    cos, sin = (angle[0].contiguous() for angle in position_embeddings)
    out = attend(q, k, v, packing, self.scaling, (cos, sin))
    return self.o_proj(out.view(1, len(x), -1)), None


@torch.no_grad()
def _agrees(module: Any, forward: Forward) -> bool:
    """Return whether a forward gives what the module's own gives, on noise of two sizes."""
    frozen = (p for p in module.parameters() if not p.requires_grad and p.is_floating_point())
    weight = next(frozen, None)
    if weight is None or weight.is_meta:
        return False
    size, dtype = getattr(module, "hidden_size", weight.shape[-1]), weight.dtype
    generator = torch.Generator().manual_seed(0)
    for factor in (1.0, 30.0):
        x = (torch.randn(3, size, generator=generator) * factor).to(weight.device, dtype)
        try:
            expected, found = type(module).forward(module, x), forward(module, x)
        except Exception:  # another signature or another structure: not the module we know
            return False
        if not _close(expected, found):
            return False
    return True


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    one, other = expected.float(), found.float()
    return bool((one - other).norm() <= PATCH_TOLERANCE.get(expected.dtype, 1e-4) * one.norm())
