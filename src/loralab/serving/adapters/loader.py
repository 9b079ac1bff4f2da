"""Turn an adapter folder that was read into an adapter that the engine can run.

All is made around a second structure on the same weights, in which nothing is ever replaced: so
adapters can be made while the engine computes. Strict where `adapters.load` only warns, since a
server must not answer with another base than was trained on.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import wrappers_for
from loralab.adapters.bases import shared_copy
from loralab.adapters.expert_formats import for_model
from loralab.adapters.experts import adaptable_experts
from loralab.adapters.fingerprint import dtype_name, fingerprint
from loralab.adapters.folder import AdapterFolder
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.load import base_problem, fill
from loralab.adapters.paths import inside
from loralab.adapters.peft_fields import TASK_TYPES
from loralab.adapters.positions import learnt_positions
from loralab.adapters.present import present_in
from loralab.adapters.registry import spec_of
from loralab.adapters.shells import promise_fixed
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import head_names
from loralab.adapters.wrapper import Wrapper
from loralab.errors import AdapterFileError, AdapterStateError, InputError
from loralab.models.kinds import CAUSAL, CLASSIFIER, TAGGER, VISION
from loralab.models.load import Base
from loralab.serving.adapters.info import section

MAX_REMEMBERED_LAYOUTS = 8  # configurations whose layers are remembered
Layers = dict[str, LinearWithLoRA]
Layer = TypeVar("Layer", bound=Wrapper)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServableAdapter:
    """An adapter in memory, attached to nothing.

    Attributes:
        adapter: its modules and the modules that it trained in full; without those of a prefix.
        prefix_kv: keys and values (L, 2, H, P, D) of a prefix or prompt, in the base's dtype.
        prefix_tokens: P.
        record: what loralab.json says.
        bytes: of its own tensors.
        kind: of the base, one of models.kinds.KINDS.
    """

    digest: str
    adapter: Adapter
    prefix_kv: Tensor | None
    prefix_tokens: int
    record: dict[str, Any]
    bytes: int
    kind: str


class AdapterLoader:
    """Makes adapters for one base.

    Args:
        base: without an adapter; its weights are shared and frozen, its modules left alone.
        quantize: how its linear layers are kept: none, nf4 or gguf.
    """

    def __init__(self, base: Base, *, quantize: str = "none") -> None:
        base.model.requires_grad_(False)
        self._model = shared_copy(base.model)
        promise_fixed(self._model)
        self._base = base
        self._dtype = dtype_name(self._model)
        self._quantize = quantize
        self._has_experts = bool(adaptable_experts(self._model))
        self._fingerprints: dict[frozenset[str], str] = {}
        self._known: OrderedDict[str, tuple[Any, Layers]] = OrderedDict()
        self._lock = threading.Lock()

    def load(self, stored: AdapterFolder) -> ServableAdapter:
        """Make the adapter that a folder holds; nothing of the folder's memory is kept.

        Raises:
            AdapterFileError: it belongs to another base, or cannot be served on this one.
        """
        stored = replace(stored, record=_sound(stored.record))
        try:
            with self._lock:
                return self._made(stored)
        except AdapterFileError:
            raise
        except (InputError, AdapterStateError) as error:
            raise AdapterFileError(
                f"{stored.path} does not fit {self._base.name}: {error}",
                code=error.code or "does_not_fit",
                field=error.field,
            ) from None

    @torch.no_grad()
    def _made(self, stored: AdapterFolder) -> ServableAdapter:
        self._require_servable(stored)
        stored = for_model(self._model, stored, experts=self._has_experts)
        adapter = self._empty(stored)
        for name, saved in adapter.saved.items():
            self._fit_head(name, saved, stored)
        fill(adapter, stored)
        self._compare_base(stored, adapter)
        prefix_kv = self._prefix_kv(adapter, stored)
        tensors = [parameter.requires_grad_(False) for parameter in adapter.parameters()]
        tensors += [b for module in adapter.modules.values() for b in module.own_buffers().values()]
        tensors += [] if prefix_kv is None else [prefix_kv]
        return ServableAdapter(
            digest=stored.digest,
            adapter=adapter,
            prefix_kv=prefix_kv,
            prefix_tokens=0 if prefix_kv is None else prefix_kv.shape[3],
            record=stored.record,
            bytes=sum(t.numel() * t.element_size() for t in tensors),
            kind=self._base.kind,
        )

    def _empty(self, stored: AdapterFolder) -> Adapter:
        """Return an adapter of a folder's configuration, to be filled."""
        key = repr(stored.config)
        if key in self._known:
            self._known.move_to_end(key)
            config, known = self._known[key]
            modules: dict[str, Any] = {name: clone_layout(layer) for name, layer in known.items()}
            return Adapter(self._model, config, modules, {})
        own, modules, saved = wrappers_for(self._model, present_in(self._model, stored))
        plain = {n: m for n, m in modules.items() if isinstance(m, LinearWithLoRA)}
        if not saved and not stored.config.modules_to_save and len(plain) == len(modules):
            self._known[key] = own, {name: clone_layout(m, "meta") for name, m in plain.items()}
            if len(self._known) > MAX_REMEMBERED_LAYOUTS:
                self._known.popitem(last=False)
        return Adapter(self._model, own, modules, saved)

    def _require_servable(self, stored: AdapterFolder) -> None:
        """Refuse what cannot be served; needs no model."""
        path, kind = stored.path, self._base.kind
        base, tokenizer = stored.record["base"], stored.record["tokenizer"]
        trained = base.get("kind")
        task = stored.fields.get("task_type")
        if trained is None and kind in TASK_TYPES and task in TASK_TYPES.values():
            trained = next(own for own, name in TASK_TYPES.items() if name == task)
        if trained not in (None, kind):
            raise AdapterFileError(
                f"{path} is for a {trained} model; {self._base.name} is {kind}", code="other_kind", field="kind"
            )
        packed = base.get("quantize", self._quantize)
        if packed != self._quantize:
            raise AdapterFileError(
                f"{path} was trained on a base with quantize {packed!r}, and this one has "
                f"{self._quantize!r}; serve it with --quantize {packed}",
                code="other_quantize",
                field="quantize",
            )
        rows = getattr(stored.config, "token_rows", ())
        if tokenizer.get("new_tokens") or (rows and max(rows) >= self._words()):
            raise AdapterFileError(
                f"{path} brings new tokens, which other adapters' answers would see too; merge it, "
                "and serve it as a base of its own",
                code="new_tokens",
                field="token_rows",
            )
        if reason := _cannot_serve(stored.config, kind):
            raise AdapterFileError(f"{path} {reason}", code="not_servable", field="peft_type")

    def _words(self) -> int:
        return len(self._model.get_input_embeddings().weight)

    def _fit_head(self, name: str, saved: TrainedInFull, stored: AdapterFolder) -> None:
        """Give the last layer of a head as many classes as the folder's tensors have."""
        if self._base.kind not in (CLASSIFIER, TAGGER, VISION):
            return
        if not inside(name, head_names(self._model)):
            return
        linears = {n: m for n, m in saved.trained.named_modules() if isinstance(m, nn.Linear)}
        if not linears:
            return
        path, last = list(linears.items())[-1]
        prefix = spec_of(stored.config).prefix + f"{name}.{path}".rstrip(".")
        weight = stored.tensors.get(f"{prefix}.weight")
        if weight is None or weight.ndim != 2 or weight.shape[1] != last.in_features:
            return  # `fill` says what is wrong
        labels = stored.record["task"].get("labels")
        if isinstance(labels, list) and labels and len(labels) != len(weight):
            raise AdapterFileError(
                f"{stored.path} names {len(labels)} labels, and its head has {len(weight)} classes",
                code="label_count",
                field="labels",
            )
        if len(weight) != last.out_features:
            last.out_features = len(weight)
            last.weight = nn.Parameter(last.weight.new_empty(weight.shape))
            if last.bias is not None:
                last.bias = nn.Parameter(last.bias.new_empty(len(weight)))

    def _compare_base(self, stored: AdapterFolder, adapter: Adapter) -> None:
        without = frozenset(adapter.saved)

        def here() -> str:
            if without not in self._fingerprints:
                self._fingerprints[without] = fingerprint(self._model, without)
            return self._fingerprints[without]

        if problem := base_problem(stored, self._dtype, here):
            raise AdapterFileError(f"{problem}, so its answers would differ", code="other_base", field="base")

    def _prefix_kv(self, adapter: Adapter, stored: AdapterFolder) -> Tensor | None:
        """Return the keys and values of a prefix or prompt, whose modules are not needed any more."""
        config, states = adapter.config, adapter.spec.prefix_kv
        if states is None:
            return None
        start, limit = learnt_positions(self._model)
        if limit is not None and start + config.tokens >= limit:
            raise AdapterFileError(
                f"{stored.path} has {config.tokens} tokens in front, and the model has learnt only {limit} positions",
                code="too_many_positions",
                field="tokens",
            )
        found = torch.stack(states(self._model, adapter.modules))
        adapter.modules = {}
        dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        return found.to(dtype).contiguous()


def clone_layout(module: Layer, device: str | None = None) -> Layer:
    """Return an update of the same layer and shape, its values still to be filled in.

    To make it anew would draw numbers that nobody needs, and cost ten times as much.
    """
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)  # the tables of hooks, all empty, stay in common
    for name in ("_parameters", "_buffers", "_modules", "_unmerged"):
        new.__dict__[name] = module.__dict__[name].copy()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            own = torch.empty(parameter.shape, device=device or module.base.weight.device)
            new._parameters[name] = nn.Parameter(own, requires_grad=False)
    if isinstance(new, LinearWithLoRA):
        new.refreshed()
    return new


def _cannot_serve(config: Any, kind: str) -> str:
    """Return why a method cannot share a batch of many adapters; empty if it can."""
    spec = spec_of(config)
    if spec.cannot_serve:
        return spec.cannot_serve
    if spec.prefix_kv is not None and kind != CAUSAL:
        return (
            "has tokens in front of the input, which only a causal model can keep in its cache; "
            "serve it as a base of its own"
        )
    return ""


def _sound(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record whose parts are objects where they should be."""
    parts = {name: section(record, name) for name in ("base", "task", "tokenizer")}
    return {**record, **parts}
