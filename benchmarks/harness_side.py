"""One side of harness.py, with the Python that has lm-eval: harness_side.py SIDE REQUEST ANSWER.

SIDE is "server" (lm-eval's local-completions) or "hf" (its own hf with peft). REQUEST is JSON: model
(a folder), adapters (name -> folder), url, tasks, include, rows. ANSWER becomes JSON: seconds, and
for each adapter and task the log-likelihoods of the choices of each row. Imports nothing of loralab.
"""

import json
import sys
import time
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

BATCH, CONCURRENT = 16, 4


def main(side, request, answer):
    """Score every adapter, one after the other."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    manager = TaskManager(include_path=asked["include"])
    found, started = {}, time.perf_counter()
    for name, folder in asked["adapters"].items():
        if side == "server":
            model, options = (
                "local-completions",
                {
                    "model": name,
                    "base_url": f"{asked['url']}/v1/completions",
                    "tokenizer": asked["model"],
                    "num_concurrent": CONCURRENT,
                    "max_length": 512,
                },
            )
        else:
            model, options = "hf", {"pretrained": asked["model"], "peft": folder, "dtype": "float32", "device": "cpu"}
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=options,
            tasks=asked["tasks"],
            task_manager=manager,
            batch_size=BATCH,
            limit=asked["rows"],
            bootstrap_iters=0,
            log_samples=True,
        )
        found[name] = {
            task: [[float(choice[0]) for choice in row["filtered_resps"]] for row in in_order(rows)]
            for task, rows in results["samples"].items()
        }
    taken = time.perf_counter() - started
    Path(answer).write_text(
        json.dumps({"seconds": taken, "answers": found, "lm_eval": lm_eval.__version__}), encoding="utf-8"
    )


def in_order(rows):
    """Return samples by the number of their row."""
    return sorted(rows, key=lambda row: row["doc_id"])


if __name__ == "__main__":
    main(*sys.argv[1:])
