"""Adapter: a method in a model - how it acts, merges, is saved and leaves again."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.bases import why_not_merged
from loralab.adapters.checkpoints import keep_gradients
from loralab.adapters.fast_path import disable_fast_path
from loralab.adapters.fingerprint import base_paths, dtype_name, fingerprint
from loralab.adapters.folder import write
from loralab.adapters.model_folder import keeping_record, require_no_model, saving_adapters, write_merged
from loralab.adapters.outside import fields_of, pack
from loralab.adapters.peft_fields import task_type
from loralab.adapters.present import require_readable
from loralab.adapters.registry import MethodSpec, spec_of
from loralab.adapters.several import AdapterSet
from loralab.adapters.shells import plain_paths
from loralab.adapters.split import put_together, require_whole, writes
from loralab.adapters.subset import TrainedInFull
from loralab.adapters.targets import HEADS
from loralab.adapters.wrapper import Wrapper, replace_modules
from loralab.errors import AdapterStateError, join_limited


class Adapter:
    """A method attached to a model: what is trained, and where.

    `modules` are the adapted layers and `saved` those trained in full, both by their path in the
    model (in that inside DDP or torch.compile). The model stays the user's own nn.Module and works
    in any training loop. `left_out` is what is not adapted although the targets could mean it, by
    path, with the reason; `notes` say it in a line. Of several adapters of a model one acts; only
    its parameters require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        modules: Mapping[str, Any],
        saved: Mapping[str, TrainedInFull],
        name: str = "default",
    ) -> None:
        self.name = name
        self.model = model
        self.config = config
        self.modules: dict[str, Any] = dict(modules)
        self.saved = dict(saved)
        self._hooks: list[Any] = []
        self._set: AdapterSet | None = None  # that it belongs to while it is attached
        self._merged = False  # also where what is trained are whole modules alone
        self._before_merge: Adapter | None = self  # acts again after unmerge(); None is the base
        self.acted_before: Adapter | None = None  # when this one was attached
        self._trains = self.parameters()
        self.given: nn.Module = model  # as the user has it, with shells around it
        self.left_out: Mapping[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.base_fingerprint: str | None = None  # where the base's weights are not all here
        self.budget = self.spec.budget(modules, config) if self.spec.budget else None

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy belongs to the copied model; what stands around that is not copied along."""
        return {**self.__dict__, "given": self.model}

    @property
    def spec(self) -> MethodSpec:
        """Return the method that the configuration is of."""
        return spec_of(self.config)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return everything that is trained, by path: `<module>.lora_A`, or the saved module's own.

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
        """Return everything that is trained."""
        return list(self.named_parameters().values())

    @property
    def num_parameters(self) -> int:
        """Return how many numbers are trained, modules trained in full included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def merged(self) -> bool:
        """Return whether the base weights hold the update at present."""
        return self._merged or any(module.merged for module in self.modules.values())

    @property
    def can_merge(self) -> bool:
        """Return whether the base weights can hold what was learnt."""
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
        """Return all that must be kept to go on training: trained tensors and the modules' buffers."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        seen: set[int] = set()
        for name, module in self.modules.items():
            own = {key: b for key, b in module.own_buffers().items() if id(b) not in seen}
            seen |= set(map(id, own.values()))
            state |= {f"{name}.{key}": value for key, value in own.items()}
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
            raise AdapterStateError(
                f"the state is of another adapter: {join_limited(sorted(wrong))}",
                code="other_adapter",
                field=min(wrong),
            )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for module in self.modules.values():
            module.refreshed()

    def merge(self) -> None:
        """Put the update into the base weights; `unmerge` restores them bit for bit.

        Until then `model.state_dict()` holds merged weights, and says so under keys that end in
        `.merged`: an unmerged model refuses it, as it would add the update once more.

        Raises:
            AdapterStateError: already merged, the method cannot be merged, a merged weight would
                not be finite, a hook changes what a layer gives, or FSDP has split the weights.
        """
        own = self._attached()
        require_whole(self.model.parameters(), "merge", "save the adapter, and merge it elsewhere")
        if reason := self.reason_not_to_merge():
            raise AdapterStateError(reason, code="cannot_merge")
        if self.merged:
            raise AdapterStateError("already merged; call unmerge() first", code="merged")
        own.require_unmerged()
        before = own.current
        own.switch(self)
        self._merge_all(before)
        self._before_merge, self._merged = before, True

    def _merge_all(self, before: "Adapter | None") -> None:
        """Merge every layer, or none; then the adapter acts that did before."""
        done: list[Wrapper] = []
        try:
            for name, module in self.modules.items():
                try:
                    module.merge_weights()
                except AdapterStateError as error:
                    text = f"{name}: {error}"
                    raise AdapterStateError(text, code=error.code, field=error.field) from None
                done.append(module)
        except BaseException:
            for module in done:
                module.unmerge_weights()
            self._attached().switch(before)
            raise

    def unmerge(self) -> None:
        """Put the base weights back, the same tensors as before the merge.

        Raises:
            AdapterStateError: not merged.
        """
        own = self._attached()
        if not self.merged:
            raise AdapterStateError("not merged", code="not_merged")
        for module in self.modules.values():
            if module.merged:  # they may have been merged one by one
                module.unmerge_weights()
        self._merged = False
        before, self._before_merge = self._before_merge, self
        if before is None or before in own.members.values():
            own.switch(before)

    def activate(self) -> None:
        """Let this adapter answer from now on.

        Raises:
            AdapterStateError: an adapter is merged.
        """
        own = self._attached()
        own.require_unmerged()
        own.switch(self)

    @contextlib.contextmanager
    def active(self) -> Iterator["Adapter"]:
        """Let this adapter answer for a block.

        Raises:
            AdapterStateError: an adapter is merged.
        """
        own = self._attached()
        own.require_unmerged()
        with own.standing(self):
            yield self

    def detach(self) -> nn.Module:
        """Take the adapter out and return the model; without its last one it is as it was before.

        If this one acted, the last one attached of the others does now.
        """
        own = self._attached()
        if self.merged:
            self._before_merge = self
            self.unmerge()
        own.remove(self)
        self._set = None
        return self.given

    def merge_and_detach(self) -> nn.Module:
        """Return the plain model with the update in its weights; the base weights are given up.

        Raises:
            AdapterStateError: the method cannot be merged, or the model has other adapters.
        """
        own = self._attached()
        if others := [name for name in own.members if name != self.name]:
            raise AdapterStateError(
                f"the model has other adapters: {join_limited(others)}; detach() them first, as their base is given up",
                code="others_attached",
            )
        if not self.merged:
            self.merge()
        self.leave({wrapper: wrapper.finished() for wrapper in self._wrappers()})
        own.close()
        self._set = None
        return self.given

    def enter(self) -> None:
        """Put the modules into the model; called by the set of its adapters."""
        self.follow()
        replace_modules(self.model, {wrapper.base: wrapper for wrapper in self._wrappers()})
        self._hooks = [
            keep_gradients(self.model),
            *self.spec.hooks(self.model, self.modules),
            *disable_fast_path(self.model),
            *saving_adapters(self.model, self._save_model),
        ]
        self.learn(True)

    def follow(self) -> None:
        """Bring what waited beside the model to the mode and the device that its base has now."""
        for wrapper in self._wrappers():
            wrapper.train(wrapper.base.training)
            there = next((p.device for p in wrapper.base.parameters()), None)
            if there is not None and any(p.device != there for p in wrapper.parameters()):
                wrapper.to(there)

    def leave(self, new: Mapping[nn.Module, nn.Module] | None = None) -> None:
        """Take the modules out of the model; called by the set of its adapters.

        Args:
            new: what comes into their places; None is the base's own modules.
        """
        self._trains = [p for p in self.parameters() if p.requires_grad]
        replace_modules(self.model, new or {w: w.base for w in self._wrappers()})
        for hook in self._hooks:
            if hook is not None:
                hook.remove()
        self._hooks = []
        self.learn(False)

    def learn(self, on: bool) -> None:
        """Let the parameters require a gradient that did when the adapter last acted, or none."""
        for parameter in self._trains:
            parameter.requires_grad_(on)

    def save(self, folder: str | Path, record: Mapping[str, Any] | None = None, *, overwrite: bool = False) -> Path:
        """Write the adapter folder that `load` reads, and peft where it has the method.

        Where FSDP has split the adapter, all processes must call it, and the first one writes.

        Args:
            record: what else loralab.json should say, such as {"base": {"name": ...}}.
            overwrite: replace an adapter that stands in the folder.

        Raises:
            OutputError: the folder holds an adapter, cannot be written, or could not be loaded.
            AdapterStateError: another adapter is merged.
        """
        with self._attached().standing(self):
            return self._save(Path(folder), dict(record or {}), overwrite)

    save_pretrained = save

    def _save(self, folder: Path, record: dict[str, Any], overwrite: bool) -> Path:
        plain = plain_paths(self.model)
        modules = {plain(name): module for name, module in self.modules.items()}
        record["base"] = {**_described(self.model), **record.get("base", {})}
        record["base"]["fingerprint"] = self.base_fingerprint or fingerprint(self.model, frozenset(self.saved))
        writing = writes(self.parameters())
        with put_together(self._wrappers()):
            headed = any(name in HEADS for name in self.saved)
            fields: dict[str, Any] = {
                "task_type": task_type(record["base"], headed=headed),
                "base_model_name_or_path": record["base"].get("name"),
                "revision": None,
                "inference_mode": True,
                **fields_of(self.spec, self.config, modules, base_paths(self.model)),
            }
            tensors = self.tensors()
            if not writing:
                return Path(folder)
            require_readable(self.model, modules, fields, tensors)
            return write(folder, fields, tensors, record, overwrite=overwrite)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save, under peft's keys; PiSSA as plain LoRA, with its start taken out."""
        plain = plain_paths(self.model)
        with put_together(self._wrappers()):
            tensors = pack(self.spec, {plain(name): m for name, m in self.modules.items()})
            for name, saved in self.saved.items():
                key = f"{self.spec.prefix}{plain(name)}"
                tensors |= {f"{key}.{k}": v for k, v in saved.trained.state_dict().items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def reason_not_to_merge(self) -> str:
        """Return why the base weights cannot hold what was learnt; empty if they can."""
        for name, module in self.modules.items():
            if module.cannot_merge:
                return str(module.cannot_merge)
            if reason := why_not_merged(module.original):
                return f"{name} cannot be merged: {reason}"
        return ""

    def _save_model(self, folder: Path, options: Mapping[str, Any]) -> Any:
        """Write what `model.save_pretrained` should: the adapter, or once merged the plain model."""
        if not self.merged:
            remedy = "call adapter.save in all processes"
            require_whole(self.parameters(), "save_pretrained", remedy)
            require_no_model(folder)
            with keeping_record(folder):
                return self.save(folder, overwrite=True)
        return write_merged(self.model, self._wrappers(), folder, options)

    def _wrappers(self) -> list[Any]:
        return [*self.modules.values(), *self.saved.values()]

    def _attached(self) -> AdapterSet:
        if self._set is None:
            raise AdapterStateError(f"adapter {self.name!r} is no longer attached to a model", code="not_attached")
        return self._set


def _described(model: nn.Module) -> dict[str, Any]:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    return {"name": name, "architecture": type(model).__name__, "dtype": dtype_name(model)}
