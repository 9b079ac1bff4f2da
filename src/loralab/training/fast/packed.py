"""A packed pass of a causal model: rows one after the other, without padding between them.

Axes: N tokens, H hidden, M tokens that predict a label.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from loralab.tasks.batches import pack
from loralab.tasks.examples import IGNORED, Example
from loralab.training.fast.attention import FlashRows, Packing
from loralab.training.loss import summed_loss


def packed_loss(model: Any, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Return the summed loss of some examples, () in fp32."""
    lengths = [len(example.input_ids) for example in examples]
    size, device = rounded_up(sum(lengths)), next(model.parameters()).device
    batch = pack(examples, size=size, pad_id=pad_id)
    packing = Packing((*lengths, *[1] * (size - sum(lengths))), causal=True, device=device)
    here = (batch["targets"] != IGNORED).nonzero()[:, 0]
    here = F.pad(here, (0, rounded_up(len(here)) - len(here)), value=size - 1)  # no target there
    targets = batch["targets"][here].to(device)
    states = packed_states(model, batch["input_ids"].to(device), batch["position_ids"].to(device), packing)
    return summed_loss(model.get_output_embeddings(), states[here.to(device)], targets)


def packed_states(model: Any, input_ids: Tensor, position_ids: Tensor, packing: Packing | FlashRows) -> Tensor:
    """Return the last hidden states of packed rows, (N, H); ids and positions (1, N)."""
    # a mask of four axes is passed on as it is: none is made that nobody reads
    states: Tensor = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        packing=packing,
        attention_mask=input_ids.new_zeros(1, 1, 1, 1),
        use_cache=False,
    ).last_hidden_state[0]
    return states


def rounded_up(size: int, sizes: int = 16) -> int:
    """Return the next of so many sizes (a power of two) between powers of two, at least 16.

    A matrix library builds a kernel for each new shape, and keeps them: few shapes save more time
    and memory than the padding costs.
    """
    step = 2 ** max(4, size.bit_length() - sizes.bit_length())
    return -(-size // step) * step
