"""Capacity: how many bits of random strings an adapter holds, for each number that is trained.

Source: Morris et al. 2025, arXiv:2505.24832: of strings of tokens drawn uniformly nothing can be
known but what was memorised, so it is their entropy less the bits that the model still needs.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loralab import atomic
from loralab.errors import ConfigError
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, score_on, scored, trained
from loralab.tasks.encode import encode
from loralab.tasks.examples import IGNORED

MEASURE_CAPACITY = "loralab.studies.measures.capacity:measure"


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train on random strings and score; then count the bits that the training rows' answers are known by.

    The strings are those of the study's data, or drawn: {"alphabet": words, "strings": how many, "length": in
    words} among the options. The alphabet is what occurs in them, but for the end of text, which is not random.
    """
    trial = _on_drawn_rows(trial, folder) if "alphabet" in trial.arm.options else trial
    run = trained(trial, folder, tell)
    record, scores = scored(trial, run, folder), score_on(run, "train")
    tokenizer = run.base.tokenizer
    examples = encode(run.task, "train", tokenizer, kind=run.base.kind, max_length=trial.setup.max_length).examples
    labels = [[label for label in example.labels if label != IGNORED] for example in examples]
    drawn = [label for own in labels for label in own if label != tokenizer.eos_token_id]
    nats = math.fsum(loss * len(own) for loss, own in zip(scores.row_losses, labels, strict=True))
    alphabet = len(set(drawn))
    bits = memorised_bits(nats, len(drawn), alphabet)
    numbers = {"bits": bits, "bits_per_parameter": bits / run.adapter.num_parameters, "alphabet": alphabet}
    return replace(record, numbers={**record.numbers, **numbers, "random_tokens": len(drawn)})


def _on_drawn_rows(trial: Trial, folder: Path) -> Trial:
    """Return the trial on strings that follow from its seed."""
    options = trial.arm.options
    rows = random_rows(options["alphabet"], int(options["strings"]), int(options["length"]), trial.seed)
    file = atomic.write_file(folder / "strings.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    return replace(trial, setup=replace(trial.setup, data=str(file)))


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


def random_rows(alphabet: Sequence[str], rows: int, length: int, seed: int) -> list[dict[str, str]]:
    """Return rows {"prompt", "completion"}: a number to ask for, and so many words, each drawn from all with equal odds.

    The words should be single tokens of the model's tokenizer, and stay so beside each other.
    """
    draw = random.Random(seed)
    return [{"prompt": f"{n}:", "completion": "".join(draw.choices(alphabet, k=length))} for n in range(rows)]
