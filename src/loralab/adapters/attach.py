"""attach, load, detach, Adapter: the only file that replaces modules of a model."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loralab.adapters.fingerprint import dtype_name, fingerprint
from loralab.adapters.folder import PREFIX, AdapterFolder, config_to_peft, read, write
from loralab.adapters.linear import LinearWithLoRA
from loralab.adapters.methods import LoRA, Names
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import (
    HEADS,
    ends_with,
    matches_pattern,
    saved_names,
    target_names,
)
from loralab.errors import AdapterFileError, AdapterStateError, BaseMismatchWarning, some

TASK_TYPES = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}  # kind -> peft's name

Wrapper = LinearWithLoRA | TrainedInFull


class Adapter:
    """A method attached to a model: what is trained, and where.

    `modules` are the adapted layers and `saved` those trained in full, both by their path in the
    model. The model stays the user's own nn.Module and works in any training loop.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LoRA,
        modules: Mapping[str, LinearWithLoRA],
        saved: Mapping[str, TrainedInFull],
        trainable_before: frozenset[nn.Parameter],
    ) -> None:
        self.model = model
        self.config = config
        self.modules = dict(modules)
        self.saved = dict(saved)
        self._trainable_before = trainable_before
        self._hook = _keep_gradients_in_checkpoints(model)
        self._attached = True

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by path: `<module>.lora_A`, or the saved module's own."""
        found: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            found |= {f"{name}.lora_A": module.lora_A, f"{name}.lora_B": module.lora_B}
        for name, saved in self.saved.items():
            found |= {f"{name}.{key}": value for key, value in saved.trained.named_parameters()}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return list(self.named_parameters().values())

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained, modules trained in full included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def merged(self) -> bool:
        """Whether the base weights hold the update at present."""
        return any(module.merged for module in self.modules.values())

    def state(self) -> dict[str, Tensor]:
        """All that must be kept to go on training: trained tensors and the modules' buffers."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self.modules.items():
            state |= {f"{name}.{key}": value for key, value in module.named_buffers(recurse=False)}
        for name, saved in self.saved.items():
            state |= {f"{name}.{key}": value for key, value in saved.trained.named_buffers()}
        return {name: tensor.detach() for name, tensor in state.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Fill in what `state()` returned.

        Raises:
            AdapterStateError: the names or shapes are not those of this adapter.
        """
        own = self.state()
        wrong = list(own.keys() ^ state.keys())
        wrong += [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
        if wrong:
            raise AdapterStateError(f"the state is of another adapter: {some(sorted(wrong))}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self) -> None:
        """Put the update into the base weights; `unmerge` restores them bit for bit.

        Raises:
            AdapterStateError: already merged, or a merged weight would not be finite.
        """
        self._require_attached()
        if self.merged:
            raise AdapterStateError("already merged; call unmerge() first")
        done: list[LinearWithLoRA] = []
        try:
            for name, module in self.modules.items():
                try:
                    module.merge_weights()
                except AdapterStateError as error:
                    raise AdapterStateError(f"{name}: {error}") from None
                done.append(module)
        except BaseException:
            for module in done:
                module.unmerge_weights()
            raise

    def unmerge(self) -> None:
        """Put the base weights back, the same tensors as before the merge."""
        self._require_attached()
        for module in self.modules.values():
            module.unmerge_weights()

    def detach(self) -> nn.Module:
        """Take the adapter out again and return the model exactly as it was before `attach`."""
        if self.merged:
            self.unmerge()
        self._replace({wrapper: wrapper.base for wrapper in self._wrappers()})
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in self._trainable_before)
        return self.model

    def merge_and_detach(self) -> nn.Module:
        """Return the plain model with the update in its weights; the base weights are given up."""
        if not self.merged:
            self.merge()
        finished: dict[nn.Module, nn.Module] = {m: m.base for m in self.modules.values()}
        finished |= {wrapper: wrapper.finished() for wrapper in self.saved.values()}
        self._replace(finished)
        return self.model

    def save(
        self,
        folder: str | Path,
        record: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Write the adapter folder that peft, vLLM and `load` read, and read it back.

        Args:
            record: what else loralab.json shall say, such as {"base": {"name": ...}}.
            overwrite: replace an adapter that stands in the folder.

        Raises:
            OutputError: the folder holds an adapter, or cannot be written.
        """
        self._require_attached()
        record = dict(record or {})
        saved = frozenset(self.saved)
        record["base"] = {**_described(self.model), **record.get("base", {})}
        record["base"]["fingerprint"] = fingerprint(self.model, saved)
        config = config_to_peft(
            self.config,
            self.modules,
            self._base_paths(),
            transposed=all(module.transposed for module in self.modules.values()),
            base=record["base"].get("name"),
            task_type=self._task_type(record["base"].get("kind")),
        )
        return write(folder, config, self.tensors(), record, overwrite=overwrite)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under peft's keys; PiSSA with its start taken out, as plain LoRA."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            A, B, _ = module.factors()
            tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        for name, saved in self.saved.items():
            tensors |= {f"{PREFIX}{name}.{k}": v for k, v in saved.trained.state_dict().items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def _task_type(self, kind: str | None) -> str | None:
        """peft's name; without a trained head none, or peft would look for its weights in vain."""
        if kind == "sequence-classification" and not any(name in HEADS for name in self.saved):
            return None
        return TASK_TYPES.get(kind or "")

    def _base_paths(self) -> list[str]:
        """Paths of all modules that the base model has, but for those trained in full."""
        hidden = [*(f"{name}.base" for name in self.modules), *self.saved]
        hidden += [f"{name}.dropout" for name in self.modules]
        paths = [name for name, _ in self.model.named_modules() if name]
        return [p for p in paths if not any(p == h or p.startswith(f"{h}.") for h in hidden)]

    def _wrappers(self) -> list[Wrapper]:
        return [*self.modules.values(), *self.saved.values()]

    def _replace(self, new: Mapping[nn.Module, nn.Module]) -> None:
        self._require_attached()
        _replace(self.model, new)
        if self._hook is not None:
            self._hook.remove()
        self._attached = False

    def _require_attached(self) -> None:
        if not self._attached:
            raise AdapterStateError("this adapter is no longer attached to a model")


def attach(model: nn.Module, config: LoRA, *, generator: torch.Generator | None = None) -> Adapter:
    """Put an adapter into the model, in place: the base is frozen, only the adapter trains.

    Args:
        generator: where the random starts come from; None is torch's global generator.

    Raises:
        TargetError: a name in the configuration selects nothing.
        AdapterStateError: the model carries an adapter already.
    """
    if any(isinstance(module, LinearWithLoRA | TrainedInFull) for module in model.modules()):
        raise AdapterStateError("the model carries an adapter already; detach() it first")
    # 1. decide everything, so that an error leaves the model as it was
    originals = dict(model.named_modules(remove_duplicate=False))
    names, full = target_names(model, config), saved_names(model, config)
    trainable = frozenset(p for p in model.parameters() if p.requires_grad)
    modules = {n: LinearWithLoRA(originals[n], config.for_module(n), generator) for n in names}
    saved = {name: TrainedInFull(originals[name]) for name in full}
    # 2. change the model
    model.requires_grad_(False)
    wrappers: Iterable[Wrapper] = (*modules.values(), *saved.values())
    for wrapper in wrappers:
        wrapper.train(wrapper.base.training)
    _replace(model, {wrapper.base: wrapper for wrapper in wrappers})
    return Adapter(model, config, modules, saved, trainable)


def load(model: nn.Module, path: str | Path) -> Adapter:
    """Attach the adapter that a folder holds: written by `Adapter.save`, or by peft.

    Strict both ways: the folder's tensors and those of the adapter must be the same set, in the
    same shapes. Another base model than the adapter was trained on is a warning, if it fits.

    Raises:
        AdapterFileError: the folder is damaged, a pickle, or does not fit the model.
        AdapterStateError: the model carries an adapter already.
    """
    stored = read(path)
    adapter = attach(model, _present(model, stored.config, stored.path))
    try:
        _fill(adapter, stored)
        _compare_base(adapter, stored)
    except BaseException:
        adapter.detach()
        raise
    return adapter


def _present(model: nn.Module, config: LoRA, path: Path) -> LoRA:
    """Without the names that select nothing: peft writes such; the tensors decide what is there."""
    names = [name for name, _ in model.named_modules() if name]

    def found(wanted: Iterable[str]) -> tuple[str, ...]:
        return tuple(w for w in wanted if any(ends_with(name, w) for name in names))

    targets = config.target_modules
    if isinstance(targets, tuple) and not (targets := found(targets)):
        raise AdapterFileError(
            f"{path} does not fit {type(model).__name__}, which has none of its target modules "
            f"{some(config.target_modules or ())}"
        )
    config = replace(
        config,
        target_modules=targets,
        modules_to_save=found(config.modules_to_save),
        rank_pattern={p: r for p, r in config.rank_pattern.items() if _any_match(names, p)},
        alpha_pattern={p: a for p, a in config.alpha_pattern.items() if _any_match(names, p)},
    )
    return replace(config, exclude_modules=_excluded(model, config))


def _excluded(model: nn.Module, config: LoRA) -> Names:
    """What of exclude_modules takes a target away."""
    excluded = config.exclude_modules
    if excluded is None:
        return None
    plain = replace(config, exclude_modules=None, layers=None, layers_pattern=())
    targets = target_names(model, replace(plain, rank_pattern={}, alpha_pattern={}))
    if isinstance(excluded, str):
        return excluded if any(re.fullmatch(excluded, name) for name in targets) else None
    return tuple(w for w in excluded if any(ends_with(name, w) for name in targets)) or None


def _any_match(names: Iterable[str], pattern: str) -> bool:
    return any(matches_pattern(name, pattern) for name in names)


@torch.no_grad()
def _fill(adapter: Adapter, stored: AdapterFolder) -> None:
    own = adapter.tensors()
    missing, extra = (
        sorted(own.keys() - stored.tensors.keys()),
        sorted(stored.tensors.keys() - own.keys()),
    )
    misshapen = [
        f"{key} is {tuple(stored.tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & stored.tensors.keys())
        if own[key].shape != stored.tensors[key].shape
    ]
    problems = [f"missing: {some(missing)}"] if missing else []
    problems += [f"not in this model: {some(extra)}"] if extra else []
    problems += [f"misshapen: {some(misshapen)}"] if misshapen else []
    if problems:
        raise AdapterFileError(
            f"{stored.path} does not fit {type(adapter.model).__name__}; " + "; ".join(problems)
        )
    for key, tensor in own.items():
        tensor.copy_(stored.tensors[key])


def _compare_base(adapter: Adapter, stored: AdapterFolder) -> None:
    base = stored.record.get("base", {})
    trained_on = base.get("fingerprint")
    if trained_on is None or "float16" in (base.get("dtype"), dtype_name(adapter.model)):
        return  # fp16 rounds its own way: fingerprints across dtypes would differ for nothing
    here = fingerprint(adapter.model, frozenset(adapter.saved))
    if trained_on != here:
        warnings.warn(
            f"{stored.path} was trained on {base.get('name') or 'a base model'} with fingerprint "
            f"{trained_on}; this model has {here}, so its answers will differ",
            BaseMismatchWarning,
            stacklevel=3,
        )


def _described(model: nn.Module) -> dict[str, Any]:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return {"name": name, "architecture": type(model).__name__, "dtype": dtype_name(model)}


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand; a layer can stand in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new:
                setattr(parent, name, new[child])


def _keep_gradients_in_checkpoints(model: nn.Module) -> RemovableHandle | None:
    """Let gradients reach adapters through reentrant checkpoints although the embedding is frozen.

    A reentrant checkpoint drops all gradients if no *input* of its block needs one. The hook
    asks at each call, so it does not matter whether checkpointing is enabled before or after.
    """

    def mark(module: nn.Module, inputs: Any, output: Any) -> None:
        checkpoints = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if checkpoints and torch.is_grad_enabled() and isinstance(output, Tensor):
            output.requires_grad_(True)

    get_input = getattr(model, "get_input_embeddings", None)
    embedding = None
    if callable(get_input):
        try:
            embedding = get_input()
        except NotImplementedError:  # models without one, such as plain classifiers
            embedding = None
    if not isinstance(embedding, nn.Module):
        return None
    return embedding.register_forward_hook(mark)
