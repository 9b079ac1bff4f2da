"""Losses of several jobs from one forward pass that shares the base's products.

Every job gets what it would get alone. Packed rows stand one after the other, those of each job
together; padded ones are padded to one width. What is drawn at random is drawn for each job out
of its own random numbers and in the shapes that it has alone.
Axes: N tokens, H hidden, B rows, L tokens of a padded row, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loralab.adapters.adapter import Adapter
from loralab.adapters.grouped import Bank, Span
from loralab.tasks.batches import pack, padded
from loralab.tasks.examples import IGNORED, Example
from loralab.tasks.forward import embed, second_of
from loralab.tasks.kinds.pairs import Sentences
from loralab.tasks.kinds.registry import kind_named
from loralab.training.fast.attention import Packing
from loralab.training.fast.forward_path import (
    ForwardPath,
    difference,
    gradient_of,
    noise,
    on_device,
    random_states,
    smallest_with_picture,
)
from loralab.training.fast.functions import token_losses
from loralab.training.fast.packed import packed_states, rounded_up
from loralab.training.fast.patches import attention_function, known_modules, patched
from loralab.training.loss import is_plain_head, summed_loss

MAX_PICTURES = 16  # that go through the model at once, unless one job has more
ATTENTION_NAME = "loralab-together"  # of the attention here in transformers' table


class JobRows(NamedTuple):
    """Rows of one job that go through the model together; `path` is the job's own.

    Without a key they go through the base alone.
    """

    key: Hashable
    path: ForwardPath
    examples: Sequence[Example]


class Joint:
    """One model through which the rows of several jobs go, each with its own adapter.

    Args:
        model: without an adapter; the adapters' models stand on its weights.
        path: that of any of the jobs: all go the same way.
        around: what is drawn for a job is drawn in this.
    """

    def __init__(
        self, model: Any, path: ForwardPath, around: Callable[[Hashable], AbstractContextManager[Any]]
    ) -> None:
        self.model, self.path, self.around = model.requires_grad_(False), path, around
        self.bank = Bank(model, around)
        self._quicker = known_modules(model) if path.mode != "plain" else []
        self._drops: dict[Hashable, bool] = {}
        self._masks: dict[Hashable, bool] = {}
        self._widths: tuple[int, ...] = ()  # of each span's rows, if it were alone
        self._own_dropouts()

    def put(self, key: Hashable, adapter: Adapter) -> None:
        """Take a job in.

        Raises:
            AdapterStateError: its adapter cannot share a batch.
        """
        self.bank.put(key, adapter)
        drops = (m.p for m in adapter.model.modules() if isinstance(m, nn.Dropout))
        self._drops[key], self._masks[key] = any(drops), _draws(adapter)

    def drop(self, key: Hashable) -> None:
        """Let a job go."""
        self.bank.drop(key)

    def problem(self, part: JobRows, adapter: Adapter) -> str:
        """Return in what a job's loss or gradient here differs from what it is alone; empty if it does
        not. The job has been put in; its rows are tried behind the same rows of the base."""
        path, model = part.path, adapter.model
        modes = model.training, self.model.training
        both = [part._replace(key=None), part]
        model.eval()
        self.model.eval()
        try:
            with path.activated():
                expected = gradient_of(path.loss(part.examples), adapter)
            with self.activated():
                found = gradient_of(self.losses(both)[0], adapter)
            model.train()
            self.model.train()
            before = random_states()
            with self.activated(), torch.no_grad():
                self.losses(both)
            if not all(map(torch.equal, before, random_states())):
                return "the model draws random numbers that are not those of one job"
        except Exception as error:  # a structure that has no rows
            return f"{type(error).__name__}: {error}"
        finally:
            model.train(modes[0])
            self.model.train(modes[1])
        problem = difference(model, expected, found)
        return problem and f"in a batch with others {problem}"

    def groups(self, parts: Sequence[JobRows], max_tokens: int) -> list[list[JobRows]]:
        """Return parts that go through the model at once, as many as fit."""
        if kind_named(self.path.kind).pictures:
            max_tokens = MAX_PICTURES
        pads = self.path.mode != "packed"
        if pads:
            parts = sorted(parts, key=_widths, reverse=True)
        groups: list[list[JobRows]] = []
        for part in parts:
            whole = [*groups[-1], part] if groups else []
            if whole and self._size(whole) <= max_tokens and not (pads and self._differ(whole)):
                groups[-1].append(part)
            else:
                groups.append([part])
        return groups

    def losses(self, parts: Sequence[JobRows]) -> list[Tensor]:
        """Return the summed cross-entropy of each part that is a job's, () in fp32; differentiable."""
        if self.path.mode == "packed":
            return self._packed_losses(parts)
        return self._padded_losses(parts)

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Patch the model as the jobs' mode needs it."""
        if self.path.mode == "plain":
            yield
            return
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, self._attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
        config = self.model.config
        ours = config._attn_implementation == "sdpa"
        with patched(self.model, self._quicker):
            if ours:
                config._attn_implementation = ATTENTION_NAME
            yield

    def _size(self, parts: Sequence[JobRows]) -> int:
        return self.path.size([example for part in parts for example in part.examples])

    def _differ(self, parts: Sequence[JobRows]) -> bool:
        """Return whether an adapter would draw its dropout in another shape than alone."""
        return any(self._masks[p.key] for p in parts) and len({_widths(p) for p in parts}) > 1

    def _packed_losses(self, parts: Sequence[JobRows]) -> list[Tensor]:
        """Return the losses as `ForwardPath` does alone: a part that drops at random is filled up in the same way."""
        batches, spans, lengths, start = [], [], [], 0
        for part in parts:
            own = [len(example.input_ids) for example in part.examples]
            size = rounded_up(sum(own)) if self._drops.get(part.key) else sum(own)
            batches.append(pack(part.examples, size=size, pad_id=self.path.pad_id))
            spans.append(Span(part.key, start, start + size))
            lengths += [*own, *[1] * (size - sum(own))]
            start += size
        size = rounded_up(start)
        if size > start:
            batches.append(pack((), size=size - start, pad_id=self.path.pad_id))
            spans.append(Span(None, start, size))
            lengths += [1] * (size - start)
        batch = {name: torch.cat([own[name] for own in batches], dim=-1) for name in batches[0]}
        batch = on_device(batch, self.model)
        packing = Packing(tuple(lengths), causal=True, device=batch["input_ids"].device)
        with self._routed(spans):
            states = packed_states(self.model, batch["input_ids"], batch["position_ids"], packing)
        return self._by_heads(parts, spans, states, batch["targets"])

    def _by_heads(
        self, parts: Sequence[JobRows], spans: Sequence[Span], states: Tensor, targets: Tensor
    ) -> list[Tensor]:
        """Return the loss of each part by its job's own head; heads that are the base's run at once."""
        has_loss = targets != IGNORED
        jobs = [
            (part, has_loss[span.start : span.stop].nonzero()[:, 0] + span.start)
            for part, span in zip(parts, spans, strict=False)  # the filling is nobody's
            if part.key is not None
        ]
        heads = [part.path.model.get_output_embeddings() for part, _ in jobs]
        plain = [number for number, head in enumerate(heads) if is_plain_head(head)]
        found: dict[int, Tensor] = {}
        if plain:
            heres = [jobs[number][1] for number in plain]
            losses = _by_frozen_head(heads[plain[0]], states, targets, heres)
            found = dict(zip(plain, losses, strict=True))
        for number, ((part, here), head) in enumerate(zip(jobs, heads, strict=True)):
            if number not in found:
                with self.around(part.key):
                    found[number] = summed_loss(head, states[here], targets[here])
        return [found[number] for number in range(len(jobs))]

    def _padded_losses(self, parts: Sequence[JobRows]) -> list[Tensor]:
        examples = [example for part in parts for example in part.examples]
        width = max(width for part in parts for width in _widths(part))
        batch, spans, start = replace(self.path, longest=width).batch(examples), [], 0
        for part in parts:
            spans.append(Span(part.key, start, start + len(part.examples)))
            start += len(part.examples)
        kind = kind_named(self.path.kind)
        rows = [slice(span.start, span.stop) for span in spans if span.key is not None]
        if isinstance(kind, Sentences):
            first, second = self._embedded(parts, spans, batch)
            return [kind.pair_losses(first[own], second[own], batch["labels"][own]).sum() for own in rows]
        with self._routed(spans, parts):
            outputs, labels, of_row = kind.labelled(self.model, batch)
        classes = [p.path.model.config.num_labels for p in parts if p.key is not None]
        losses = []
        for own, count in zip(rows, classes, strict=True):
            here = (own.start <= of_row) & (of_row < own.stop)
            losses.append(kind.summed(*kind.of_job(outputs[here], labels[here], count)))
        return losses

    def _embedded(
        self, parts: Sequence[JobRows], spans: Sequence[Span], batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors of pairs of texts, each read on its own, (B, H) and (B, H)."""
        with self._routed(spans, parts):
            first = embed(self.model, batch)
        with self._routed(spans, parts, second=True):
            return first, embed(self.model, second_of(batch))

    @contextlib.contextmanager
    def _routed(self, spans: Sequence[Span], parts: Sequence[JobRows] = (), *, second: bool = False) -> Iterator[None]:
        self._widths = tuple(_widths(part)[second] for part in parts)
        with self.bank.routed(spans):
            yield

    def _own_dropouts(self) -> None:
        """Let the model's own dropout be drawn job by job."""
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if type(child) is nn.Dropout and child.p:
                    setattr(parent, name, _Dropout(child.p, self._mask).train(child.training))

    def _mask(self, x: Tensor, p: float, axes: Sequence[int]) -> Tensor:
        """Return the dropout mask of x, drawn for each span in the shape that it has alone.

        Args:
            axes: those of x that are as long as the rows are padded to.
        """
        spans = self.bank.spans
        total, mask = spans[-1].stop, torch.ones_like(x)
        axis = 0 if x.shape[0] == total else 1
        for number, span in enumerate(spans):
            if span.key is None:
                continue
            own = mask.narrow(axis, span.start, span.stop - span.start)
            for other in axes if self._widths else ():
                own = own.narrow(other, 0, min(self._widths[number], own.shape[other]))
            with self.around(span.key):
                own.copy_(F.dropout(torch.ones_like(own, memory_format=torch.contiguous_format), p))
        return mask

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Compute attention for transformers: query (B, H, L, D) -> (B, L, H, D)."""
        if not dropout:
            return attention_function(module, query, key, value, mask, scaling=scaling, **options)
        times = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(times, dim=1) if times > 1 else t for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = (query * scale) @ key.transpose(2, 3)
        if mask is None and getattr(module, "is_causal", True):
            mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
        if mask is not None:
            mask = mask[..., : scores.shape[-1]]
            hidden = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else None
            scores = scores + mask if hidden is None else hidden
        weights = scores.softmax(dim=-1)
        out = (weights * self._mask(weights, dropout, (2, 3))) @ value
        return out.transpose(1, 2).contiguous(), None


class _Dropout(nn.Module):
    """Dropout of the model's own, in a batch of several jobs."""

    def __init__(self, p: float, mask: Callable[[Tensor, float, Sequence[int]], Tensor]) -> None:
        super().__init__()
        self.p, self._mask = p, mask

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, L, H) or (B, H), or of packed rows (1, N, H) or (N, H)."""
        if not self.training:
            return x
        return x * self._mask(x, self.p, (1,) if x.ndim == 3 else ())


def trial_rows(key: Hashable, path: ForwardPath, examples: Sequence[Example]) -> JobRows:
    """Return rows on which a job is compared: noise, and pictures of its own."""
    if kind_named(path.kind).pictures:
        return JobRows(key, path, examples[:2])
    return JobRows(key, path, [*smallest_with_picture(examples), *noise(path.model, path.kind)])


def _widths(part: JobRows) -> tuple[int, int]:
    """Return the number of tokens of a padded row of a part alone; and of second texts. 0 where there is none."""
    if kind_named(part.path.kind).pictures:
        return 0, 0
    longest = 0 if part.path.mode == "plain" else part.path.longest
    first, second = ([getattr(e, name) for e in part.examples] for name in ("input_ids", "second"))
    return padded(first, 0, longest)[0].shape[1], padded(second, 0, longest)[0].shape[1]


def _draws(adapter: Adapter) -> bool:
    """Return whether an adapter drops out numbers of its own, beside those of the base."""
    bases = {m for w in adapter.modules.values() for m in w.base.modules()}
    own = {m for w in adapter.modules.values() for m in w.modules()} - bases
    return any(isinstance(module, nn.Dropout) and module.p for module in own)


def _by_frozen_head(head: Any, states: Tensor, targets: Tensor, heres: Sequence[Tensor]) -> list[Tensor]:
    """Return the summed loss at each of some sets of places, through one product of the head."""
    where = torch.cat([*heres])
    filling = rounded_up(len(where)) - len(where)
    where = F.pad(where, (0, filling), value=len(targets) - 1)  # no target there
    losses = token_losses(states[where], head.weight, head.bias, targets[where])
    return [own.sum() for own in losses.split([*map(len, heres), filling])[:-1]]
