"""What a run must remember to end in the same bytes as if it had never been interrupted.

    checkpoints/step-000040/state.safetensors   adapter, optimiser and random-number state
    checkpoints/step-000040/progress.json       steps done, best score so far, loss scaler

A checkpoint appears whole or not at all. The order of the rows is a pure function of the step
(see tasks/batches.py), and so is the learning rate: the step is all that they need.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from loralab import atomic
from loralab.adapters.attach import Adapter
from loralab.errors import AdapterFileError
from loralab.training.world import World

FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. `best_metrics` are those of `best_step`, on the validation rows."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    worse_in_a_row: int = 0
    stopped_early: bool = False
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The live objects that a checkpoint keeps and fills."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def write(run: Path, trained: Trained, progress: Progress, world: World) -> Path:
    """Write a checkpoint beside those that there are; all processes take part."""
    progress = replace(progress, scaler=trained.scaler.state_dict())
    path = run / FOLDER / f"step-{progress.step:06d}"
    others = world.gathered(torch.get_rng_state())[1:]
    if world.first and not path.exists():
        with atomic.new_folder(path) as folder:
            # 8-bit optimisers share a table between parameters, which the format refuses
            tensors = {name: t.cpu().contiguous().clone() for name, t in _state(trained).items()}
            tensors |= {f"random.cpu.{rank}": own for rank, own in enumerate(others, 1)}
            safetensors.torch.save_file(tensors, folder / "state.safetensors")
            text = json.dumps(asdict(progress), indent=2)
            (folder / "progress.json").write_text(text + "\n", encoding="utf-8")
    world.wait()
    return path


def keep(run: Path, steps: Collection[int | None]) -> None:
    """Remove the checkpoints of all other steps, and what an interrupted write has left."""
    for path in (run / FOLDER).glob("step-*"):
        number = path.name.removeprefix("step-").removesuffix(atomic.PARTIAL)
        if path.name.endswith(atomic.PARTIAL) or int(number) not in steps:
            atomic.remove_folder(path)


def steps_of(run: Path) -> list[int]:
    """The steps of which there is a checkpoint, in order."""
    names = (path.name for path in (run / FOLDER).glob("step-*[0-9]"))
    return sorted(int(name.removeprefix("step-")) for name in names)


def side_by_side(runs: Mapping[Path, int]) -> dict[Path, Path | None]:
    """From where several runs that make their steps together go on together; None: from the start.

    It is the last step at which each of them has a checkpoint, or had ended by then. One that was
    killed between the checkpoints of two runs goes back to those before.

    Args:
        runs: their folders, and how many steps each has in all.
    """
    there = {run: steps_of(run) for run in runs}
    ended: dict[Path, int] = {}
    for run, steps in there.items():
        if steps and _has_ended(read_progress(at_step(run, steps[-1])), runs[run]):
            ended[run] = steps[-1]
    choices = sorted({step for steps in there.values() for step in steps}, reverse=True)
    for step in choices:
        if all(step in there[run] or ended.get(run, step + 1) <= step for run in runs):
            chosen = {run: step if step in there[run] else ended[run] for run in runs}
            return {run: at_step(run, own) for run, own in chosen.items()}
    return dict.fromkeys(runs)


def latest(run: Path) -> Path | None:
    """The checkpoint with the most steps; None if there is none."""
    return max((run / FOLDER).glob("step-*[0-9]"), default=None)


def at_step(run: Path, step: int) -> Path:
    """The place of the checkpoint of one step."""
    return run / FOLDER / f"step-{step:06d}"


def restore(path: Path, trained: Trained, world: World) -> Progress:
    """Fill the live objects and torch's random-number state; return where the run stood.

    The checkpoint may be of another number of processes.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    progress = read_progress(path)
    tensors = _read(path)
    trained.adapter.load_state(_part(tensors, "adapter."))
    state: dict[int, dict[str, Any]] = {}
    numbers = {name: tensor.item() for name, tensor in _part(tensors, "number.").items()}
    for name, value in {**_part(tensors, "optimizer."), **numbers}.items():
        index, key = name.split(".", 1)
        outer, _, inner = key.partition("/")
        own = state.setdefault(int(index), {})
        (own.setdefault(outer, {}) if inner else own)[inner or key] = value
    groups = trained.optimizer.state_dict()["param_groups"]
    trained.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if progress.scaler:
        trained.scaler.load_state_dict(progress.scaler)
    torch.set_rng_state(tensors["random.cpu"])
    if not world.first:
        _set_own_random(tensors, world.rank)
    for index, random in _part(tensors, "random.cuda.").items():
        torch.cuda.set_rng_state(random, int(index))
    return progress


def _set_own_random(tensors: Mapping[str, Tensor], rank: int) -> None:
    """The random numbers of a process, or new ones if the checkpoint knows no such process."""
    own = tensors.get(f"random.cpu.{rank}")
    if own is None:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
    else:
        torch.set_rng_state(own)


def restore_weights(path: Path, adapter: Adapter) -> None:
    """Fill the adapter alone."""
    adapter.load_state(_part(_read(path), "adapter."))


def read_progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    try:
        fields = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        return Progress(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}); delete it to go on before it"
        ) from None


def _state(trained: Trained) -> dict[str, Tensor]:
    tensors = {f"adapter.{name}": t for name, t in trained.adapter.state().items()}
    for index, values in trained.optimizer.state_dict()["state"].items():
        for key, value in _flat(values).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:  # 8-bit optimisers count their steps so
                tensors[f"number.{index}.{key}"] = torch.tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        for index, random in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{index}"] = random
    return tensors


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a/b": 1}: 8-bit optimisers keep a table in the table."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": deeper for inner, deeper in value.items()}
        else:
            found[key] = value
    return found


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}); delete it to go on before it"
        ) from None


def _has_ended(progress: Progress, steps: int) -> bool:
    return progress.step >= steps or progress.stopped_early
