"""Packed passes as CUDA graphs: all kernels of a pass, forward and backward, are launched at once.

A pass of a small model is some thousand kernels of a few microseconds each; to launch them one by
one takes longer than they do. A graph computes passes of one shape, so sizes are rounded up. The
first pass of a shape is computed kernel by kernel. The second is recorded, compared with the same
pass computed so, and timed beside it: where the graph is right and quicker, it is replayed from
then on. Axes: N tokens, M tokens with a loss, R rows, P trained tensors.
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loralab.adapters.checkpoints import KeepGradients
from loralab.tasks.batches import pack
from loralab.tasks.examples import IGNORED, Example
from loralab.training.fast.attention import FlashRows
from loralab.training.fast.lane_loss import with_gradient
from loralab.training.fast.packed import rounded_up

SIZES = 4  # between powers of two: at most a quarter of padding
MIN_LONGEST = 128  # tokens of a row: the kernel computes about as many at once anyway
MAX_GRAPHS = 32  # each takes some megabytes of the device; passes of other shapes stay as they are
Result = tuple[Tensor, Sequence[Tensor | None]]  # a loss (), and its gradient by each trained tensor
LossOf = Callable[["StaticRows"], Tensor]
Compare = Callable[[Result, Result], str]  # expected, found -> how they differ; empty if they do not


class Shape(NamedTuple):
    """Sizes of a pass, rounded up."""

    tokens: int
    predicted: int
    rows: int
    longest: int


class StaticRows(NamedTuple):
    """A packed pass whose tensors stay where they are: others of its shape are copied into them."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N)
    predicting: Tensor  # (M,), places of the tokens that predict a label
    targets: Tensor  # (M,), the labels
    starts: Tensor  # (R + 1,) in int32
    longest: int

    @property
    def packing(self) -> FlashRows:
        """Return what attention needs to know of the rows."""
        return FlashRows(self.starts, self.longest, causal=True)

    def take(self, other: "StaticRows") -> None:
        """Copy another pass of the same shape in."""
        for own, new in zip(self[:5], other[:5], strict=True):
            own.copy_(new, non_blocking=True)

    def on(self, device: torch.device) -> "StaticRows":
        """Return a copy on a device."""
        ids, places, predicting, targets, starts = (tensor.to(device, copy=True) for tensor in self[:5])
        return StaticRows(ids, places, predicting, targets, starts, self.longest)


class Recorder(Protocol):
    """Records what a function launches, and times it."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a function that launches again what `run` does."""

    def seconds(self, run: Callable[[], None]) -> float:
        """Return how long it takes until all that is launched is done."""


class CudaRecorder:
    """Records CUDA graphs that share their memory: they are replayed one at a time.

    All are kept as long as the recorder. Once its graphs are gone a pool takes no more, and a graph
    that goes takes the cuBLAS workspace of its stream from those that stay (pytorch issue 193402).
    """

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._kept: list[torch.cuda.CUDAGraph] = []

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the kernels of a function, those of its autograd thread included."""
        graph = torch.cuda.CUDAGraph()
        self._kept.append(graph)
        back = torch.cuda.stream(torch.cuda.current_stream())  # a recording that fails stays on its own stream
        with back, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    def seconds(self, run: Callable[[], None]) -> float:
        """Time a function with the device idle before and after."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started


class PassGraphs:
    """The passes of a model as graphs, by shape.

    Attributes:
        refused: why there are no graphs any more; empty while there may be.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        compare: Compare,
        pad_id: int,
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        self._model, self._loss_of, self._compare, self._pad_id = model, loss_of, compare, pad_id
        self._new_recorder = recorder
        self._graphs: dict[Shape, _Graph] = {}
        self._seen: set[Shape] = set()
        self._slower: set[Shape] = set()
        self._made_with: tuple[Any, ...] | None = None
        self.refused = ""

    def loss(self, examples: Sequence[Example]) -> Tensor | None:
        """Return the summed loss of some examples, (); None where no graph computes it."""
        if self._made_with != (now := _state(self._model)):
            self._begin(now)
        shape = shape_of(examples)
        if shape not in self._graphs and not self._record(shape, examples):
            return None
        graph = self._graphs[shape]
        graph.rows.take(static_rows(examples, shape, self._pad_id))
        graph.replay()
        return with_gradient(*self._result(graph.own), self._trained)

    def _begin(self, now: tuple[Any, ...]) -> None:
        """Drop the graphs of a model whose tensors, mode or hooks are no longer those that were recorded."""
        self._drop()
        self._made_with = now
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._device = self._trained[0].device
        self._loss = torch.zeros((), device=self._device)
        self._gradient = [torch.zeros_like(p) for p in self._trained]

    def _drop(self) -> None:
        self._graphs.clear()
        self._slower.clear()
        self._recorder = self._new_recorder()

    def _record(self, shape: Shape, examples: Sequence[Example]) -> bool:
        """Record the second pass of a shape; return whether there is a graph of it now."""
        full = len(self._graphs) + len(self._slower) >= MAX_GRAPHS
        if self.refused or full or shape in self._slower or any(map(_is_watched, self._model.modules())):
            return False
        if shape not in self._seen:
            self._seen.add(shape)
            return False
        try:
            graph, gain = self._recorded(static_rows(examples, shape, self._pad_id).on(self._device))
        except Exception as error:  # an operation that waits for the device, or memory
            self.refused = f"{type(error).__name__}: {error}"
        if self.refused:
            self._drop()
            return False
        if gain * sum(len(example.input_ids) for example in examples) <= shape.tokens:  # no gain without the padding
            self._slower.add(shape)
            return False
        self._graphs[shape] = graph
        return True

    def _recorded(self, rows: StaticRows) -> tuple["_Graph", float]:
        """Return a pass as a graph, and how many times as quick it is; `refused` says if it is another pass."""
        own: list[bool] = []

        def run() -> None:
            own[:] = self._run(rows)

        run()  # kernels are chosen and memory is taken when a shape is new
        eager = self._recorder.seconds(run)
        expected = self._result(own)
        graph = _Graph(rows, self._recorder.record(run), tuple(own))
        for held in (self._loss, *self._gradient):
            held.fill_(math.nan)  # else what the replay leaves out would be found as the pass has left it
        gain = eager / self._recorder.seconds(graph.replay)
        self.refused = self._compare(expected, self._result(own))
        return graph, gain

    def _run(self, rows: StaticRows) -> list[bool]:
        """Put loss and gradient where graphs leave them; return which tensors have a gradient."""
        loss = self._loss_of(rows)
        found = torch.autograd.grad(loss, self._trained, allow_unused=True)
        self._loss.copy_(loss.detach())
        pairs = [(held, g) for held, g in zip(self._gradient, found, strict=True) if g is not None]
        torch._foreach_copy_([held for held, _ in pairs], [g for _, g in pairs])
        return [gradient is not None for gradient in found]

    def _result(self, own: Sequence[bool]) -> Result:
        """Return copies of the loss and gradient that were left: the next replay overwrites them."""
        copies = iter(torch._foreach_mul([g for g, is_own in zip(self._gradient, own, strict=True) if is_own], 1.0))
        return self._loss.clone(), [next(copies) if is_own else None for is_own in own]


class _Graph(NamedTuple):
    rows: StaticRows
    replay: Callable[[], None]
    own: tuple[bool, ...]  # which trained tensors have a gradient, (P)


def shape_of(examples: Sequence[Example]) -> Shape:
    """Return the shape of the graph that computes a pass."""
    lengths = [len(example.input_ids) for example in examples]
    predicted = sum(label != IGNORED for example in examples for label in example.labels[1:])
    tokens = rounded_up(sum(lengths), SIZES)
    longest = max(*lengths, tokens - sum(lengths), MIN_LONGEST)  # what fills up is a row, too
    return Shape(tokens, rounded_up(predicted, SIZES // 2), _power(len(lengths) + 1), _power(longest))


def static_rows(examples: Sequence[Example], shape: Shape, pad_id: int) -> StaticRows:
    """Return examples as a pass of a shape, on the processor; rows, tokens and targets are filled up without a loss."""
    lengths = [len(example.input_ids) for example in examples]
    batch = pack(examples, size=shape.tokens, pad_id=pad_id)
    here = (batch["targets"] != IGNORED).nonzero()[:, 0]
    targets = torch.full((shape.predicted,), IGNORED)
    targets[: len(here)] = batch["targets"][here]
    predicting = torch.zeros(shape.predicted, dtype=torch.long)
    predicting[: len(here)] = here
    ends = [*accumulate(lengths), *[shape.tokens] * (shape.rows - len(lengths))]  # the rest are empty
    starts = torch.tensor([0, *ends], dtype=torch.int32)
    return StaticRows(batch["input_ids"], batch["position_ids"], predicting, targets, starts, shape.longest)


def _power(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Return what a graph was made with: where tensors are, which are trained, and in which mode modules are."""
    tensors = ((tensor.data_ptr(), tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers()))
    return *tensors, *((module.training, _is_watched(module)) for module in model.modules())


def _is_watched(module: Any) -> bool:
    """Return whether somebody's code runs in every pass, or the module is computed again in the backward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    others = any(not isinstance(hook, KeepGradients) for own in hooks for hook in own.values())
    return others or getattr(module, "gradient_checkpointing", False)
