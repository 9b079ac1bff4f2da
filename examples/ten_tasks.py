"""Ten tasks, one base: ten adapters trained together, stored, and served from one process.

Each learns to tell the classes of one of ten data sets apart. Then all of them answer unseen rows
in mixed batches, and the table says what each one scores, what it takes on disk, and what a model
of its own for every task would take.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import loralab
from loralab.errors import LoralabError
from loralab.serving.opening import open_engine
from loralab.serving.settings import ServeSettings
from loralab.tasks.catalog import Task, find
from loralab.training.jobs import TrainJob

TASKS = (
    "movie-reviews",
    "tweets",
    "amazon-reviews",
    "nyt-editorials",
    "movie-reviews-strength",
    "tweets-strength",
    "amazon-reviews-strength",
    "nyt-editorials-strength",
    "text-source",
    "rater-agreement",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("runs/ten-tasks"), help="written anew")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=60, help="unseen rows of each task to score on")
    options = parser.parse_args()
    console = Console(width=100)
    shutil.rmtree(options.output, ignore_errors=True)

    console.print(f"[bold]1[/] training {len(TASKS)} adapters together on {options.model} ...")
    started = time.perf_counter()
    trained = loralab.train_many(jobs(options), listener=lambda event: _progress(console, event))
    seconds = time.perf_counter() - started
    failed = [str(outcome) for outcome in trained if isinstance(outcome, Exception)]
    if failed:
        console.print(f"[red]failed:[/] {'; '.join(failed)}")
        return 1

    console.print("[bold]2[/] serving all of them from one process ...")
    engine = open_engine(
        model=options.model, store=options.output, settings=ServeSettings(max_batch=32, step_tokens=1024)
    )
    engine.start()
    tasks = [find(name) for name in TASKS]
    begun = time.perf_counter()
    scores = answered(engine, tasks, options.rows)
    spent = time.perf_counter() - begun
    engine.stop()
    console.print(summary(engine, tasks, scores))
    total = sum(p.numel() for p in engine.base.model.parameters())
    stored = sum(entry.bytes for entry in engine.store.entries())
    full = 4 * total * len(TASKS)
    console.print(
        f"trained together in {seconds:.0f} s; {len(TASKS) * options.rows} rows of "
        f"{len(TASKS)} tasks answered in {spent:.1f} s\n"
        f"on disk: {stored / 1e6:.0f} MB of adapters; ten models of their own in fp32 would be "
        f"{full / 1e9:.1f} GB ({full / stored:.0f} times as much)"
    )
    console.print(f"Next:\n  loralab serve --model {options.model} --store {options.output}")
    gain = statistics.fmean(own - majority for own, majority in scores)
    return 0 if gain > 0 else 1


def _progress(console: Console, event: dict[str, Any]) -> None:
    every = max(1, event.get("steps", 1) // 4)
    if event["kind"] == "plan":
        console.print(f"  {event['job']}: {event['text']}", style="dim")
    if event["kind"] == "step" and event["step"] % every == 0 and event["job"] == TASKS[0]:
        console.print(f"  step {event['step']} of {event['steps']} of every adapter", style="dim")


def jobs(options: argparse.Namespace) -> list[TrainJob]:
    """One job for each task, alike in all but their data."""
    training = loralab.Training(
        max_steps=options.steps, batch_size=options.batch_size, max_length=160, evaluation_rows=40
    )
    return [
        TrainJob(name=name, model=options.model, data=name, output_dir=options.output / name, training=training)
        for name in TASKS
    ]


def answered(engine: Any, tasks: Sequence[Task], rows: int) -> list[tuple[float, float]]:
    """Accuracy of each task, and that of always saying its commonest label."""
    asked = {task.name: task.splits["test"][:rows] for task in tasks}
    futures = {
        name: engine.classify([row["text"] for row in own], adapter=name) for name, own in asked.items()
    }  # all ten are under way at once
    scores = []
    for task in tasks:
        labels = [row["label"] for row in asked[task.name]]
        found = [ranked.label for ranked in futures[task.name].result()]
        right = statistics.fmean(a == b for a, b in zip(found, labels, strict=True))
        commonest = max(set(labels), key=labels.count)
        scores.append((right, statistics.fmean(label == commonest for label in labels)))
    return scores


def summary(engine: Any, tasks: Sequence[Task], scores: Sequence[tuple[float, float]]) -> Table:
    """The table of question 9."""
    table = Table(title=f"Ten tasks on one {engine.base.name}", title_justify="left")
    for name in ("task", "labels", "score", "commonest label", "on disk", "digest"):
        table.add_column(name, justify="right" if name in ("score", "on disk") else "left")
    for task, (right, majority) in zip(tasks, scores, strict=True):
        entry = engine.store.entry(task.name)
        table.add_row(
            task.name,
            ", ".join(task.labels),
            f"{right:.1%}",
            f"{majority:.1%}",
            f"{entry.bytes / 1e6:.1f} MB",
            entry.digest[:12],
        )
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoralabError as error:
        sys.exit(f"error: {error}")
