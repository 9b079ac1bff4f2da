"""Checkpoints: everything that a run needs to end in the same bytes as if never interrupted.

    checkpoints/step-000040/state.safetensors   adapter, optimiser and random-number state
    checkpoints/step-000040/progress.json       steps done, best score so far, loss scaler

A checkpoint appears whole or not at all. The order of the rows is a pure function of the step
(see tasks/batches.py), and so is the learning rate: the step is all that they need.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loralab import atomic
from loralab.adapters.adapter import Adapter
from loralab.adapters.folder import read_tensors
from loralab.errors import AdapterFileError, LoralabError
from loralab.training.world import World
from loralab.values import check_count, read_json

FOLDER, STATE, PROGRESS = "checkpoints", "state.safetensors", "progress.json"
STEP = re.compile(r"step-(\d{6,18})")
NEEDED, MOST_STEPS = {"step", "exp_avg", "exp_avg_sq"}, 1 << 24
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # one number a weight


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
    others = world.all_gather(_own_random())[1:]
    if world.is_main and not path.exists():
        with atomic.new_folder(path) as folder:
            # 8-bit optimisers share a table between parameters, which the format refuses
            tensors = {name: t.cpu().contiguous().clone() for name, t in _state(trained).items()}
            for rank, own in enumerate(others, 1):
                tensors |= {f"random.{name}.{rank}": state for name, state in own.items()}
            safetensors.torch.save_file(tensors, folder / STATE)
            text = json.dumps(asdict(progress), indent=2)
            (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")
    world.barrier()
    return path


def remove_others(run: Path, steps: Collection[int | None]) -> None:
    """Remove the checkpoints of all other steps, and what an interrupted write has left."""
    for path in (run / FOLDER).glob("step-*"):
        number = STEP.fullmatch(path.name.removesuffix(atomic.PARTIAL))
        if number and (path.name.endswith(atomic.PARTIAL) or int(number[1]) not in steps):
            atomic.remove_folder(path)


def steps_of(run: Path) -> list[int]:
    """Return the steps of which there is a checkpoint, in order."""
    found = (STEP.fullmatch(path.name) for path in (run / FOLDER).glob("step-*"))
    return sorted(int(name[1]) for name in found if name)


def last_common_steps(runs: Mapping[Path, int]) -> dict[Path, Path | None]:
    """Return the step where several runs that make their steps together go on together; None: from the start.

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
    """Return the checkpoint with the most steps; None if there is none."""
    steps = steps_of(run)
    return at_step(run, steps[-1]) if steps else None


def at_step(run: Path, step: int) -> Path:
    """Return the place of the checkpoint of one step."""
    return run / FOLDER / f"step-{step:06d}"


def restore(path: Path, trained: Trained, world: World) -> Progress:
    """Fill the live objects and torch's random-number state; return where the run stood.

    The checkpoint may be of another number of processes.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    progress = read_progress(path)
    with _damage(path):
        tensors = read_tensors(path / STATE)
        trained.adapter.load_state(_part(tensors, "adapter."))
        state = _optimizer_state(tensors, trained)
        groups = trained.optimizer.state_dict()["param_groups"]
        trained.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if progress.scaler:
            trained.scaler.load_state_dict(progress.scaler)
        for index, random in _part(tensors, "random.cuda.").items():
            if int(index) < torch.cuda.device_count():  # there may have been more of them
                torch.cuda.set_rng_state(random, int(index))
        torch.set_rng_state(tensors["random.cpu"])
        if not world.is_main:
            _set_own_random(tensors, world.rank)
    return progress


def _own_random() -> dict[str, Tensor]:
    """Return the random numbers of this process; those on a GPU are of the one it computes on."""
    found = {"cpu": torch.get_rng_state()}
    return found | ({"gpu": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_own_random(tensors: Mapping[str, Tensor], rank: int) -> None:
    """Restore the random numbers of a process, or draw new ones if the checkpoint knows no such process."""
    own, on_gpu = (tensors.get(f"random.{name}.{rank}") for name in ("cpu", "gpu"))
    if own is None:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
        return
    torch.set_rng_state(own)
    if on_gpu is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(on_gpu)


def restore_weights(path: Path, adapter: Adapter) -> None:
    """Fill the adapter alone.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    with _damage(path):
        adapter.load_state(_part(read_tensors(path / STATE), "adapter."))


def read_progress(path: Path) -> Progress:
    """Return where the run stood at a checkpoint.

    Raises:
        AdapterFileError: the checkpoint is damaged.
    """
    with _damage(path):
        found = Progress(**read_json(path / PROGRESS, AdapterFileError))
        for name in ("step", "tokens", "worse_in_a_row"):
            check_count(name, getattr(found, name), least=0)
        if found.best_step is not None:
            check_count("best_step", found.best_step, least=0)
        if not isinstance(found.best_metrics, dict) or not isinstance(found.scaler, dict):
            raise TypeError("best_metrics and scaler must be objects")
        if strange := [n for n, v in found.best_metrics.items() if type(v) not in (int, float)]:
            raise TypeError(f"best_metrics: {strange[0]!r} is not a number")
    return found


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what torch and loralab raise on a state that does not fit into one error with the remedy."""
    try:
        yield
    except (LoralabError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise AdapterFileError(
            f"{path} is damaged ({reason}); delete it to go on before it", code="damaged", field="path"
        ) from None


def _optimizer_state(tensors: Mapping[str, Tensor], trained: Trained) -> dict[int, dict[str, Any]]:
    """Read the optimiser's state that `_state` wrote, by the number of the parameter.

    Raises:
        ValueError: a tensor is of no parameter, or has another shape than its own.
    """
    state: dict[int, dict[str, Any]] = {}
    shapes = [p.shape for group in trained.optimizer.param_groups for p in group["params"]]
    found: dict[str, Any] = dict(_part(tensors, "optimizer."))
    found |= {name: tensor.item() for name, tensor in _part(tensors, "number.").items()}
    for name, value in found.items():
        index, key = name.split(".", 1)
        if not 0 <= int(index) < len(shapes):
            raise ValueError(f"optimizer.{name} is of no parameter")
        if key in MOMENTS and value.shape != shapes[int(index)]:
            raise ValueError(f"optimizer.{name} has the shape {tuple(value.shape)}")
        outer, _, inner = key.partition("/")
        own = state.setdefault(int(index), {})
        (own.setdefault(outer, {}) if inner else own)[inner or key] = value
    _require_moments(state, trained.optimizer)
    return state


def _require_moments(state: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state without which the next step would fail, or make no number."""
    needed = NEEDED if isinstance(optimizer, torch.optim.AdamW) else set()
    for index, own in state.items():
        if lost := sorted(needed - own.keys()):
            raise ValueError(f"optimizer.{index} lacks {lost[0]}")
        numbers = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        if wrong := [key for key, value in numbers.items() if not value.isfinite().all()]:
            raise ValueError(f"optimizer.{index}.{wrong[0]} is not finite")
        step = own.get("step", 0)
        if torch.as_tensor(step).numel() != 1 or not 0 <= float(step) <= MOST_STEPS:
            raise ValueError(f"optimizer.{index}.step is not the number of a step")


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
    """Flatten {"a": {"b": 1}} -> {"a/b": 1}: 8-bit optimisers keep a table in the table."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": deeper for inner, deeper in value.items()}
        else:
            found[key] = value
    return found


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _has_ended(progress: Progress, steps: int) -> bool:
    return progress.step >= steps or progress.stopped_early
