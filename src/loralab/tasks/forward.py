"""Forward pass of each kind of model, and the loss of its answers."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.errors import DataError, ModelError, join_limited
from loralab.tasks.batches import collate
from loralab.tasks.examples import IGNORED, Example, Ids

T = TypeVar("T")
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
# how the inputs begin that processors make of the pictures in a text; a model gets those that it knows
OF_PICTURES = ("pixel_", "image_", "mm_token_type_ids", "spatial_shapes", "aspect_ratio_", "cross_attention_mask")
AT_ONCE = {"cpu": 512}  # tokens scored together, padding included; more of them is no quicker
GPU_TOKENS = 16384  # on a GPU
TRIED_POSITIONS = 8  # positions at which a head is tried
CHUNK = 256  # logits that are widened together
SHARPNESS = 20.0  # of cosines as logits: that of sentence-transformers' ranking loss


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor], kind: str) -> tuple[Tensor, int]:
    """Return the summed loss in fp32 and how many labels it sums over; differentiable.

    Logits of a causal model are computed only where some row has a label, if the model can.
    """
    from loralab.tasks.kinds.registry import kind_named

    return kind_named(kind).loss(model, batch)


def call(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    """Return the logits of a batch."""
    return run(model, batch, **options).logits


def run(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """Return all that a model puts out for a batch."""
    known = accepted(model)
    if "use_cache" in known:
        options["use_cache"] = False  # no keys and values are kept that nobody reads
    if "interpolate_pos_encoding" in known:
        options["interpolate_pos_encoding"] = True  # has no effect at the model's own size
    return model(**read_by(model, batch), **options)


def read_by(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a batch that a model is called with, numbers of pixels in its own dtype."""
    known = accepted(model)
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if "token_type_ids" not in known:
        inputs.pop("token_type_ids", None)
    inputs |= {name: tensor for name, tensor in batch.items() if name.startswith(OF_PICTURES) and name in known}
    return {name: t.to(_dtype(model)) if t.is_floating_point() else t for name, t in inputs.items()}


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each text's last hidden states, in fp32 and of length 1: (B, H)."""
    states = run(model, batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return F.normalize(mean, dim=1)


def embed_pairs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the first and the second texts of a batch of pairs, each (B, H)."""
    return embed(model, batch), embed(model, second_of(batch))


def partner_losses(first: Tensor, second: Tensor) -> Tensor:
    """Return the loss of each first text (B, H) in finding its partner among all second ones (B, H): (B,)."""
    partners = torch.arange(len(first), device=first.device)
    return F.cross_entropy(SHARPNESS * first @ second.T, partners, reduction="none")


def second_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the second texts of a batch of pairs as a batch of their own."""
    return {name: batch[f"second_{name}"] for name in ("input_ids", "attention_mask")}


def labelled(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (M, V) as the model gives them, labels (M,) and rows (M,) of all that carries loss."""
    targets = _targets(batch)
    columns = _columns(targets)
    logits, targets = _logits(model, batch, columns), targets[:, columns]
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    return logits[rows, places], targets[rows, places], rows


def lone_head(model: Any, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the output head, if a causal model's logits are what it makes of the last hidden states.

    Tried on a batch, and bit for bit: some models scale or cap their logits afterwards.
    """
    base = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or base is model or "logits_to_keep" not in accepted(model):
        return None
    columns = _columns(_targets(batch))[:TRIED_POSITIONS]
    states = run(base, batch).last_hidden_state[:, columns]
    return head if torch.equal(head(states), _logits(model, batch, columns)) else None


def answers(
    model: Any, batch: Mapping[str, Tensor], head: nn.Module | None
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Return losses (M,) in fp32 and rows (M,) of all that carries loss; and what gives its logits.

    Args:
        head: what `lone_head` found: logits are made in chunks, and never exist together.
    """
    if head is None:
        logits, labels, rows = labelled(model, batch)
        return token_losses(logits.split(CHUNK), labels), rows, lambda which: logits[which]
    targets = _targets(batch)
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    states = run(model.base_model, batch).last_hidden_state[rows, places]
    chunks = (head(part) for part in states.split(CHUNK))
    return token_losses(chunks, targets[rows, places]), rows, lambda which: head(states[which])


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the label that each position predicts, (B, L); nothing follows the last."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def _columns(targets: Tensor) -> Tensor:
    """Return the positions that predict a label in some row; at least one."""
    columns = (targets != IGNORED).any(dim=0).nonzero()[:, 0]
    return columns if len(columns) else columns.new_zeros(1)


def _logits(model: nn.Module, batch: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    if "logits_to_keep" in accepted(model):
        return call(model, batch, logits_to_keep=columns)
    return call(model, batch)[:, columns]


def token_losses(chunks: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits that come in chunks of (CHUNK, V), (M,) in fp32."""
    parts = zip(chunks, labels.split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(z.float(), own, reduction="none") for z, own in parts])


def accepted(model: nn.Module) -> frozenset[str]:
    """Return the names that a model can be called with."""
    return frozenset(inspect.signature(getattr(model, "module", model).forward).parameters)


def require_known(model: nn.Module, tokenizer: Any, texts: Iterable[Ids]) -> None:
    """Refuse token ids that the model has no row for, as its embedding would only say "index".

    Raises:
        ModelError: there is one; it names all such tokens.
    """
    texts = [ids for ids in texts if ids]
    rows = _rows(model) if texts else None
    if rows is None or max(map(max, texts)) < rows:
        return
    strange = sorted({number for ids in texts for number in ids if number >= rows})
    named = [f"{tokenizer.convert_ids_to_tokens(number)!r} ({number})" for number in strange]
    raise ModelError(
        f"the tokenizer has tokens that the model has no row for: {join_limited(named)}, and the rows of "
        f"its embedding go from 0 to {rows - 1}; take them out of the texts or the tokenizer, or "
        f"save the model with more rows: model.resize_token_embeddings({strange[-1] + 1})",
        code="token_without_row",
        field="tokenizer",
    )


def require_places(model: nn.Module, examples: Iterable[Example]) -> None:
    """Refuse texts that are longer than what the model has places for.

    Raises:
        DataError: there is one.
    """
    room, lengths = places(model), [max(len(e.input_ids), len(e.second)) for e in examples]
    if room is None or max(lengths, default=0) <= room:
        return
    raise DataError(
        f"{sum(length > room for length in lengths)} rows are longer than {room} tokens, all that "
        f"the model has places for (the longest has {max(lengths)}); say --max-length {room}",
        code="row_beyond_places",
        field="max_length",
    )


def places(model: nn.Module) -> int | None:
    """Return the tokens that a model has places for; None if it does not say."""
    stated = _stated_places(getattr(model, "config", None))
    if stated <= 0:  # XLNet's -1 is no limit
        return None
    for name, table in model.named_modules():
        kept = getattr(table, "padding_idx", None)
        if kept is not None and name.endswith("position_embeddings"):
            return stated - kept - 1  # as RoBERTa, whose places begin after that of padding
    return stated


def _stated_places(config: Any) -> int:
    """Return the tokens that a configuration, or its language part, says there are places for; 0 if none does."""
    parts = (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,)
    return next((int(n) for part in parts if (n := getattr(part, "max_position_embeddings", 0))), 0)


def _rows(model: Any) -> int | None:
    """Return the rows of the embedding, or of the output head where it has fewer; None if nothing says."""
    finders = ("get_input_embeddings", "get_output_embeddings")
    tables = []
    for name in finders:
        # of a model that looks tokens up in no one table (Canine) transformers raises it
        with contextlib.suppress(NotImplementedError, AttributeError):
            tables.append(getattr(model, name)())
    sizes = [getattr(t, n, None) for t in tables for n in ("num_embeddings", "out_features")]
    return min(filter(None, sizes), default=None)


class ProcessGroup(Protocol):
    """Several processes that score the same rows together: this one is `rank` of `size`."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in every process."""


def by_length(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    kind: str,
    batch_size: int,
    among: ProcessGroup | None = None,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of similar length where the model is, with the indices of their examples.

    Of long texts fewer than `batch_size` go together, so that scoring needs no more memory than
    training did. Of several processes each gets its own batches (`merged` puts together what came
    of them), and equally many: some may get the first one again.
    """
    device = next(model.parameters()).device
    room = AT_ONCE.get(device.type, GPU_TOKENS)
    groups = _groups([example.length for example in examples], batch_size, room)
    if among is not None:
        filling = [groups[0]] * (-len(groups) % among.size)
        groups = (groups + filling)[among.rank :: among.size]
    for indices in groups:
        chosen = [examples[i] for i in indices]
        batch = collate(chosen, pad_id=tokenizer.pad_token_id or 0, kind=kind, pictures=tokenizer)
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}


def merged(found: dict[int, T], among: ProcessGroup | None) -> dict[int, T]:
    """Merge the results of all processes, by the index of the example."""
    if among is None:
        return found
    return {index: value for own in among.all_gather(found) for index, value in own.items()}


def _groups(lengths: Sequence[int], most: int, room: int) -> list[list[int]]:
    """Return the indices of all lengths, sorted, in groups that hold few of them and few tokens."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        size = len(groups[-1]) if groups else most  # the one that is added is the longest
        if size < most and lengths[index] * (size + 1) <= room:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
