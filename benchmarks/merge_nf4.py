"""What is left of a training once its adapter is merged into 4 bits: QLoRA against --merge-aware nf4.

SmolLM2-135M, LoRA r=8 on all linear layers, three seeds, each in a process of its own. The gain
kept is (loss of the NF4 base - loss of the merged NF4 model) / (loss of the NF4 base - loss of the
QLoRA adapter beside it), on the same validation rows. Beside QLoRA merged to the nearest level, as
before, it is merged to the nearest level from the full-precision base, and along the grid of its NF4
base, as `loralab merge --quantize nf4` does: that says what the training adds. No way is calibrated
on rows: without an update each of them gives the NF4 base. Times are of steps in turn.

    python benchmarks/merge_nf4.py [--data FILE] [--steps 40] [--rows 64] [--seeds 3] [--pairs 6]
        [--parts gain speed] [--at-once] [--json FILE]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import Turn, Worker, answering, finish, in_turn, parser, ratios, shown, spread, table, write_rows

MODEL, BATCH, LONGEST = "smollm2-135m", 4, 160
ARMS: dict[str, dict[str, Any]] = {"QLoRA": {"quantize": "nf4"}, "merge-aware": {"merge_aware": "nf4"}}
WARM_UP = 2


def trained(arm: str, data: str, place: Path, steps: int, seed: int, turn: Turn | None = None) -> Any:
    """Return a run without its certificate."""
    from loralab import LoRA, Training
    from loralab.training.request import Request
    from loralab.training.run import run_request

    def listen(event: dict[str, Any]) -> None:
        if turn is not None and event["kind"] == "step":
            turn({"tokens": event["tokens"]})

    options = {
        "max_steps": steps,
        "batch_size": BATCH,
        "max_length": LONGEST,
        "evaluation_rows": 1,
        "save_every": steps,
    }
    training = Training(**ARMS[arm], **options, seed=seed, learning_rate=1e-3)
    return run_request(Request.of(MODEL, data, LoRA(), training, None), place, listener=listen)


def losses(run: Any, rows: int, *, aware: bool) -> dict[str, float]:
    """Return the losses of one run's adapter: without it, beside the NF4 base, and merged in several ways."""
    import torch

    from loralab.artefacts import requantize
    from loralab.artefacts.merge_aware import packed_layers, put_on_grid, take_off_grid
    from loralab.models.load import load
    from loralab.models.quantize import NF4, QuantizedLinear
    from loralab.tasks.score import evaluate

    base, adapter = run.base, run.adapter
    layers = dict(packed_layers(adapter))
    dense = load(MODEL, kind=base.kind, dtype=torch.bfloat16).model

    def loss() -> float:
        found = evaluate(base.model, base.tokenizer, run.task, "validation", kind=base.kind, batch_size=16, limit=rows)
        return found.metrics["loss"]

    def rounded(full: bool) -> float:
        """Round base + update to the nearest level; of the full-precision base, or of the NF4 one."""
        for path, layer in layers.items():
            weight = dense.get_submodule(path).weight if full else layer.base.unpacked()
            merged = NF4((weight.float() + layer.delta()).to(weight.dtype))
            shape = (layer.out_features, layer.in_features)
            layer._packed, layer.merged = (layer.base,), True
            layer.base = QuantizedLinear(merged, layer.base.bias, shape, layer.base.compute_dtype)
        found = loss()
        adapter.unmerge()
        return found

    found = {"beside": loss()}
    if not aware:
        found |= {"rounded": rounded(False), "rounded_full": rounded(True)}
    put_on_grid(adapter)
    kept = requantize.retention(adapter)
    found |= {"thresholds": loss(), "retained": sum(kept.values()) / len(kept)}
    take_off_grid(adapter)
    adapter.detach()
    found["base"] = loss()
    return found


def work(data: str, steps: int, seed: int, rows: int) -> dict[str, Any]:
    """In a process of its own: train and score both arms."""
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for arm in ARMS:
            run = trained(arm, data, Path(place) / arm, steps, seed)
            found[arm] = losses(run, rows, aware=arm == "merge-aware")
            print(f"  {arm}, seed {seed}: {found[arm]}", file=sys.stderr, flush=True)
    return found


def asked(options: Any, data: str) -> list[dict[str, Any]]:
    """Return the answers of a fresh process for each seed."""
    command = [sys.executable, __file__, "--worker", "--data", data]
    command += ["--steps", str(options.steps), "--rows", str(options.rows), "--seed"]
    every = [[*command, str(seed)] for seed in range(options.seeds)]
    if options.at_once:
        started = [subprocess.Popen(own, stdout=subprocess.PIPE, text=True) for own in every]
        texts = [process.communicate()[0] for process in started]
    else:
        texts = [subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True).stdout for own in every]
    return [json.loads(text.splitlines()[-1]) for text in texts]


def gains(qlora: dict[str, float], aware: dict[str, float]) -> dict[str, float]:
    """Return the gain kept of each way to merge, over that of the QLoRA adapter unmerged."""
    base, gain = qlora["base"], qlora["base"] - qlora["beside"]
    ways = {name: qlora[name] for name in ("rounded", "rounded_full", "thresholds")}
    ways |= {"merge_aware": aware["thresholds"], "merge_aware_beside": aware["beside"]}
    return {name: (base - loss) / gain for name, loss in ways.items()}


NAMES = {
    "rounded": "QLoRA, NF4 base + update to the nearest level",
    "rounded_full": "QLoRA, full-precision base + update to the nearest level",
    "thresholds": "QLoRA, by thresholds",
    "merge_aware": "merge-aware, as `merge --quantize nf4` writes it",
    "merge_aware_beside": "merge-aware, unmerged",
}


def gained(options: Any, data: str) -> tuple[list[list[str]], dict[str, Any]]:
    """Return the table and the figures of the gain kept."""
    runs = asked(options, data)
    each = [gains(run["QLoRA"], run["merge-aware"]) for run in runs]
    means = {name: sum(own[name] for own in each) / len(each) for name in NAMES}
    rows = [[text, f"{means[name]:.2f}", " ".join(f"{own[name]:.2f}" for own in each)] for name, text in NAMES.items()]
    return rows, {"runs": runs, "gain_kept": {"each": each, "mean": means}}


def timed(options: Any, data: str) -> tuple[list[list[str]], dict[str, Any]]:
    """Return the table and the figures of steps in turn."""
    sides = {arm: lambda arm=arm: Worker(__file__, ["--side", arm, "--data", data]) for arm in ARMS}
    found = in_turn(sides, options.pairs, WARM_UP)
    seconds = {arm: [own["seconds"] for own in figures] for arm, figures in found.items()}
    ratio = ratios(seconds["merge-aware"], seconds["QLoRA"])
    peaks = {arm: max(own["peak"] for own in figures) for arm, figures in found.items()}
    rows = [
        ["time of a step, merge-aware : QLoRA", shown(ratio), ""],
        ["peak memory, merge-aware : QLoRA", f"{peaks['merge-aware'] / peaks['QLoRA']:.2f}", ""],
    ]
    figures = {"seconds": {arm: spread(own) for arm, own in seconds.items()}, "ratio": ratio, "peak": peaks}
    return rows, {"steps": figures}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="prompts and completions (default: random words)")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--rows", type=int, default=64, help="validation rows that are scored")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--pairs", type=int, default=6)
    options.add_argument("--parts", nargs="+", choices=["gain", "speed"], default=["gain", "speed"])
    options.add_argument("--at-once", action="store_true", help="train the seeds side by side")
    options.add_argument("--worker", action="store_true", help="(internal)")
    options.add_argument("--side", help="(internal)")
    options.add_argument("--seed", type=int, default=0, help="(internal)")
    chosen = options.parse_args()
    if chosen.worker:
        print(json.dumps(work(chosen.data, chosen.steps, chosen.seed, chosen.rows)))
        return
    if chosen.side:
        with tempfile.TemporaryDirectory() as place:
            trained(chosen.side, chosen.data, Path(place) / "run", 10_000, 0, answering())
        return
    with tempfile.TemporaryDirectory() as place:
        data = chosen.data or str(Path(place) / "rows.jsonl")
        if not chosen.data:
            write_rows(Path(data), "short", 400)
        parts = {"gain": gained, "speed": timed}
        done = [parts[name](chosen, data) for name in chosen.parts]
    rows = [row for found, _ in done for row in found]
    figures = {key: value for _, own in done for key, value in own.items()}
    title = f"SmolLM2-135M merged into NF4, {chosen.steps} steps of {BATCH} rows, {chosen.seeds} seeds"
    finish(
        table(title, ("", "mean or median", "each"), rows),
        {"data": chosen.data or "random words", **figures},
        chosen.json,
    )


if __name__ == "__main__":
    main()
