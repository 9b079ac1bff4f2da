"""The server's own distributions for a comparison of engines, in a process of its own.

    python -m loralab.serving.audit_answers REQUEST ANSWER

REQUEST is JSON: base, adapter (a folder; null is the base alone), precision, prompts (token ids),
positions (the last of each prompt). ANSWER becomes safetensors: "values" (P, V), the
log-probabilities of all tokens, the prompts mixed in one batch and read in pieces, as a server does.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loralab import atomic
from loralab.adapters import folder
from loralab.errors import LoralabError
from loralab.models import load as models
from loralab.models.device import device_here
from loralab.serving.adapters.loader import AdapterLoader
from loralab.serving.blocks import BlockManager, blocks_needed
from loralab.serving.runners.choose import ModelRunner
from loralab.serving.scheduler import Chunk, TokenSequence

PIECE = 13  # tokens of each prompt that go through at once
LEAST_BLOCKS = 16  # what the runner tries itself on at its start


@torch.no_grad()
def answer(
    base: str, adapter: str | None, precision: str, prompts: Sequence[Sequence[int]], positions: int
) -> list[Tensor]:
    """Return the logits (p, V) at the last positions of each prompt, as the server computes them."""
    loaded = models.load(base, kind="causal-lm", dtype=models.parse_dtype(precision))
    loaded.model.to(device_here()).eval().requires_grad_(False)
    held = None if adapter is None else AdapterLoader(loaded).load(folder.read(Path(adapter)))
    prefix = 0 if held is None else held.prefix_tokens
    count = sum(blocks_needed(len(ids) + prefix) for ids in prompts) + LEAST_BLOCKS
    blocks = BlockManager(count)
    runner = ModelRunner(loaded.model, count)
    key = None if held is None else held.digest
    if held is not None:
        runner.put(held.digest, held)
    sequences = []
    for number, ids in enumerate(prompts):
        tokens = [*range(-prefix, 0), *ids]
        first = max(len(ids) - positions, 0) + prefix
        own = TokenSequence(number=number, key=key, tokens=tokens, scored=first + 1, continued=True)
        own.blocks = blocks.allocate(blocks_needed(len(tokens))) or []
        sequences.append(own)
    return _run(runner, sequences, None if held is None else held.prefix_kv)


def _run(runner: ModelRunner, sequences: Sequence[TokenSequence], prefix: Tensor | None) -> list[Tensor]:
    found: list[list[Tensor]] = [[] for _ in sequences]
    while left := [one for one in sequences if one.left]:
        chunks = [Chunk(one, one.done, min(one.done + PIECE, len(one.tokens))) for one in left]
        loaded = [runner.load_prefix(chunk, prefix) if prefix is not None else chunk for chunk in chunks]
        due = [chunk for chunk in loaded if chunk is not None]
        for chunk, logits in zip(due, runner.logits(due) if due else (), strict=True):
            if len(logits):  # the first pieces of a long prompt have none that are asked for
                found[chunk.sequence.number].append(logits.float().cpu())
        for chunk in chunks:
            chunk.sequence.done = chunk.stop
    return [torch.cat(parts) for parts in found]


def _main(request: str, place: str) -> None:
    asked: dict[str, Any] = json.loads(Path(request).read_text(encoding="utf-8"))
    logits = torch.cat(answer(**asked))
    atomic.write_file(place, safetensors.torch.save({"values": logits.double().log_softmax(dim=1).contiguous()}))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except LoralabError as failure:
        sys.exit(str(failure))
