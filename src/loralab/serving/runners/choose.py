"""Choose how the steps of a causal model are computed: the fastest runner with the model's own results.

Compiled (native.py), packed (packed.py), or request by request (sequential.py). Each is tried on a
few rows of noise at the start, in pieces as a server meets them, and compared with the model's own
forward pass.
"""

import math
import time
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.grouped import Bank, spans_of
from loralab.lanes import ThreadChoice
from loralab.serving.blocks import BlockManager, blocks_needed
from loralab.serving.kv_cache import ForwardBatch, KVCache
from loralab.serving.runners.native import NativeRunner, unsupported_reason
from loralab.serving.runners.packed import PackedRunner
from loralab.serving.runners.sequential import SequentialRunner
from loralab.serving.scheduler import Chunk, TokenSequence

MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.03}
AGREEING_SHARE = 0.75  # of the tokens must agree where few bits are kept
PROBE_LENGTHS = (21, 1, 6, 34)  # tokens of the rows that are compared
PROBE_CHUNK = 13  # tokens of them that go through at once
PROMPT_CHUNKS = (32, 128, 512)  # tokens of a prompt at which the two quick ways are timed
CLEARLY_QUICKER = 0.9  # of the time: what is as quick one time and not the next, is left to the compiled way
DEEP_CHUNK = (1920, 2048)  # tokens of a long one at which they are timed, too: most of that is attention


class ModelRunner:
    """Computes the logits of chunks with a causal model and adapters.

    Attributes:
        names: the ways that are used, the quickest first.
        refused: those that are not, and why.
        packed_from: the tokens of a chunk from which on the packed way is quicker than the compiled one: torch's
            products of many rows use the processor's matrix units. Infinite where it never is.
        packed_beyond: the place in a prompt from which on that is so of chunks as long as DEEP_CHUNK.
        copy: copies the first places of a block, so that a request begins with what another one left; None where
            it cannot.
    """

    def __init__(self, model: Any, blocks: int) -> None:
        self.refused: dict[str, str] = {}
        pool, bank = KVCache(model, blocks), Bank(model)
        self._native: NativeRunner | None = None
        self._threads = ThreadChoice()
        self._fallback: PackedRunner | SequentialRunner = SequentialRunner(model, bank)
        self._compiled: dict[Hashable, Any] = {}
        self._in_both: set[Hashable] = set()  # compiled ones that a long prompt took to the packed way
        self.packed_from = self.packed_beyond = math.inf
        self._prefix_keys: set[Hashable] = set()
        packed = PackedRunner(model, pool, bank)
        if problem := _difference(model, packed.logits, pool):
            self.refused["packed"] = problem
        else:
            self._fallback = packed
            self.refused["compiled"] = self._compile(model, pool, packed)
        self.refused = {name: reason for name, reason in self.refused.items() if reason}
        self.copy = pool.copy if isinstance(self._fallback, PackedRunner) else None
        self.names = [*(["compiled"] if self._native else []), "packed" if self.copy else "one by one"]

    def prepare(self, key: Hashable, loaded: Any) -> None:
        """Prepare an adapter for the native step; may run beside a step."""
        new = self._native is not None and loaded.prefix_kv is None and key not in self._compiled
        if new and self._native is not None and self._native.put(key, loaded.adapter):
            self._compiled[key] = loaded.adapter

    def put(self, key: Hashable, loaded: Any) -> None:
        """Take an adapter in.

        Raises:
            AdapterStateError: it cannot share a batch.
        """
        self.prepare(key, loaded)
        if loaded.prefix_kv is not None:
            self._prefix_keys.add(key)  # all that it does is in the cache
        elif key not in self._compiled:
            self._fallback.put(key, loaded.adapter)

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter."""
        self._prefix_keys.discard(key)
        is_compiled = self._compiled.pop(key, None) is not None
        if is_compiled and self._native is not None:
            self._native.drop(key)
        if not is_compiled or key in self._in_both:
            self._in_both.discard(key)
            self._fallback.drop(key)

    def load_prefix(self, chunk: Chunk, prefix_kv: Tensor) -> Chunk | None:
        """Put the prefix's part of a chunk into the cache; return the rest of it, if any."""
        sequence, stop = chunk.sequence, min(chunk.stop, prefix_kv.shape[3])
        if chunk.start < stop:
            places = range(chunk.start, stop)
            self._fallback.write(sequence.number, sequence.blocks, places, prefix_kv)
        return Chunk(sequence, max(chunk.start, stop), chunk.stop) if chunk.stop > stop else None

    def forget(self, sequence: TokenSequence) -> None:
        """End a request."""
        if isinstance(self._fallback, SequentialRunner):
            self._fallback.forget(sequence.number)

    def logits(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Return the logits at the requested positions of each chunk, (m, V) in fp32 each."""
        found: dict[int, Tensor] = {}
        quick = [chunk for chunk in chunks if self._is_compiled(chunk)]
        rest = [chunk for chunk in chunks if not self._is_compiled(chunk)]
        for key in {chunk.sequence.key for chunk in rest} & (self._compiled.keys() - self._in_both):
            self._fallback.put(key, self._compiled[key])
            self._in_both.add(key)
        for runner, own in ((self._native, quick), (self._fallback, rest)):
            if own and runner is not None:
                out = self._logits(runner, batch_of(own))
                parts = out.split([len(chunk.logit_positions) for chunk in own])
                found |= {id(chunk): part for chunk, part in zip(own, parts, strict=True)}
        return [found[id(chunk)] for chunk in chunks]

    def _logits(self, runner: NativeRunner | PackedRunner | SequentialRunner, batch: ForwardBatch) -> Tensor:
        if not isinstance(runner, NativeRunner):
            return runner.logits(batch)  # torch may round otherwise with another number of threads
        return self._threads.run(lambda: runner.logits(batch), len(batch.ids))

    def _is_compiled(self, chunk: Chunk) -> bool:
        """Tell whether a chunk goes through the compiled step."""
        key, size = chunk.sequence.key, chunk.stop - chunk.start
        able = key is None or key in self._prefix_keys or key in self._compiled
        deep = size >= DEEP_CHUNK[1] - DEEP_CHUNK[0] and chunk.stop >= self.packed_beyond
        return self._native is not None and able and size < self.packed_from and not deep

    def _compile(self, model: Any, pool: KVCache, packed: PackedRunner) -> str:
        if reason := unsupported_reason(model):
            return reason
        native = NativeRunner(model, pool)
        problem = _difference(model, native.logits, pool)
        if not problem:
            self._native = native
            slower = (count for count in PROMPT_CHUNKS if _is_slower(native, packed, pool, 0, count))
            self.packed_from = next(slower, math.inf)
            if self.packed_from > DEEP_CHUNK[1] - DEEP_CHUNK[0] and _is_slower(native, packed, pool, *DEEP_CHUNK):
                self.packed_beyond = DEEP_CHUNK[1]
        return problem


def _is_slower(native: NativeRunner, packed: PackedRunner, pool: KVCache, start: int, stop: int) -> bool:
    """Return whether some tokens of a prompt go through the packed way quicker; False if the cache is too small."""
    blocks = BlockManager(pool.keys.shape[1]).allocate(blocks_needed(stop))
    if blocks is None:  # it meets no such prompt
        return False
    chunk = Chunk(TokenSequence(number=0, key=None, tokens=[0] * stop, blocks=blocks), start, stop)
    return _seconds(packed, batch_of([chunk])) < CLEARLY_QUICKER * _seconds(native, batch_of([chunk]))


def _seconds(runner: NativeRunner | PackedRunner, batch: ForwardBatch) -> float:
    """Return the lesser time of two passes."""
    taken = []
    for _ in range(2):
        started = time.perf_counter()
        runner.logits(batch)
        taken.append(time.perf_counter() - started)
    return min(taken)


def batch_of(chunks: Sequence[Chunk]) -> ForwardBatch:
    """Build the input of a forward pass from some chunks."""
    ids: list[int] = []
    places: list[int] = []
    rows, keys, logit_positions = [], [], []
    for number, chunk in enumerate(chunks):
        logit_positions += [len(ids) + token - chunk.start for token in chunk.logit_positions]
        ids += chunk.sequence.tokens[chunk.start : chunk.stop]
        places += range(chunk.start, chunk.stop)
        rows += [number] * (chunk.stop - chunk.start)
        keys += [chunk.sequence.key] * (chunk.stop - chunk.start)
    return ForwardBatch(
        requests=[chunk.sequence.number for chunk in chunks],
        ids=ids,
        places=places,
        rows=rows,
        tables=[chunk.sequence.blocks for chunk in chunks],
        spans=spans_of(keys),
        logit_positions=logit_positions,
    )


@torch.no_grad()
def _difference(model: Any, logits: Any, pool: KVCache) -> str:
    """Describe how a runner differs from the model by more than rounding; empty if it does not."""
    draw = torch.Generator().manual_seed(0)
    words = min(model.config.get_text_config().vocab_size, 1000)
    blocks, sequences = BlockManager(pool.keys.shape[1]), []
    for number, length in enumerate(PROBE_LENGTHS):
        tokens = torch.randint(words, (length,), generator=draw).tolist()
        allocated = blocks.allocate(blocks_needed(length))
        assert allocated is not None  # a cache holds at least as much
        sequences.append(TokenSequence(number=number, key=None, tokens=tokens, blocks=allocated, scored=1))
    found: list[list[Tensor]] = [[] for _ in sequences]
    try:
        while chunks := [Chunk(r, r.done, min(r.done + PROBE_CHUNK, len(r.tokens))) for r in sequences if r.left]:
            parts = logits(batch_of(chunks)).split([len(chunk.logit_positions) for chunk in chunks])
            for chunk, part in zip(chunks, parts, strict=True):
                found[chunk.sequence.number].append(part)
                chunk.sequence.done = chunk.stop
    except Exception as error:  # a structure that this way does not know
        return f"{type(error).__name__}: {error}"
    return _compared(model, sequences, [torch.cat(parts) for parts in found])


def _compared(model: Any, sequences: Sequence[TokenSequence], found: Sequence[Tensor]) -> str:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    offs: list[Tensor] = []
    for sequence, own in zip(sequences, found, strict=True):
        ids = torch.tensor([sequence.tokens], device=device)
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        offs.append((own.to(device) - expected).norm(dim=-1) / expected.norm(dim=-1))
    # some tokens are so sensitive that any other rounding moves them, the model's own too
    share = 1.0 if dtype == torch.float32 else AGREEING_SHARE
    typical = float(torch.cat(offs).quantile(share))
    return "" if typical <= MAX_DIFFERENCE[dtype] else f"its logits differ by {typical:.2g} of their length"
