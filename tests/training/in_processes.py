"""Run in each of several processes: trainings named in a JSON file, as `train` makes them.

torchrun ... in_processes.py PLAN      a list of {"many": [...]} or arguments of `trained`
"""

import gc
import json
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from contract_variants import VARIANTS
from torch.distributed.tensor import DTensor

import loralab
from loralab.adapters.methods import Method
from loralab.training import many, preflight, rounds, run, shard
from loralab.training.memory import checkpointed_blocks
from loralab.training.world import World


def job(model: str, data: str, output: str, variant: str, options: dict[str, Any], **training: Any) -> dict[str, Any]:
    method: Method = replace(VARIANTS[variant], **options)
    settings = {"precision": "fp32", "max_steps": 6, "max_length": 64, "learning_rate": 0.01}
    return {
        "model": model,
        "data": data,
        "output_dir": Path(output),
        "method": method,
        "training": loralab.Training(**{**settings, **training}),
    }


def stopping(step: int) -> Any:
    """Raise Ctrl-C in the middle of a run, in the one process that hears of its steps."""

    def heard(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return heard


class Whole:
    """The most blocks whose weights were together at once, in forward passes."""

    def __init__(self) -> None:
        self.most = 0
        self._split = shard.shard_base

    def __enter__(self) -> "Whole":
        preflight.shard_base = rounds.shard_base = self.shard_base  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        preflight.shard_base = rounds.shard_base = self._split  # type: ignore[attr-defined]

    def shard_base(self, model: Any, adapters: Any, world: World) -> None:
        blocks = checkpointed_blocks(model)
        whole = [weakref.ref(p) for b in blocks for p in b.parameters() if not p.requires_grad]
        self._split(model, adapters, world)
        gc.collect()
        assert whole and not any(one() is not None for one in whole), "a whole weight is still held"

        def count(*_: Any) -> None:
            frozen = [next(p for p in b.parameters() if not p.requires_grad) for b in blocks]
            self.most = max(self.most, sum(not isinstance(p, DTensor) for p in frozen))

        for one in (model, *(adapter.model for adapter in adapters)):
            for block in checkpointed_blocks(one):
                block.register_forward_pre_hook(count)

    def take(self) -> int:
        most, self.most = self.most, 0
        return most


def main(plan: Path) -> None:
    with Whole() as whole:
        for asked in json.loads(plan.read_text()):
            most = asked.pop("most_whole", None)
            with certifying(asked.pop("certify", False)):
                one(asked)
            found = whole.take()
            assert most in (None, found), f"{found} blocks were whole at once"


@contextmanager
def certifying(wanted: bool) -> Iterator[None]:
    """Leave the certificates out, which take longer than these runs, unless they are wanted."""
    before = run.certified
    if not wanted:
        run.certified = many.proven = lambda made: made  # type: ignore[attr-defined]
    try:
        yield
    finally:
        run.certified = many.proven = before  # type: ignore[attr-defined]


def one(asked: dict[str, Any]) -> None:
    if "many" in asked:
        jobs = [loralab.TrainJob(name=Path(own["output"]).name, **job(**own)) for own in asked["many"]]
        for outcome in loralab.train_many(jobs):
            if isinstance(outcome, Exception):
                raise outcome
    else:
        resume, stop = asked.pop("resume", False), asked.pop("stop_at", 0)
        stopped = False
        try:
            loralab.train(**job(**asked), resume=resume, listener=stopping(stop))
        except KeyboardInterrupt:
            stopped = True
        assert stopped == bool(stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
