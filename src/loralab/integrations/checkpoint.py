"""State of a checkpoint of transformers' Trainer beside the adapter folder, for resuming.

Trainer fills in `model.safetensors` with `load_state_dict(..., strict=False)` when it resumes, and
when it goes back to the best weights. The file holds the adapter's tensors alone, under the names
that they have in the model, with the buffers that a method needs to train on, and one entry of
bytes: a JSON object that says which step, settings and base they belong to. Another adapter or
another base would be filled in just as quietly, so that is compared before a number is changed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from loralab import atomic
from loralab.adapters.adapter import Adapter
from loralab.adapters.fingerprint import fingerprint
from loralab.adapters.model_folder import STATE, STATE_METADATA, holds_state
from loralab.adapters.several import adapters_of
from loralab.errors import AdapterStateError, join_limited

RECORD_ENTRY = "loralab.json"  # the entry of bytes; no module has a dot in its name


class CheckpointState:
    """Writes an adapter's state, and compares what is filled into its model; `step` was the last.

    The comparison is a hook of the model's `load_state_dict`, which heeds nothing but such states.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.step: int | None = None
        self._hooks: list[Any] = []
        self.watch()

    def watch(self) -> None:
        """Compare what is filled into the model from now on."""
        if not self._hooks:
            model = self.adapter.model
            self._hooks.append(model.register_load_state_dict_pre_hook(self._compare))
            self._hooks.append(model.register_load_state_dict_post_hook(self._forget_base))

    def leave(self) -> None:
        """Take the hooks from the model, once its training has ended."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.step = [], None

    def recall(self, folder: Path, model: nn.Module) -> None:
        """Compare what was filled into the model from a checkpoint while nothing watched it.

        Raises:
            AdapterStateError: it is of another adapter or base.
        """
        if not holds_state(folder):
            return
        state, prefix = safetensors.torch.load_file(folder / STATE), self._prefix(model)
        self._compare(model, state, prefix)
        own = self._own().items()
        if not all(torch.equal(state[prefix + key], tensor.detach().cpu()) for key, tensor in own):
            self.step = None

    def write(self, folder: Path, model: nn.Module, step: int) -> None:
        """Write the state after `step` steps.

        Args:
            model: what the state is filled into, with whatever shells stand around the adapted one.
        """
        prefix = self._prefix(model)
        about = torch.frombuffer(bytearray(json.dumps(self._about(step)).encode()), dtype=torch.uint8)
        tensors = {f"{prefix}{RECORD_ENTRY}": about}
        for key, tensor in self._own().items():
            tensors[prefix + key] = tensor.detach().cpu().contiguous()
        atomic.write_file(folder / STATE, safetensors.torch.save(tensors, STATE_METADATA))

    def _prefix(self, model: nn.Module) -> str:
        paths = (path for path, module in model.named_modules() if module is self.adapter.model)
        path = next(paths, "")
        return f"{path}." if path else ""

    def _about(self, step: int) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "step": step,
            "method": type(adapter.config).__name__,
            "settings": json.loads(json.dumps(asdict(adapter.config))),
            "base": adapter.base_fingerprint or fingerprint(adapter.model, frozenset(adapter.saved)),
        }

    def _own(self) -> dict[str, Tensor]:
        """Return parameters and buffers of the adapter by their keys in the model, each of them once."""
        wanted = {id(p) for p in self.adapter.parameters()}
        wanted |= {id(b) for m in self.adapter.modules.values() for b in m.own_buffers().values()}
        wanted |= {id(b) for m in self.adapter.saved.values() for b in m.trained.buffers()}
        found: dict[str, Tensor] = {}
        for key, tensor in self.adapter.model.state_dict(keep_vars=True).items():
            if id(tensor) in wanted:
                wanted.remove(id(tensor))
                found[key] = tensor
        return found

    def _acts(self) -> bool:
        """Return whether the adapter stands in its model, which may have had others since."""
        found = adapters_of(self.adapter.model)
        return found is not None and found.current is self.adapter

    def _compare(self, module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
        """Refuse a state of another adapter or base, and take AdaLoRA's step from it.

        Raises:
            AdapterStateError: names what differs.
        """
        if (stored := state.get(prefix + RECORD_ENTRY)) is None or not self._acts():
            return
        own = self._own()
        held = {k.removeprefix(prefix): t.shape for k, t in state.items() if k.startswith(prefix)}
        held.pop(RECORD_ENTRY)
        shapes = {key: tensor.shape for key, tensor in own.items()}
        wrong = {k for k in held.keys() | shapes.keys() if held.get(k) != shapes.get(k)}
        before = json.loads(bytes(stored.tolist()))
        _require_same(before, self._about(before["step"]))
        if wrong:
            raise AdapterStateError(
                f"the checkpoint is of another adapter: {join_limited(sorted(wrong))}",
                code="other_adapter",
                field=min(wrong),
            )
        self.step = before["step"]
        if self.adapter.budget is not None:
            self.adapter.budget.done.fill_(before["step"])

    def _forget_base(self, module: nn.Module, keys: Any) -> None:
        """Report none of the base's keys as missing from a state that is the adapter's alone."""
        for mark in [key for key in keys.unexpected_keys if key.endswith(RECORD_ENTRY)]:
            prefix = mark.removesuffix(RECORD_ENTRY)
            keys.unexpected_keys.remove(mark)
            keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(prefix)]


def _require_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    settings = {**before["settings"], "method": before["method"]}
    here = {**now["settings"], "method": now["method"]}
    names = sorted(settings.keys() | here.keys())
    if changed := [name for name in names if settings.get(name) != here.get(name)]:
        changes = [f"{n} was {settings.get(n)!r}, now {here.get(n)!r}" for n in changed]
        raise AdapterStateError(
            f"the checkpoint is of an adapter with other settings: {join_limited(changes)}",
            code="other_settings",
            field=changed[0],
        )
    if before["base"] != now["base"]:
        raise AdapterStateError(
            f"the checkpoint is of an adapter on another base: its fingerprint was "
            f"{before['base']}, here it is {now['base']}",
            code="other_base",
            field="model",
        )
