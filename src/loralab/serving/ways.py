"""How the steps of a causal model are computed: the quickest way that gives what the model gives.

Compiled (compiled.py), packed (packed.py), or request by request (single.py). Each is tried on a
few rows of noise at the start, in pieces as a server meets them, and compared with the model's own
forward pass.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.adapters.grouped import Bank, spans_of
from loralab.serving.blocks import BlockManager, needed
from loralab.serving.compiled import NativeRunner, suits
from loralab.serving.packed import PackedRunner
from loralab.serving.passes import ForwardBatch, KVCache
from loralab.serving.scheduler import Row, Work
from loralab.serving.single import SequentialRunner

AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.03}
MOST = 0.75  # of the tokens must agree where few bits are kept
PROBE = (21, 1, 6, 34)  # tokens of the rows that are compared
PIECE = 13  # tokens of them that go through at once


class ModelRunner:
    """A causal model and adapters as a function of some work.

    Attributes:
        names: the ways that are used, the quickest first.
        refused: those that are not, and why.
        reuse: whether a request can begin with what another one left in the cache.
    """

    def __init__(self, model: Any, blocks: int) -> None:
        self.refused: dict[str, str] = {}
        pool, bank = KVCache(model, blocks), Bank(model)
        self._quick: NativeRunner | None = None
        self._rest: PackedRunner | SequentialRunner = SequentialRunner(model, bank)
        self._compiled: set[Hashable] = set()
        self._fronts: set[Hashable] = set()
        packed = PackedRunner(model, pool, bank)
        if problem := _difference(model, packed.logits, pool):
            self.refused["packed"] = problem
        else:
            self._rest = packed
            self.refused["compiled"] = self._compile(model, pool)
        self.refused = {name: reason for name, reason in self.refused.items() if reason}
        self.reuse = isinstance(self._rest, PackedRunner)
        self.names = [*(["compiled"] if self._quick else []), "packed" if self.reuse else "one by one"]

    def prepare(self, key: Hashable, loaded: Any) -> None:
        """Work out what an adapter amounts to; may run beside a step."""
        new = self._quick is not None and loaded.front is None and key not in self._compiled
        if new and self._quick is not None and self._quick.put(key, loaded.adapter):
            self._compiled.add(key)

    def put(self, key: Hashable, loaded: Any) -> None:
        """Take an adapter in.

        Raises:
            AdapterStateError: it cannot share a batch.
        """
        self.prepare(key, loaded)
        if loaded.front is not None:
            self._fronts.add(key)  # all that it does is in the cache
        elif key not in self._compiled:
            self._rest.put(key, loaded.adapter)

    def drop(self, key: Hashable) -> None:
        """Let go of an adapter."""
        self._fronts.discard(key)
        if key in self._compiled and self._quick is not None:
            self._compiled.discard(key)
            self._quick.drop(key)
        else:
            self._rest.drop(key)

    def begin(self, work: Work, front: Tensor) -> Work | None:
        """Put the prefix's part of some work into the cache; what is left of it, if anything."""
        row, stop = work.row, min(work.stop, front.shape[3])
        if work.start < stop:
            places = range(work.start, stop)
            self._rest.write(row.number, row.blocks, places, front)
        return Work(row, max(work.start, stop), work.stop) if work.stop > stop else None

    def forget(self, row: Row) -> None:
        """A request has ended."""
        if isinstance(self._rest, SequentialRunner):
            self._rest.forget(row.number)

    def logits(self, works: Sequence[Work]) -> list[Tensor]:
        """What the model says to the tokens that each work asks for, (asked, V) in fp32 each."""
        found: dict[int, Tensor] = {}
        quick = [work for work in works if self._takes(work.row.key)]
        rest = [work for work in works if not self._takes(work.row.key)]
        for way, own in ((self._quick, quick), (self._rest, rest)):
            if own and way is not None:
                out = way.logits(pass_of(own))
                parts = out.split([len(work.asked) for work in own])
                found |= {id(work): part for work, part in zip(own, parts, strict=True)}
        return [found[id(work)] for work in works]

    def _takes(self, key: Hashable) -> bool:
        plain = key is None or key in self._fronts
        return self._quick is not None and (plain or key in self._compiled)

    def _compile(self, model: Any, pool: KVCache) -> str:
        if reason := suits(model):
            return reason
        quick = NativeRunner(model, pool)
        problem = _difference(model, quick.logits, pool)
        if not problem:
            self._quick = quick
        return problem


def pass_of(works: Sequence[Work]) -> ForwardBatch:
    """Some work as the input of a model."""
    ids: list[int] = []
    places: list[int] = []
    rows, keys, asked = [], [], []
    for number, work in enumerate(works):
        asked += [len(ids) + token - work.start for token in work.asked]
        ids += work.row.tokens[work.start : work.stop]
        places += range(work.start, work.stop)
        rows += [number] * (work.stop - work.start)
        keys += [work.row.key] * (work.stop - work.start)
    return ForwardBatch(
        requests=[work.row.number for work in works],
        ids=ids,
        places=places,
        rows=rows,
        tables=[work.row.blocks for work in works],
        spans=spans_of(keys),
        asked=asked,
    )


@torch.no_grad()
def _difference(model: Any, logits: Any, pool: KVCache) -> str:
    """In what a way differs from the model by more than rounding; empty if it does not."""
    draw = torch.Generator().manual_seed(0)
    words = min(model.config.get_text_config().vocab_size, 1000)
    blocks, rows = BlockManager(pool.keys.shape[1]), []
    for number, length in enumerate(PROBE):
        tokens = torch.randint(words, (length,), generator=draw).tolist()
        room = blocks.take(needed(length))
        assert room is not None  # a cache holds at least as much
        rows.append(Row(number=number, key=None, tokens=tokens, blocks=room, scored=1))
    found: list[list[Tensor]] = [[] for _ in rows]
    try:
        while works := [Work(r, r.done, min(r.done + PIECE, len(r.tokens))) for r in rows if r.left]:
            parts = logits(pass_of(works)).split([len(work.asked) for work in works])
            for work, part in zip(works, parts, strict=True):
                found[work.row.number].append(part)
                work.row.done = work.stop
    except Exception as error:  # a structure that this way does not know
        return f"{type(error).__name__}: {error}"
    return _compared(model, rows, [torch.cat(parts) for parts in found])


def _compared(model: Any, rows: Sequence[Row], found: Sequence[Tensor]) -> str:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    device = next(model.parameters()).device
    offs: list[Tensor] = []
    for row, own in zip(rows, found, strict=True):
        ids = torch.tensor([row.tokens], device=device)
        expected = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        offs.append((own.to(device) - expected).norm(dim=-1) / expected.norm(dim=-1))
    # some tokens are so sensitive that any other rounding moves them, the model's own too
    share = 1.0 if dtype == torch.float32 else MOST
    typical = float(torch.cat(offs).quantile(share))
    return "" if typical <= AGREES[dtype] else f"its logits differ by {typical:.2g} of their length"
