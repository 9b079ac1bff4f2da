"""Forward path of a step: the fastest mode whose loss and gradients equal the plain model's.

Before a run each way is tried on a few rows of noise, and its loss and gradients are compared
with those of the untouched model. The first that agrees is taken; a model that none suits is
trained as it is.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loralab.adapters.adapter import Adapter
from loralab.errors import LoralabError, ModelError
from loralab.lanes import can_share, lane_count, threads
from loralab.tasks.batches import collate, micro_batches, shared_out
from loralab.tasks.examples import Example
from loralab.tasks.forward import answer_loss, call, embed_pairs, partner_losses
from loralab.tasks.kinds.registry import kind_named
from loralab.training.fast.flash import can_flash
from loralab.training.fast.graphs import PassGraphs, Result, StaticRows
from loralab.training.fast.lane_loss import lane_loss
from loralab.training.fast.packed import packed_loss, packed_states
from loralab.training.fast.patches import Forward, known_modules, patched
from loralab.training.loss import summed_loss
from loralab.training.world import World

MODES = ("packed", "patched", "plain")
MAX_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens in one pass, where that makes no difference
LOSS_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
GRADIENT_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# how far other tokens may move the logits of earlier ones, of how far they move their own: experts
# whose rows change their places round otherwise
LOOKAHEAD_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
MIN_LANE_TOKENS = 256  # fewer pay for reading all weights once more
MAX_TRAINED_SHARE = 0.1  # of the frozen parameters: each lane has a gradient of its own for what is trained
SMALL_BYTES = 2**30  # of a model whose trial passes one thread makes
MIN_BALANCE = 0.8  # tokens of a mean lane, as a share of the fullest one's


@dataclass
class ForwardPath:
    """A model with an adapter, and how the loss of some examples comes out of it.

    Attributes:
        mode: "packed": rows without padding, quick modules, no logits kept; "patched": padded rows
            and quick modules; "plain": the model as it is.
        max_tokens: maximum tokens in one forward pass; more rows are cut into parts.
        longest: tokens of the longest text that the model will meet; shorter ones may be padded
            to one of few lengths.
        refused: ways that were tried first, and why they were not taken.
        quicker: modules and the forwards that stand in for theirs.
        world: the processes whose rows meet in a pass; only those of a sentence encoder do.
        draws: whether a pass in training mode has been seen to draw random numbers.
        lanes: how many parts of a pass may be computed side by side; 1 where they would draw
            random numbers, or have not been found to agree.
        graphs: passes that a GPU launches at once, where they suit model and adapter.
    """

    model: Any
    kind: str
    pad_id: int
    pictures: Any = None
    mode: str = "plain"
    max_tokens: int = MAX_TOKENS["cpu"]
    longest: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    quicker: Sequence[tuple[nn.Module, Forward]] = ()
    world: World = field(default_factory=World)
    draws: bool = True
    lanes: int = 1
    graphs: PassGraphs | None = None

    @property
    def in_batch_negatives(self) -> bool:
        """Return whether the rows of a pass are compared with each other, those of all processes."""
        return kind_named(self.kind).rows_meet

    def micro_batches(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Return the examples of one pass, cut where that changes nothing but memory."""
        if not kind_named(self.kind).cuttable or self.mode == "plain":
            return [list(examples)]
        return micro_batches(examples, self.max_tokens, pads=self.mode != "packed")

    def loss(self, examples: Sequence[Example]) -> Tensor:
        """Return the summed loss of some examples, () in fp32."""
        if self.in_batch_negatives and self.world.size > 1:
            return self.shared_loss(examples)
        parts = self._lanes(examples)
        return self._loss(examples) if len(parts) == 1 else lane_loss(self._loss, parts, self.model)

    def _loss(self, examples: Sequence[Example]) -> Tensor:
        if self.mode == "packed":
            graph = self.graphs.loss(examples) if self.graphs is not None and torch.is_grad_enabled() else None
            return packed_loss(self.model, examples, self.pad_id) if graph is None else graph
        return answer_loss(self.model, self.batch(examples), self.kind)[0]

    def _lanes(self, examples: Sequence[Example]) -> Sequence[Sequence[Example]]:
        """Return the rows of a pass in parts to compute side by side; one where that would not be quicker."""
        count = min(self.lanes, len(examples))
        few = sum(example.length for example in examples) < count * MIN_LANE_TOKENS
        if count == 1 or few or not torch.is_grad_enabled():
            return [examples]
        parts = shared_out(examples, count)
        sizes = [self.size(part) for part in parts]
        return parts if sum(sizes) >= MIN_BALANCE * count * max(sizes) else [examples]

    def shared_loss(self, examples: Sequence[Example], *, counted: bool = True) -> Tensor:
        """Return this process's part of the loss of a pass that all processes make together, ().

        The embeddings of the others are known, but not how they came about: so each process works
        out the whole loss and its gradient by its own rows, and the gradients add up to that of one
        process with all rows.

        Args:
            examples: this process's rows.
            counted: False, if it has none and these only stand in for them.
        """
        own = [t if counted else t[:0] for t in embed_pairs(self.model, self.batch(examples))]
        pairs = self.world.all_gather([t.detach().cpu() for t in own])
        start = sum(len(first) for first, _ in pairs[: self.world.rank])
        both = [[t.to(own[0].device) for t in pair] for pair in pairs]
        both[self.world.rank] = own
        first, second = (torch.cat(side) for side in zip(*both, strict=True))
        losses = partner_losses(first, second)
        whole, mine = losses.sum(), losses[start : start + len(own[0])].sum()
        return whole - whole.detach() + mine.detach()

    def size(self, examples: Sequence[Example]) -> int:
        """Return the number of tokens that the model meets, padding included; of pictures, their number."""
        lengths = [example.length for example in examples]
        return sum(lengths) if self.mode == "packed" else len(lengths) * max(lengths)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return padded tensors, where the model is."""
        batch = collate(
            examples,
            pad_id=self.pad_id,
            kind=self.kind,
            pictures=self.pictures,
            longest=0 if self.mode == "plain" else self.longest,
        )
        return on_device(batch, self.model)

    def _static_loss(self, rows: StaticRows) -> Tensor:
        """Return the summed loss of a pass whose tensors are where a graph reads them."""
        states = packed_states(self.model, rows.input_ids, rows.position_ids, rows.packing)
        return summed_loss(self.model.get_output_embeddings(), states[rows.predicting], rows.targets)

    @contextlib.contextmanager
    def activated(self) -> Iterator[None]:
        """Patch the model as this mode needs it."""
        plain = self.mode == "plain"
        with contextlib.nullcontext() if plain else patched(self.model, self.quicker):
            yield


def max_tokens_on(device: torch.device) -> int:
    """Return the number of tokens that go through a model at once on a device, where nothing else is asked for."""
    return MAX_TOKENS.get(device.type, MAX_TOKENS["cuda"])


def fastest_path(
    adapter: Adapter, kind: str, *, pad_id: int, pictures: Any = None, examples: Sequence[Example] = ()
) -> ForwardPath:
    """Return the fastest path for this model and adapter that agrees with the plain one.

    Args:
        examples: all that it is for; one with a picture in a text is tried with the noise.

    Raises:
        ModelError: the plain way does not work, or reads what it should predict.
    """
    model = adapter.model
    device = next(model.parameters()).device
    path = ForwardPath(model, kind, pad_id, pictures, max_tokens=max_tokens_on(device))
    drawn, training, lanes = noise(model, kind), model.training, lane_count()
    seen = smallest_with_picture(examples) if kind_named(kind).sees else []
    examples = [*seen, *drawn]
    with torch.random.fork_rng(), contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        if sum(p.numel() * p.element_size() for p in model.parameters()) <= SMALL_BYTES:
            stack.enter_context(threads(1))  # several would wait for each other more than compute
        expected = _plain_result(path, adapter, examples)
        own = kind_named(kind)
        if own.pictures:
            return path
        path.quicker = known_modules(model)
        if own.packs:
            require_causal(path, examples[-1])
        for mode in MODES[:-1]:
            path.mode = mode
            if mode == "packed" and not (own.packs and _can_pack(device, _dtype(model))):
                continue
            if mode == "packed" and seen:
                path.refused[mode] = "there are pictures in them"
                continue
            try:
                found = _result(path, adapter, examples)
            except Exception as error:  # a structure that the quick forwards do not know
                path.refused[mode] = f"{type(error).__name__}: {error}"
                continue
            problem = difference(model, expected, found)
            if not problem:
                path.lanes = _lanes_that_agree(path, adapter, examples, expected, lanes)
                path.graphs = _graphs_of(path, adapter) if mode == "packed" and device.type == "cuda" else None
                return path
            path.refused[mode] = problem
    path.mode = "plain"
    return path


def _can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether attention over packed rows is quicker than over padded ones; tiles are not on a GPU."""
    return device.type == "cpu" or can_flash(device, dtype)


def _result(path: ForwardPath, adapter: Adapter, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return the loss and gradients on some examples, without dropout; what training mode refuses raises.

    A pass in training mode that draws no random number is the very pass that is compared.
    """
    with path.activated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reentrant checkpointing without gradients
        path.model.train()
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in path.model.modules())
        before = random_states()
        with torch.set_grad_enabled(not recomputes):
            loss = path.loss(examples)
        path.draws = not all(map(torch.equal, before, random_states()))
        if recomputes or path.draws:
            del loss  # with what it keeps for a backward pass
            path.model.eval()
            loss = path.loss(examples)
        return gradient_of(loss, adapter)


def random_states() -> list[Tensor]:
    """Return the state of every generator that a model may draw from, GPUs included."""
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def _lanes_that_agree(
    path: ForwardPath, adapter: Adapter, examples: Sequence[Example], expected: tuple[Tensor, Tensor], count: int
) -> int:
    """Return how many parts of a pass may be computed side by side: `count`, or 1."""
    if count == 1 or path.draws or not _suits_lanes(path, adapter):
        return 1
    with path.activated():
        path.model.eval()
        try:
            found = gradient_of(lane_loss(path._loss, shared_out(examples, count), path.model), adapter)
        except Exception:  # a model that cannot be in two places at once
            return 1
    return 1 if difference(path.model, expected, found) else count


def _graphs_of(path: ForwardPath, adapter: Adapter) -> PassGraphs | None:
    """Return graphs for passes that depend on nothing but tensors: no ranks that move, no dropout."""
    if adapter.budget is not None or path.draws or not _has_small_gradient(path, adapter):
        return None
    return PassGraphs(path.model, path._static_loss, partial(_unlike, path.model), path.pad_id)


def _unlike(model: nn.Module, expected: Result, found: Result) -> str:
    """Describe how a graph's result differs from the pass's own; empty if it does not."""
    pair = ((loss, torch.cat([g.flatten().float() for g in own if g is not None])) for loss, own in (expected, found))
    return difference(model, *pair)


def _suits_lanes(path: ForwardPath, adapter: Adapter) -> bool:
    """Return whether parts of a pass can be computed side by side, if a trial agrees."""
    on_cpu = next(path.model.parameters()).device.type == "cpu"
    return on_cpu and _has_small_gradient(path, adapter) and can_share(path.model)


def _has_small_gradient(path: ForwardPath, adapter: Adapter) -> bool:
    """Return whether the gradient may be computed with the loss, and kept beside it."""
    frozen = sum(parameter.numel() for parameter in path.model.parameters() if not parameter.requires_grad)
    return (
        _dtype(path.model) != torch.float16  # whose gradient must be scaled before it is computed
        and path.world.size == 1
        and adapter.num_parameters <= MAX_TRAINED_SHARE * frozen
        and kind_named(path.kind).cuttable
    )


def _plain_result(path: ForwardPath, adapter: Adapter, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return the model's result as it is: what fails here, fails in every step."""
    try:
        return _result(path, adapter, examples)
    except LoralabError:
        raise
    except Exception as error:  # whatever some hundred architectures raise
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        hint = _works_in_fp32(path, adapter, examples)
        raise ModelError(
            f"{type(path.model).__name__} cannot be trained with {type(adapter.config).__name__} "
            f"here: a trial step ends in {type(error).__name__}: {error}{hint}",
            code="model_cannot_train",
            field="model",
        ) from error


def _works_in_fp32(path: ForwardPath, adapter: Adapter, examples: Sequence[Example]) -> str:
    """Return a remedy that has been tried, on a model that nobody will use any more."""
    if _dtype(path.model) == torch.float32:
        return ""
    try:
        path.model.float()
        _result(path, adapter, examples)
    except Exception:  # the precision is not to blame, or not alone
        return ""
    return "; it works with --precision fp32"


@torch.no_grad()
def require_causal(path: ForwardPath, example: Example) -> None:
    """Refuse a language model whose tokens see those after them.

    Raises:
        ModelError: another end of a text changes what the model makes of its beginning.
    """
    ids, half = example.input_ids, len(example.input_ids) // 2
    other = replace(example, input_ids=ids[:half] * 2)
    path.model.eval()
    one, two = (call(path.model, path.batch([row]))[0].float() for row in (example, other))
    moved = (one - two).norm(dim=1)  # (L,)
    if moved[:half].max() > LOOKAHEAD_TOLERANCES[_dtype(path.model)] * moved[half:].max():
        raise ModelError(
            f"{type(path.model).__name__} sees the tokens after each one as well: as a language "
            "model it would read what it should predict; take a decoder such as smollm2-135m, or "
            "train it as a classifier on text, label",
            code="not_causal",
            field="model",
        )


def gradient_of(loss: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return a loss, and its gradient by everything that is trained as one vector; none is kept.

    Raises:
        ModelError: the loss does not depend on it.
    """
    if not loss.requires_grad:
        raise ModelError(
            f"no gradient reaches any layer of {type(adapter.model).__name__} that is adapted",
            code="no_gradient",
            field="model",
        )
    found = torch.autograd.grad(loss, adapter.parameters(), allow_unused=True)
    pairs = zip(found, adapter.parameters(), strict=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]
    return loss.detach(), torch.cat(flat)


def difference(model: nn.Module, expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> str:
    """Describe how a loss and its gradients differ by more than rounding; empty if they do not."""
    dtype = _dtype(model)
    loss = float((expected[0] - found[0]).abs() / expected[0].abs())
    if not loss <= LOSS_TOLERANCES[dtype]:
        return f"its loss differs by {loss:.2g} of the loss"
    gradient = float((expected[1] - found[1]).norm() / expected[1].norm())
    if not gradient <= GRADIENT_TOLERANCES[dtype]:
        return f"its gradient differs by {gradient:.2g} of its length"
    return ""


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def noise(model: Any, kind: str) -> list[Example]:
    """Return the rows of unequal length of common ids, with loss on some of their tokens; or two pictures."""
    return kind_named(kind).noise(model)


def smallest_with_picture(examples: Sequence[Example]) -> list[Example]:
    """Return the shortest example with a picture, if there is one."""
    return sorted((e for e in examples if e.image is not None), key=lambda example: example.length)[:1]


def on_device(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
