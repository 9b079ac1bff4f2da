"""What each of several processes runs: trainings named in a JSON file, as `train` makes them.

torchrun ... in_processes.py PLAN      a list of {"many": [...]} or arguments of `trained`
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from contract_variants import VARIANTS

import loralab
from loralab.adapters.methods import Method


def job(
    model: str, data: str, output: str, variant: str, options: dict[str, Any], **training: Any
) -> dict[str, Any]:
    method: Method = replace(VARIANTS[variant], **options)
    settings = {"precision": "fp32", "max_steps": 6, "max_length": 64, "learning_rate": 0.01}
    return {
        "model": model, "data": data, "output_dir": Path(output), "method": method,
        "training": loralab.Training(**{**settings, **training}),
    }  # fmt: skip


def stopping(step: int) -> Any:
    """Ctrl-C in the middle of a run, in the one process that hears of its steps."""

    def heard(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return heard


def main(plan: Path) -> None:
    for asked in json.loads(plan.read_text()):
        if "many" in asked:
            jobs = [
                loralab.TrainJob(name=Path(own["output"]).name, **job(**own))
                for own in asked["many"]
            ]
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
