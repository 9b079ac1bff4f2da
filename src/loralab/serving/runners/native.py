"""Llama-shaped models in bfloat16 on the processor: a whole step in one call of native/serve.c.

The weights stay where torch has them. LoRA of any rank, DoRA and (IA)3 on the seven projections
are part of the step; requests of other adapters go through serving/runners/packed.py.
"""

import ctypes
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.ia3 import LinearWithIA3
from loralab.adapters.linear import LinearWithLoRA
from loralab.native.library import kernels_for
from loralab.serving.kv_cache import ForwardBatch, KVCache

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
RANKS, COLUMNS = 4, 64  # serve.c multiplies as many at once
_COUNTS = ("layers", "h", "f", "heads", "groups", "d", "vocabulary")
_BATCH = ("x", "cos", "sin", "place", "request", "tables", "span", "adapters", "asked", "logits")


class _Model(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in _COUNTS],
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("weights", "final_norm", "head", "keys", "values")],
        ("blocks", ctypes.c_int64),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("n", "spans", "width", "m")],
        *[(name, ctypes.c_void_p) for name in _BATCH],
    ]


class _Update(ctypes.Structure):
    _fields_ = [*[(name, ctypes.c_void_p) for name in ("a", "b", "ratio", "after", "before")], ("r", ctypes.c_int64)]


class NativeRunner:
    """A Llama-shaped model as one function of a pass."""

    def __init__(self, model: Any, pool: KVCache) -> None:
        self._model, self._pool = model, pool
        self._adapters: dict[Hashable, tuple[Any, list[Tensor]]] = {}
        config, inner = model.config, model.model
        self._weights = torch.tensor([_addresses(layer) for layer in inner.layers])
        attention = inner.layers[0].self_attn
        self._head = model.get_output_embeddings().weight
        self._structure = _Model(
            layers=len(inner.layers),
            h=config.hidden_size,
            f=config.intermediate_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            d=attention.head_dim,
            vocabulary=len(self._head),
            eps=inner.norm.variance_epsilon,
            scale=attention.scaling,
            weights=self._weights.data_ptr(),
            final_norm=inner.norm.weight.data_ptr(),
            head=self._head.data_ptr(),
            keys=pool.keys.data_ptr(),
            values=pool.values.data_ptr(),
            blocks=pool.keys.shape[1],
        )

    def put(self, key: Hashable, adapter: Adapter) -> bool:
        """Take an adapter in; False if it has something that this way does not know."""
        if not supports_adapter(adapter):
            return False
        table = (_Update * (self._structure.layers * len(PROJECTIONS)))()
        kept: list[Tensor] = []
        for path, own in _updates_of(adapter.modules):
            number, name = _layer_and_name(path)
            kept += own.values()
            place = table[number * len(PROJECTIONS) + PROJECTIONS.index(name)]
            for field, tensor in own.items():
                setattr(place, field, tensor.data_ptr())
            place.r = len(own["a"]) if "a" in own else 0
        self._adapters[key] = table, kept
        return True

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter."""
        self._adapters.pop(key, None)

    @torch.no_grad()
    def logits(self, step: ForwardBatch) -> Tensor:
        """Return the logits at the requested positions, (m, V) in fp32."""
        inner, n = self._model.model, len(step.ids)
        x = inner.embed_tokens(torch.tensor(step.ids))
        place = torch.tensor(step.places)
        cos, sin = (a[0].contiguous() for a in inner.rotary_emb(x[None], place[None]))
        width = max(map(len, step.tables))
        tables = torch.tensor([[*t, *[0] * (width - len(t))] for t in step.tables]).int()
        keys = list(dict.fromkeys(s.key for s in step.spans if s.key in self._adapters))
        number = {key: i for i, key in enumerate(keys)}
        spans = [(s.start, s.stop, number.get(s.key, -1)) for s in step.spans]
        out = torch.empty(len(step.logit_positions), self._structure.vocabulary)
        tensors: Mapping[str, Tensor] = {
            "x": x,
            "cos": cos,
            "sin": sin,
            "place": place.int(),
            "tables": tables,
            "request": torch.tensor(step.rows).int(),
            "span": torch.tensor(spans),
            "adapters": torch.tensor([ctypes.addressof(self._adapters[key][0]) for key in keys]),
            "asked": torch.tensor(step.logit_positions),
            "logits": out,
        }
        batch = _Batch(
            n=n,
            spans=len(spans),
            width=width,
            m=len(step.logit_positions),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )
        native = kernels_for(x)
        assert native is not None
        native.addressed("llama_step", ctypes.addressof(self._structure), ctypes.addressof(batch))
        return out


def unsupported_reason(model: Any) -> str:
    """Return why a model cannot be compiled; empty if it looks as if it could."""
    native = kernels_for(next(model.parameters()))
    if native is None or not native.dots:
        return "it needs bfloat16 on a processor with AVX-512 BF16, and a C compiler"
    if type(model).__name__ not in LLAMA_LIKE:
        return f"{type(model).__name__} is not one of {', '.join(LLAMA_LIKE)}"
    return next((reason for reason in _unusual(model) if reason), "")


def _unusual(model: Any) -> Iterator[str]:
    """Yield the features of a Llama-like model that the native step does not support."""
    config, layer = model.config, model.model.layers[0]
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if window is not None or any("sliding" in kind for kind in kinds):
        yield "its attention has a window"
    if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        yield f"its activation is {type(layer.mlp.act_fn).__name__}"
    linears = [layer.get_submodule(name) for name in PROJECTIONS]
    if any(type(m) is not nn.Linear or not m.weight.is_contiguous() for m in linears):
        yield "its layers are not plain"
    biased = (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    if any(m.bias is not None for m in biased) or model.get_output_embeddings().bias is not None:
        yield "its layers have biases in unusual places"
    sizes = (config.hidden_size, config.intermediate_size, layer.self_attn.head_dim)
    if any(size % 32 for size in sizes):
        yield f"its sizes {sizes} are uneven"


def supports_adapter(adapter: Adapter) -> bool:
    """Return whether all that an adapter changes is among what the compiled step knows."""
    return not adapter.saved and all(_known(p, m) for p, m in adapter.modules.items())


def _known(path: str, module: Any) -> bool:
    place = _layer_and_name(path)
    if place is None or place[1] not in PROJECTIONS:
        return False
    if type(module) is LinearWithIA3:
        return module.feedforward == (place[1] == "mlp.down_proj")
    return type(module) is LinearWithLoRA


def _layer_and_name(path: str) -> Any:
    """Split model.layers.3.mlp.up_proj into (3, "mlp.up_proj")."""
    parts = path.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) != 5 or not parts[2].isdecimal():
        return None
    return int(parts[2]), ".".join(parts[3:])


@torch.no_grad()
def _updates_of(modules: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors that serve.c reads of each module; those of one shape are made at once."""
    alike: dict[tuple[int, ...], list[tuple[str, Tensor, Tensor, float]]] = {}
    for path, module in modules.items():
        if isinstance(module, LinearWithIA3):
            scale = module.ia3_l.detach().flatten().float().contiguous()
            yield path, {"before" if module.feedforward else "after": scale}
        else:
            A, B, scaling = module.factors()
            alike.setdefault((*A.shape, *B.shape), []).append((path, A, B, scaling))
    for own in alike.values():
        paths, As, Bs, scalings = zip(*own, strict=True)
        a = _padded(torch.stack(As))
        b = _pairs(torch.stack(Bs) * torch.tensor(scalings, device=a.device)[:, None, None])
        for number, path in enumerate(paths):
            found = {"a": a[number], "b": b[number]}
            if modules[path].magnitude is not None:
                found["ratio"] = modules[path].ratio().float().contiguous()
            yield path, found


def _padded(x: Tensor) -> Tensor:
    """Return x (N, R, W) in bfloat16, with zeros up to a multiple of four in R."""
    number, rank, width = x.shape
    out = x.new_zeros(number, rank + -rank % RANKS, width, dtype=torch.bfloat16)
    out[:, :rank] = x
    return out


def _pairs(B: Tensor) -> Tensor:
    """Rearrange B (N, O, R), scaling included: neighbours in R are multiplied at once, 64 columns lie together."""
    even = _padded(B.transpose(1, 2))
    whole = even.shape[2] // COLUMNS * COLUMNS
    parts = [part for part in even.split([whole, even.shape[2] - whole], dim=2) if part.shape[2]]
    found = [p.unflatten(2, (-1, min(COLUMNS, p.shape[2]))).unflatten(1, (-1, 2)) for p in parts]
    return torch.cat([p.permute(0, 3, 1, 4, 2).flatten(1) for p in found], dim=1)


def _addresses(layer: Any) -> list[int]:
    """Return the weights of a layer in the order of serve.c; 0 is none."""
    own, mlp = layer.self_attn, layer.mlp
    q, k, v = own.q_proj, own.k_proj, own.v_proj
    tensors = (
        layer.input_layernorm.weight,
        q.weight,
        k.weight,
        v.weight,
        q.bias,
        k.bias,
        v.bias,
        own.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
