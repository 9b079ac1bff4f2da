"""Capacity: how many bits of random strings an adapter holds, for each number that is trained.

Source: Morris et al. 2025, arXiv:2505.24832: of strings of tokens drawn uniformly nothing can be
known but what was memorised, so it is their entropy less the bits that the model still needs.
"""

import math
import random
from collections.abc import Sequence

from loralab.errors import ConfigError


def memorised_bits(nats: float, tokens: int, alphabet: int) -> float:
    """Return log2(alphabet) of every token, less the summed loss in bits; below 0 where the model guesses worse.

    Args:
        nats: summed loss, natural logarithm, of all tokens that were drawn.
        tokens: how many those are.
        alphabet: how many values each was drawn from, all equally likely.
    """
    if tokens < 1 or alphabet < 2:
        raise ConfigError(f"{tokens} tokens of {alphabet} values hold no bits", code="invalid_value", field="alphabet")
    return tokens * math.log2(alphabet) - nats / math.log(2)


def bits_per_parameter(row_losses: Sequence[float], tokens: Sequence[int], alphabet: int, parameters: int) -> float:
    """Return the memorised bits of rows over the trained parameters.

    Args:
        row_losses: of each row, the mean loss of its tokens.
        tokens: of each row, how many of them there are.
    """
    nats = math.fsum(loss * count for loss, count in zip(row_losses, tokens, strict=True))
    return memorised_bits(nats, sum(tokens), alphabet) / parameters


def random_rows(alphabet: Sequence[str], rows: int, length: int, seed: int) -> list[dict[str, str]]:
    """Return rows {"prompt", "completion"}: a number to ask for, and so many words, each drawn from all with equal odds.

    The words should be single tokens of the model's tokenizer, and stay so beside each other.
    """
    draw = random.Random(seed)
    return [{"prompt": f"{n}:", "completion": "".join(draw.choices(alphabet, k=length))} for n in range(rows)]
