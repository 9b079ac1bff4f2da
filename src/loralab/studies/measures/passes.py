"""Single forward passes of the base and of its variants, timed side by side.

Source: Hu et al. 2021, arXiv:2106.09685, section 3 and Table 1, which times one forward pass of
GPT-2 medium at three pairs of batch and length. Here all variants take turns (timing.py). Merged is
what a merged model is: plain layers, without a trace of the adapter.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.errors import LoralabError
from loralab.models.load import Base
from loralab.studies.budgets import Fields, put_on
from loralab.studies.measures.carried import base_for, copy_of
from loralab.studies.study import Record, Trial
from loralab.studies.timing import affordable, in_turns, quickest
from loralab.studies.trained import Tell
from loralab.tasks.forward import accepted, run
from loralab.tasks.kinds.registry import kind_named
from loralab.tasks.score import context_length

MEASURE_PASSES = "loralab.studies.measures.passes:measure"
SHAPES = ((1, 128), (4, 256), (8, 512))  # batch, length
REPEATS = (5, 1, 1)  # timed passes of a shape in one trial, of which the quickest counts
WARM = (2, 1, 0)  # passes before them: what is new to the caches is not what is measured
PLAIN, MERGED, UNMERGED = "base", "merged", "unmerged"

Shape = tuple[int, int]
Way = tuple[str, str]  # name of a variant, and one of PLAIN, MERGED, UNMERGED


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Time the variants that the arm's options name: {"variants": {name: fields}}."""
    options, (base, _) = trial.arm.options, base_for(trial.setup)
    variants: Mapping[str, Fields] = options["variants"]
    models, refused = models_of(base, variants)
    prefix = max((int(own.get("tokens", 0)) for own in variants.values()), default=0)
    shapes = shapes_of(base, prefix)
    times = interleaved(base, models, shapes, seconds=float(options["seconds"]), most=int(options["trials"]))
    rows = [
        {"variant": way[0], "state": way[1], "batch": shape[0], "length": shape[1], "seconds": own}
        for (way, shape), own in times.items()
    ]
    return trial.record(tables={"passes": rows, "refused": refused})


def models_of(base: Base, variants: Mapping[str, Fields]) -> tuple[dict[Way, Any], list[dict[str, str]]]:
    """Return all that is timed: the base, each variant around the same weights, and merged, with its own, where it can."""
    models: dict[Way, Any] = {(PLAIN, PLAIN): base.model.eval()}
    refused = []
    for name, fields in variants.items():
        try:
            adapter = put_on(copy_of(base), fields)
            if adapter.can_merge:
                models[name, MERGED] = put_on(copy_of(base), fields).merge_and_detach()
            models[name, UNMERGED] = adapter.model
        except LoralabError as error:
            refused.append({"variant": name, "reason": str(error)})
    return models, refused


def shapes_of(base: Base, prefix: int) -> list[Shape]:
    """Return SHAPES, no longer than the model can take behind a prefix; of pictures only the batch."""
    if kind_named(base.kind).pictures:
        return [(batch, 1) for batch, _ in SHAPES]
    room = context_length(base.model) - prefix
    return list(dict.fromkeys((batch, max(1, min(length, room))) for batch, length in SHAPES))


@torch.no_grad()
def interleaved(
    base: Base, models: Mapping[Way, Any], shapes: Sequence[Shape], *, seconds: float, most: int
) -> dict[tuple[Way, Shape], list[float]]:
    """Return times of each way and shape, one for each trial: at least LEAST, at most `most` trials.

    Shapes for which the seconds would not do, judged by one pass of the base, are left out; the
    first one never is.
    """
    batches = {shape: batch_of(base, shape) for shape in shapes}
    settings = dict(zip(shapes, zip(REPEATS, WARM, strict=True), strict=False))

    def estimated(shape: Shape) -> float:
        repeats, warm = settings[shape]
        return len(models) * (repeats + warm) * one_pass(base.model, batches[shape], 1, warm)

    def once(way: Way, shape: Shape) -> float:
        return one_pass(models[way], batches[shape], *settings[shape])

    return in_turns(list(models), affordable(settings, estimated, 2 * seconds), once, seconds=seconds, most=most)


def one_pass(model: Any, batch: Mapping[str, Tensor], repeats: int, warm: int) -> float:
    """Return the seconds of one forward pass, the quickest of some, after some that are not timed.

    Of a language model only the last logits are made, as for the next token.
    """
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}
    return quickest(lambda: run(model, batch, **options), repeats, warm)


def batch_of(base: Base, shape: Shape) -> dict[str, Tensor]:
    """Return drawn tokens without padding, or a drawn picture."""
    draw, device = torch.Generator().manual_seed(0), next(base.model.parameters()).device
    if kind_named(base.kind).pictures:
        side = base.tokenizer.size
        pixels = torch.randn(shape[0], base.tokenizer.channels, side, side, generator=draw)
        return {"pixel_values": pixels.to(device)}
    vocabulary = base.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary // 2, vocabulary, shape, generator=draw)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
