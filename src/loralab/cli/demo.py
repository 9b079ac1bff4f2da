"""demo: SmolLM2-135M learns to tell good film reviews from bad ones, with proof."""

import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loralab.cli.app import app
from loralab.cli.arguments import Json
from loralab.cli.assets import Yes, fetch, known_offers
from loralab.cli.tables import print_json, print_table
from loralab.errors import OutputError

if TYPE_CHECKING:
    from loralab.artefacts.comparison import Certificate
    from loralab.tasks.score import Scores
    from loralab.training.run import Run

MODEL, DATA = "smollm2-135m", "movie-reviews"
CLEARLY = 0.10  # points of accuracy that the adapted model must be ahead
RESULT = "demo.json"  # marks a folder of ours, which is written anew


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="written anew")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="of the training", min=1)] = 40,
    reviews: Annotated[int, typer.Option(help="unseen reviews to score on", min=1)] = 200,
    yes: Yes = False,
    json_: Json = False,
) -> None:
    """Train, score, merge and prove an adapter on film reviews; about four minutes on two cores.

    Exit code 1: the adapted model does not clearly beat the base. Missing assets are offered first.
    """
    used = [offer for offer in known_offers() if {MODEL, DATA} & set(offer.names)]
    fetch([offer for offer in used if not offer.present], yes=yes, quiet=json_)
    result = Demo(MODEL, DATA, output_dir, steps=steps, rows=reviews, quiet=json_).run()
    if json_:
        print_json(result)
    if not result["good"]:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Demo:
    """The main job on one model and one task."""

    model: str
    data: str
    output: Path
    steps: int
    rows: int
    quiet: bool = False

    def run(self) -> dict[str, Any]:
        """Do it, show it, and return what was measured."""
        import loralab
        from loralab import atomic
        from loralab.cli.progress import Bar, Counts

        started = time.perf_counter()
        _clear(self.output)
        evaluation = loralab.Evaluation(limit=self.rows)
        self._say(f"1 scoring {self.model} on {self.rows} rows of {self.data} that it will not see ...")
        with Counts(quiet=self.quiet) as counts:
            base = loralab.evaluate(model=self.model, data=self.data, evaluation=evaluation, listener=counts)
        self._say(f"2 training a LoRA for {self.steps} steps ...")
        with Bar(quiet=self.quiet) as bar:
            run = loralab.train(
                model=self.model,
                data=self.data,
                output_dir=self.output / "adapter",
                training=loralab.Training(max_steps=self.steps, batch_size=16, max_length=128, evaluation_rows=100),
                listener=bar,
            )
        self._say("3 scoring the adapted model on the same rows ...")
        adapter = self.output / "adapter"
        with Counts(quiet=self.quiet) as counts:
            adapted = loralab.evaluate(adapter=adapter, data=self.data, evaluation=evaluation, listener=counts)
        self._say("4 merging, and comparing in a fresh process ...")
        with Counts(quiet=self.quiet) as counts:
            proof = loralab.merge(adapter, self.output / "merged", listener=counts)
        result = _result(run, base, adapted, proof, time.perf_counter() - started)
        atomic.write_file(self.output / RESULT, json.dumps(result, indent=2) + "\n")
        if not self.quiet:
            _show(result, self.output)
            _show_turned(base, adapted)
            poor = "not good enough: the gain is below 10 points, or the merge differs"
            print("\n".join(["next:", *_next(self.output)]) if result["good"] else poor)
        return result

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _clear(output: Path) -> None:
    """Make a folder of an earlier demo empty, and mark a new one.

    Raises:
        OutputError: it holds something else.
    """
    from loralab import atomic

    if not (output / RESULT).is_file() and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(
            f"{output} is not the folder of an earlier demo; choose another with --output-dir",
            code="output_exists",
            field="output_dir",
        )
    for name in ("adapter", "merged"):
        shutil.rmtree(output / name, ignore_errors=True)
    atomic.write_file(output / RESULT, "{}\n")


def _result(run: "Run", base: "Scores", adapted: "Scores", proof: "Certificate", seconds: float) -> dict[str, Any]:
    before, after = base.metrics["accuracy"], adapted.metrics["accuracy"]
    return {
        "rows": base.rows,
        "accuracy_base": before,
        "accuracy_adapted": after,
        "trainable": run.adapter.num_parameters,
        "total": sum(p.numel() for p in run.base.model.parameters()),
        "adapter_bytes": (run.output_dir / "adapter_model.safetensors").stat().st_size,
        "steps": run.steps,
        "training_seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "peak_bytes": run.peak_bytes,
        "merge": proof.to_json(),
        "seconds": seconds,
        "good": after - before >= CLEARLY and proof.passed,
    }


def _show(result: dict[str, Any], output: Path) -> None:
    proof = result["merge"]
    print_table(
        f"{MODEL} on film reviews that it has never seen",
        [
            ("accuracy, base model", f"{result['accuracy_base']:.1%} of {result['rows']}"),
            ("accuracy, adapted", f"{result['accuracy_adapted']:.1%} of {result['rows']}"),
            ("trained parameters", f"{result['trainable']:,} ({result['trainable'] / result['total']:.2%})"),
            ("adapter on disk", f"{result['adapter_bytes'] / 1e6:.1f} MB in {output / 'adapter'}"),
            (
                "training",
                f"{result['steps']} steps, {result['training_seconds']:.0f} s, "
                f"{result['tokens_per_second']:.0f} tokens/s",
            ),
            ("peak memory", f"{result['peak_bytes'] / 1e9:.1f} GB"),
            (
                "merge check",
                f"{'passed' if proof['passed'] else 'FAILED'}: top answer the same in {proof['top1_agreement']:.1%}, "
                f"mean KL {proof['mean_kl']:.1e}",
            ),
            ("all together", f"{result['seconds']:.0f} s"),
        ],
    )


def _show_turned(base: "Scores", adapted: "Scores") -> None:
    """Show two rows that only the adapted model gets right."""
    pairs = zip(base.predictions, adapted.predictions, strict=True)
    turned = [(b, a) for b, a in pairs if b.answer != b.expected and a.answer == a.expected]
    for before, after in turned[:2]:
        lines = [line for line in before.prompt.splitlines() if line.strip() and "<|im_" not in line]
        print(f"  “{lines[-1].strip()}”\n    before: {before.answer}   after: {after.answer}")


def _next(folder: Path) -> list[str]:
    """Return commands to go on with, as they can be typed here."""
    program, adapter = _program(), shlex.quote(str(folder / "adapter"))
    question = "Is this film review positive or negative? Answer with one word. A quiet triumph."
    return [
        f"  {program} {command}"
        for command in (
            f"generate --adapter {adapter} {shlex.quote(question)}",
            f"inspect {adapter}",
            f"verify {shlex.quote(str(folder / 'merged'))}",
            f"card {adapter}",
            f"train --data {DATA} --output-dir {shlex.quote(str(folder.parent / 'r4'))} --rank 4",
        )
    ]


def _program() -> str:
    """Return how this very command is called: by its name, by its path, or through the interpreter."""
    typed = Path(sys.argv[0])
    if typed.stem != "loralab":
        return f"{shlex.quote(sys.executable)} -m loralab"
    found = shutil.which("loralab")
    on_path = found is not None and Path(found).resolve() == typed.resolve()
    return "loralab" if on_path else shlex.quote(sys.argv[0])
