"""Several processes that train one adapter, as torchrun or `accelerate launch` start them.

Each has a copy of the adapter and makes its share of the passes of every step; before the step is
applied the gradients of all are summed. So a step has the numbers that it would have in a single
process, but for the order of its sums. An adapter's gradients are small: they are summed in one
message. Source: Li et al. 2020, arXiv:2006.15704.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from loralab.errors import ConfigError

T = TypeVar("T")
# how many processes there are, as torchrun says it and several MPIs do
SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
UNSUPPORTED_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism",
}


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`; the first of them writes what is written."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, parts: Sequence[T], rank: int) -> list[T]:
        """Return the parts of one process."""
        return list(parts[rank :: self.size])

    def all_reduce(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.size == 1:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64, device=_device())
        distributed.all_reduce(own)
        return own.tolist()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes; what has none in any of them keeps none."""
        if self.size == 1:
            return
        present = self.all_reduce(*(float(p.grad is not None) for p in parameters))
        chosen = [p for p, count in zip(parameters, present, strict=True) if count]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        _in_one_message([p.grad for p in chosen if p.grad is not None], distributed.all_reduce)

    @torch.no_grad()
    def broadcast_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Broadcast parameters from rank 0."""
        if self.size > 1:
            _in_one_message([p.data for p in parameters], functools.partial(distributed.broadcast, src=0))

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0, in every process."""
        if self.size == 1:
            return value
        values: list[T] = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in every process."""
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        distributed.all_gather_object(found, value)
        return [own for own in found if own is not None]

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            distributed.barrier()


@functools.cache
def world() -> World:
    """Return this process among those that were started with it; the first call joins them.

    Raises:
        ConfigError: they were started with settings of accelerate's that have no meaning here.
    """
    if not any(os.environ.get(name, "1") != "1" for name in SIZE_VARIABLES):
        return World()
    if asked := [what for name, what in UNSUPPORTED_PLUGINS.items() if os.environ.get(name, "") == "true"]:
        raise ConfigError(
            f"accelerate was told to use {asked[0]}, which is not read here; leave it out, and say "
            "--shard-base where the base should be split",
            code="unsupported_plugin",
            field="accelerate",
        )
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return World(state.process_index, state.num_processes)


def _device() -> torch.device:
    """Return the device on which messages between processes are kept."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _in_one_message(tensors: Iterable[Tensor], send: Callable[[Tensor], object]) -> None:
    """Send tensors, those of a dtype as one, and fill in what came of it."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for own in by_dtype.values():
        message = torch.cat([t.flatten() for t in own]).to(_device())
        send(message)
        parts = message.split([t.numel() for t in own])
        for tensor, part in zip(own, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
