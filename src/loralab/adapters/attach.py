"""attach, load, detach, Adapter: the only file that replaces modules of a model."""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import why_not_merged
from loralab.adapters.budget import RankBudget
from loralab.adapters.checkpoints import keep_gradients
from loralab.adapters.fast_path import disable_fast_path
from loralab.adapters.fingerprint import base_paths, dtype_name, fingerprint
from loralab.adapters.folder import write
from loralab.adapters.left_out import described, left_out, notable
from loralab.adapters.methods import AdaLoRA, LinearProbe, Method
from loralab.adapters.model_folder import (
    keeping_record,
    require_no_adapter,
    require_no_model,
    saving_adapters,
    untied,
)
from loralab.adapters.offload import require_alone, require_weights
from loralab.adapters.paths import inside
from loralab.adapters.peft_fields import task_type
from loralab.adapters.present import require_readable
from loralab.adapters.reads import read_sometimes
from loralab.adapters.recipes import RECIPES
from loralab.adapters.shells import plain_paths, unwrapped
from loralab.adapters.split import put_together, require_whole, writes
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import HEADS, head_names, saved_names
from loralab.adapters.wrapper import Wrapper, put_in_place
from loralab.errors import AdapterStateError, LeftOutWarning, TargetError, some


class Adapter:
    """A method attached to a model: what is trained, and where.

    `modules` are the adapted layers and `saved` those trained in full, both by their path in the
    model (in that inside DDP or torch.compile). The model stays the user's own nn.Module and works
    in any training loop. `left_out` is what is not adapted although the targets could mean it, by
    path, with the reason; `notes` say it in a line.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        modules: Mapping[str, Any],
        saved: Mapping[str, TrainedInFull],
        trainable_before: frozenset[str],
    ) -> None:
        self.model = model
        self.config = config
        self.modules: dict[str, Any] = dict(modules)
        self.saved = dict(saved)
        self._trainable_before = trainable_before
        self._recipe = RECIPES[type(config)]
        self._hooks = [
            keep_gradients(model),
            *self._recipe.watch(model, modules),
            *disable_fast_path(model),
        ]
        self._attached = True
        self.given: nn.Module = model  # as the user has it, with shells around it
        self.left_out: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.base_fingerprint: str | None = None  # where the base's weights are not all here
        self.budget = RankBudget(modules, config) if isinstance(config, AdaLoRA) else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to the copied model; what stands around that is not copied along."""
        return {**self.__dict__, "given": self.model}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by path: `<module>.lora_A`, or the saved module's own.

        A parameter that several modules share stands under the first of them.
        """
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for name, module in self.modules.items():
            for key, parameter in module.trained().items():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{name}.{key}"] = parameter
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

    @property
    def can_merge(self) -> bool:
        """Whether the base weights can hold what was learnt."""
        return not self.reason_not_to_merge()

    def step(self) -> None:
        """Call once after every optimiser step, before the gradients are dropped.

        AdaLoRA moves its ranks here; other methods need nothing, and the call does no harm.

        Raises:
            AdapterStateError: there are no gradients.
            ConfigError: AdaLoRA does not know the total number of steps.
        """
        if self.budget is not None:
            require_whole(self.parameters(), "AdaLoRA", "take lora, or split the base alone")
            self.budget.step()

    def state(self) -> dict[str, Tensor]:
        """All that must be kept to go on training: trained tensors and the modules' buffers."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        for name, module in self.modules.items():
            state |= {f"{name}.{key}": value for key, value in module.own_buffers().items()}
        for name, saved in self.saved.items():
            state |= {f"{name}.{key}": value for key, value in saved.trained.named_buffers()}
        if self.budget is not None:
            state |= self.budget.state()
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
        for module in self.modules.values():
            module.refreshed()

    def merge(self) -> None:
        """Put the update into the base weights; `unmerge` restores them bit for bit.

        Raises:
            AdapterStateError: already merged, the method cannot be merged, a merged weight would
                not be finite, a hook changes what a layer gives, or FSDP has split the weights.
        """
        self._require_attached()
        require_whole(self.model.parameters(), "merge", "save the adapter, and merge it elsewhere")
        if reason := self.reason_not_to_merge():
            raise AdapterStateError(reason, code="cannot_merge")
        if self.merged:
            raise AdapterStateError("already merged; call unmerge() first")
        done: list[Wrapper] = []
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
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trainable_before)
        return self.given

    def merge_and_detach(self) -> nn.Module:
        """Return the plain model with the update in its weights; the base weights are given up.

        Raises:
            AdapterStateError: the method cannot be merged.
        """
        if not self.merged:
            self.merge()
        self._replace({wrapper: wrapper.finished() for wrapper in self._wrappers()})
        return self.given

    def save(
        self,
        folder: str | Path,
        record: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Write the adapter folder that `load` reads, and peft where it has the method.

        Where FSDP has split the adapter, all processes must call it, and the first one writes.

        Args:
            record: what else loralab.json shall say, such as {"base": {"name": ...}}.
            overwrite: replace an adapter that stands in the folder.

        Raises:
            OutputError: the folder holds an adapter, cannot be written, or could not be loaded.
        """
        self._require_attached()
        plain = plain_paths(self.model)
        modules = {plain(name): module for name, module in self.modules.items()}
        record = dict(record or {})
        record["base"] = {**_described(self.model), **record.get("base", {})}
        record["base"]["fingerprint"] = self.base_fingerprint or fingerprint(
            self.model, frozenset(self.saved)
        )
        writing = writes(self.parameters())
        with put_together(self._wrappers()):
            headed = any(name in HEADS for name in self.saved)
            fields: dict[str, Any] = {
                "task_type": task_type(record["base"], headed=headed),
                "base_model_name_or_path": record["base"].get("name"),
                "revision": None, "inference_mode": True,
                **self._recipe.fields(self.config, modules, base_paths(self.model)),
            }  # fmt: skip
            tensors = self.tensors()
            if not writing:
                return Path(folder)
            require_readable(self.model, modules, fields, tensors)
            return write(folder, fields, tensors, record, overwrite=overwrite)

    save_pretrained = save

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under peft's keys; PiSSA with its start taken out, as plain LoRA."""
        plain = plain_paths(self.model)
        with put_together(self._wrappers()):
            tensors = self._recipe.pack({plain(name): m for name, m in self.modules.items()})
            for name, saved in self.saved.items():
                key = f"{self._recipe.prefix}{plain(name)}"
                tensors |= {f"{key}.{k}": v for k, v in saved.trained.state_dict().items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def reason_not_to_merge(self) -> str:
        """Why the base weights cannot hold what was learnt; empty if they can."""
        for name, module in self.modules.items():
            if module.cannot_merge:
                return str(module.cannot_merge)
            if reason := why_not_merged(module.original):
                return f"{name} cannot be merged: {reason}"
        return ""

    def _save_model(self, folder: Path, options: Mapping[str, Any]) -> Any:
        """What `model.save_pretrained` writes: the adapter, or merged the plain model."""
        if not self.merged:
            remedy = "call adapter.save in all processes"
            require_whole(self.parameters(), "save_pretrained", remedy)
            require_no_model(folder)
            with keeping_record(folder):
                return self.save(folder, overwrite=True)
        require_no_adapter(folder)
        finished: dict[nn.Module, nn.Module] = {w: _finished(w) for w in self._wrappers()}
        _replace(self.model, finished)
        try:
            with untied(self.model):
                write_model: Any = type(self.model)
                return write_model.save_pretrained(self.model, folder, **options)
        finally:
            _replace(self.model, {plain: wrapper for wrapper, plain in finished.items()})

    @contextmanager
    def taken_out(self) -> Iterator[nn.Module]:
        """Give the model its own layers back for a block, such as one that saves the base."""
        self._require_attached()
        wrappers = self._wrappers()
        own = self.model.__dict__.pop("save_pretrained", None)
        _replace(self.model, {wrapper: wrapper.base for wrapper in wrappers})
        try:
            yield self.model
        finally:
            _replace(self.model, {wrapper.base: wrapper for wrapper in wrappers})
            if own is not None:
                self.model.__dict__["save_pretrained"] = own

    def _wrappers(self) -> list[Any]:
        return [*self.modules.values(), *self.saved.values()]

    def _replace(self, new: Mapping[nn.Module, nn.Module]) -> None:
        self._require_attached()
        _replace(self.model, new)
        for hook in self._hooks:
            if hook is not None:
                hook.remove()
        self._attached = False

    def _require_attached(self) -> None:
        if not self._attached:
            raise AdapterStateError("this adapter is no longer attached to a model")


def attach(
    model: nn.Module, config: Method, *, generator: torch.Generator | None = None
) -> Adapter:
    """Put an adapter into the model, in place: the base is frozen, only the adapter trains.

    What is left out although the targets could mean it is a LeftOutWarning; `Adapter.left_out` has
    it by path.

    Args:
        generator: where the random starts come from; None is torch's global generator.

    Raises:
        TargetError: a name in the configuration selects nothing, or what cannot be adapted.
        AdapterStateError: the model carries an adapter already.
    """
    adapter = put_into(model, config, generator)
    if adapter.notes and notable(adapter.left_out):
        name = type(adapter.model).__name__
        warnings.warn(f"{name}: {'; '.join(adapter.notes)}", LeftOutWarning, stacklevel=2)
    return adapter


def put_into(model: nn.Module, config: Method, generator: torch.Generator | None = None) -> Adapter:
    """`attach` without its warning."""
    given, model = model, unwrapped(model)
    if any(isinstance(module, Wrapper | TrainedInFull) for module in model.modules()):
        raise AdapterStateError("the model carries an adapter already; detach() it first")
    require_alone(given)
    # 1. decide everything, so that an error leaves the model as it was
    trainable = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    own, modules, saved = wrappers_for(model, config, generator)
    wrappers: Sequence[Any] = (*modules.values(), *saved.values())
    require_weights(model, {name: model.get_submodule(name) for name in (*modules, *saved)})
    reasons = left_out(model, own, list(modules))
    note = described(model, reasons)
    sometimes = read_sometimes(model, modules)
    # 2. change the model
    model.requires_grad_(False)
    _replace(model, {wrapper.base: wrapper for wrapper in wrappers})
    adapter = Adapter(model, own, modules, saved, trainable)
    adapter.given, adapter.left_out = given, reasons
    adapter.notes = (note,) if note else ()
    adapter._hooks += saving_adapters(model, adapter._save_model)
    for name in sometimes:
        modules[name].__dict__["read_sometimes"] = True
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    return adapter


def wrappers_for(
    model: nn.Module, config: Method, generator: torch.Generator | None = None
) -> tuple[Any, dict[str, Wrapper], dict[str, TrainedInFull]]:
    """What `attach` puts into a model, by path, without putting it there.

    Returns the configuration with the head's name in it, the adapted layers, and the modules
    trained in full.

    Raises:
        TargetError: a name in the configuration selects nothing.
    """
    own = _with_head(model, config) if isinstance(config, LinearProbe) else config
    originals = dict(model.named_modules(remove_duplicate=False))
    full = saved_names(model, own)
    modules = RECIPES[type(own)].build(model, own, generator)
    modules = {name: m for name, m in modules.items() if not inside(name, full)}
    saved = {name: TrainedInFull(originals[name]) for name in full}
    wrappers: Sequence[Any] = (*modules.values(), *saved.values())
    for wrapper in wrappers:
        wrapper.train(wrapper.base.training)
    return own, modules, saved


def _with_head(model: nn.Module, config: LinearProbe) -> LinearProbe:
    """The head by its usual names, where none is given."""
    names = config.modules_to_save or tuple(head_names(model))
    if not names:
        raise TargetError(
            f"{type(model).__name__} has no head by a usual name ({', '.join(HEADS)}); "
            "name it with modules_to_save"
        )
    return replace(config, modules_to_save=names)


def _described(model: nn.Module) -> dict[str, Any]:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return {"name": name, "architecture": type(model).__name__, "dtype": dtype_name(model)}


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones stand; a layer can stand in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in new and new[child] is not parent:
                put_in_place(parent, name, new[child])


def _finished(wrapper: Any) -> nn.Module:
    """What a merged wrapper amounts to, without changing it."""
    if isinstance(wrapper, TrainedInFull):
        return copy.deepcopy(wrapper.trained).to(wrapper.dtype)
    plain: nn.Module = wrapper.finished()
    return plain
