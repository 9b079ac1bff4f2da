"""Answers that a model writes: generate(), and the mode in which models are scored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import DataError
from loralab.progress import Listener, counted
from loralab.tasks.batches import padded
from loralab.tasks.encode import stop_ids
from loralab.tasks.examples import Ids
from loralab.tasks.forward import read_by, require_known
from loralab.tasks.scorable import context_length

Beside = Callable[[Sequence[int], Tensor], Mapping[str, Tensor]]
# said in full, or the model's own generation_config would add its penalty or cut what is drawn
GREEDY_OPTIONS = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}
SAMPLED_OPTIONS = GREEDY_OPTIONS | {"do_sample": True, "top_k": 0, "top_p": 1.0}


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    beside: Beside | None = None,
    listener: Listener | None = None,
) -> list[str]:
    """Return the answers to some prompts (token ids): greedy at temperature 0, else sampled.

    Args:
        beside: returns what the model reads beside the ids (B, L) of the prompts with these numbers.

    Raises:
        DataError: a prompt is empty, or leaves less than `max_new_tokens` of the model's context.
    """
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        return write_answers(model, tokenizer, prompts, max_new_tokens, batch_size, temperature, beside, listener)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block without dropout and gradients; each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def write_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    beside: Beside | None = None,
    listener: Listener | None = None,
) -> list[str]:
    """Return the answers of batches of similar length, through the model's own generate().

    A decoder goes on at the end of its prompt, so padding stands before it; an encoder-decoder
    begins its answer anew, and places of its prompt count from the first token.
    """
    separate = bool(getattr(model.config, "is_encoder_decoder", False))
    stops, texts = list(stop_ids(tokenizer)), [""] * len(prompts)
    pad = tokenizer.pad_token_id or 0
    device = next(model.parameters()).device
    options = SAMPLED_OPTIONS | {"temperature": temperature} if temperature else GREEDY_OPTIONS
    if not all(prompts):
        raise DataError(f"prompt {list(map(bool, prompts)).index(False) + 1} is empty", code="empty", field="prompt")
    longest = max(map(len, prompts), default=0)
    needed = max(longest, max_new_tokens) if separate else longest + max_new_tokens
    require_room("the longest prompt", needed, context_length(model))
    require_known(model, tokenizer, map(tuple, prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    for indices in counted(groups, "writing", len(order), listener):
        ids, mask = (padded if separate else _left_padded)([tuple(prompts[i]) for i in indices], pad)
        more = {} if beside is None else read_by(model, beside(indices, ids))
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            eos_token_id=stops,
            pad_token_id=pad,
            max_new_tokens=max_new_tokens,
            **{name: tensor.to(device) for name, tensor in more.items()},
            **options,
        )[:, 1 if separate else ids.shape[1] :].tolist()
        for index, tokens in zip(indices, written, strict=True):
            end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
            texts[index] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return texts


def _left_padded(prompts: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def require_room(what: str, needed: int, room: int) -> None:
    """Refuse a text that leaves no room for its answer.

    Raises:
        DataError: it needs more tokens than the model can take.
    """
    if needed > room:
        raise DataError(
            f"{what} needs {needed} tokens with its answer, and the model can take {room}; "
            "shorten it, or ask for fewer new tokens",
            code="too_long",
            field="prompt",
        )
