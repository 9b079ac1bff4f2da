"""loralab on a GPU: agreement with the plain model, and training steps against peft + Trainer.

Each part runs in a process of its own with a time limit, so that none takes another down, and all
of them end within six minutes (`--seconds`). Models have random weights in real shapes: nothing is downloaded.

    agreement  loss and gradient of each forward path against the plain model, rows of mixed length
    profile    kernels of a step, and milliseconds until they are launched and until they are done
    methods    loss and gradient of each method on the GPU against fp32 on the processor, then a
               training run of a few steps
    tests      the tests of adapters, training and serving as they stand, where pytest is installed
    train      tokens a second and peak memory of training steps, loralab and its peers in turn, and the
               share of the rate of a large product that its layers reach
    qlora      the same at the largest shape with a base in NF4
    decode     tokens a second of batches of 1 to 128 rows with ten adapters, against peft's generate

    python benchmarks/gpu.py [--parts agreement profile methods tests train qlora decode] [--shapes 135m 1b 8b]
        [--seconds 340] [--json FILE] [--device cpu] [--tiny]

Without a GPU it says so and ends with exit code 2, unless --device cpu is given.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_models import PRECISIONS, SHAPES, biased, fill, language_model, ragged, trained
from gpu_speed import decoding, profiled, step_in_turn, train_shape
from sides import answering, finish, parser, shown, table, write_rows

SECONDS = 340  # for everything
LIMITS = {  # seconds; of a shape
    "agreement": 60,
    "profile": 40,
    "train": 100,
    "qlora": 100,
    "decode": 100,
    "methods": 90,
    "tests": 60,
}
FEW = ("lora", "adalora", "prefix")  # methods of a trial
Line = dict[str, Any]


# -- agreement ------------------------------------------------------------------------------------


def agreement(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Loss, gradient, time and memory of each forward path, beside those of the plain model."""
    from loralab import LoRA, attach
    from loralab.training.fast.forward_path import MODES, fastest_path, gradient_of

    for precision, dtype in PRECISIONS.items():
        model = language_model("tiny" if tiny else "135m", dtype, device)
        adapter = attach(model, LoRA(rank=8), generator=torch.Generator().manual_seed(0))
        fill(adapter)
        path = fastest_path(adapter, "causal-lm", pad_id=2)
        chosen, graphs, expected = path.mode, path.graphs, None
        for way in (*reversed(MODES), "graphed"):
            line: Line = {"precision": precision, "case": way, "chosen": way == chosen}
            if way == "graphed" and graphs is None:
                continue
            try:
                path.mode = "packed" if way == "graphed" else way
                path.graphs = graphs if way == "graphed" else None
                rows, found, cost = ragged(model, tiny), None, Cost(device)
                for _ in range(1 if tiny else 3):
                    cost.begin()
                    with path.activated():
                        found = gradient_of(path.loss(rows), adapter)
                    cost.end()
                expected = expected or found
                assert found is not None
                yield line | compared(expected, found, dtype) | cost.figures() | unused(path.graphs)
            except Exception:
                yield line | failed()


def unused(graphs: Any) -> Line:
    """Say why a pass was not replayed, which is no fault where it is slower so."""
    return {} if graphs is None or not graphs.refused else {"ok": False, "error": f"no graph: {graphs.refused}"}


class Cost:
    """Milliseconds and peak memory of what is done between `begin` and `end`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds, self._since = device, float("inf"), 0.0

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._since = time.perf_counter()

    def end(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds = min(self._seconds, time.perf_counter() - self._since)

    def figures(self) -> Line:
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {"milliseconds": 1e3 * self._seconds, "peak_bytes": peak}


def compared(
    expected: tuple[torch.Tensor, torch.Tensor], found: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> Line:
    """Relative differences of a loss and a gradient, and whether rounding explains them."""
    from loralab.training.fast.forward_path import GRADIENT_TOLERANCES, LOSS_TOLERANCES

    (loss, gradient), (own_loss, own) = [[t.cpu().double() for t in pair] for pair in (expected, found)]
    off_loss = float((own_loss - loss).abs() / loss.abs())
    off = float((own - gradient).norm() / gradient.norm())
    agrees = off_loss <= LOSS_TOLERANCES[dtype] and off <= GRADIENT_TOLERANCES[dtype]
    return {"ok": agrees, "loss_difference": off_loss, "gradient_difference": off}


# -- methods --------------------------------------------------------------------------------------


def configurations() -> dict[str, Any]:
    """Every method, and the options of LoRA that compute something else."""
    from loralab.adapters import methods as m

    return {
        "lora": m.LoRA(rank=2),
        "rslora": m.LoRA(rank=2, scaling="alpha/sqrt(r)"),
        "dora": m.LoRA(rank=2, dora=True),
        "pissa": m.LoRA(rank=2, init="pissa"),
        "embeddings": m.LoRA(rank=2, target_modules=("lm_head", "embed_tokens")),
        "adalora": m.AdaLoRA(rank=4, target_rank=2),
        "houlsby": m.Bottleneck(width=4),
        "parallel": m.Bottleneck(width=4, placement="parallel"),
        "prefix": m.Prefix(tokens=3, mlp=True),
        "prompt": m.Prompt(tokens=3),
        "ia3": m.IA3(),
        "bitfit": m.BitFit(),
        "full": m.FullFineTune(),
    }


def methods(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Loss and gradient of each method against fp32 on the processor, then a short run."""
    precisions = ["fp32"] if tiny else list(PRECISIONS)
    chosen = {n: c for n, c in configurations().items() if not tiny or n in FEW}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, "short", 60)
        for name, config in chosen.items():
            for precision in precisions:
                line: Line = {"case": name, "precision": precision}
                try:
                    found = on_both(config, PRECISIONS[precision], device)
                    trained = few_steps(config, precision, data, Path(folder) / name / precision)
                    yield line | found | {"loss": trained}
                except Exception:
                    yield line | failed()


def on_both(config: Any, dtype: torch.dtype, device: torch.device) -> Line:
    """Loss and gradient of one adapter on the device, against fp32 on the processor."""
    from loralab import attach
    from loralab.training.fast.forward_path import fastest_path, gradient_of

    def side(kind: torch.dtype, place: torch.device) -> Any:
        model = biased(language_model("tiny", torch.float32, torch.device("cpu")))
        return attach(model.to(place, kind), config, generator=torch.Generator().manual_seed(0))

    plain = side(torch.float32, torch.device("cpu"))
    fill(plain)
    ours = side(dtype, device)
    ours.load_state(plain.state())
    rows = ragged(plain.model, tiny=True)
    results = []
    for adapter, quick in ((plain, False), (ours, True)):
        path = fastest_path(adapter, "causal-lm", pad_id=2)
        path.mode = path.mode if quick else "plain"
        with path.activated():
            results.append(gradient_of(path.loss(rows), adapter))
    return compared(results[0], results[1], dtype) | {"path": path.mode}


def few_steps(config: Any, precision: str, data: Path, folder: Path) -> float:
    """The validation loss after three steps of a run that is saved."""
    from loralab import Training
    from loralab.errors import ConfigError

    try:
        run = trained(
            "tiny", config, data, folder, None, Training(max_steps=3, batch_size=4, max_length=64, precision=precision)
        )
    except ConfigError:  # adalora does not train in fp16, and says so
        return float("nan")
    return float(run.scores["validation"].metrics["loss"])


# -- tests ----------------------------------------------------------------------------------------


def tests(device: torch.device, tiny: bool) -> Iterator[Line]:
    """The tests of three folders, as they stand; those that fail by name."""
    root = Path(__file__).parents[1]
    places = [root / "tests" / name for name in ("adapters", "training/fast", "serving")]
    places = places[:1] if tiny else places
    if importlib.util.find_spec("pytest") is None or not places[0].is_dir():
        yield {"case": "pytest", "ok": None, "reason": "pytest or the tests are not here"}
        return
    picked = ["-k", "test_skinny"] if tiny else ["-m", "not slow"]
    for place in places:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", "-W", "default"]
        command += [*picked, str(place)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        bad = [li.split(" - ")[0] for li in lines if li.startswith(("FAILED", "ERROR"))]
        yield {
            "case": place.relative_to(root).as_posix(),
            "ok": done.returncode == 0,
            "summary": lines[-1] if lines else done.stderr[-300:],
            "failed": bad,
        }


# -- all of it ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[torch.device, bool], Iterator[Line]]] = {
    "agreement": agreement,
    "profile": profiled,
    "methods": methods,
    "tests": tests,
    "decode": decoding,
}


def failed() -> Line:
    """The present exception, as a line of the result."""
    return {"ok": False, "error": traceback.format_exc(limit=-4)[-1500:]}


def run_part(part: str, chosen: argparse.Namespace, seconds: float, out: Path) -> list[Line]:
    """A part in a process of its own, ended after so many seconds; the lines that it wrote."""
    name, _, shape = part.partition(":")
    command = [sys.executable, __file__, "--part", part, "--out", str(out)]
    command += ["--device", chosen.device, *["--tiny"] * chosen.tiny]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if chosen.device == "cpu" else {}
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | hidden, start_new_session=True, stdout=sys.stderr)
    try:
        code: int | str = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        code = f"stopped after {seconds:.0f} s"
    finally:
        with_children_ended(process)
    written = out.read_text() if out.is_file() else ""
    lines = [json.loads(line) for line in written.split("\n")[:-1]]  # the last may be cut off
    if code != 0:
        lines.append({"case": "the part itself", "ok": False, "error": f"ended: {code}"})
    took = time.perf_counter() - begun
    print(f"{part}: {took:.0f} s", file=sys.stderr)
    return [{"part": name, "shape": shape} | line for line in lines]


def with_children_ended(process: "subprocess.Popen[bytes]") -> None:
    """End a part and the workers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def act(part: str, chosen: argparse.Namespace) -> None:
    """In a part's own process: write its lines as they come."""
    name, _, shape = part.partition(":")
    device = torch.device(chosen.device)
    if name in ("train", "qlora"):
        lines = train_shape(shape, *((1, 1) if chosen.tiny else (6, 40)), "none" if name == "train" else "nf4")
    else:
        lines = PARTS[name](device, chosen.tiny)
    with Path(chosen.out).open("a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), file=file, flush=True)


def rows_of(lines: Sequence[Line]) -> list[list[object]]:
    """The lines as rows of the table."""
    return [
        [
            li["part"],
            li.get("shape", ""),
            li.get("case", ""),
            li.get("precision", ""),
            {True: "ok", False: "FAILED", None: "-"}[li.get("ok")],
            told(li),
        ]
        for li in lines
    ]


def told(line: Line) -> str:
    """The figures of a line in a few words."""
    if "speed_ratio" in line:
        rates = {side: shown(f, 0) for side, f in line["tokens_per_second"].items()}
        both = " : ".join(rates.values())
        peaks = " : ".join(f"{b / 1e9:.2f}" for b in line.get("peak_bytes", {}).values())
        reached = line.get("share_of_rate")
        return f"{both} tokens/s, ratio {shown(line['speed_ratio'])}" + (
            (f"; peak {peaks} GB" if peaks else "") + (f"; {reached:.0%} of the rate" if reached else "")
        )
    if "error" in line:
        return str(line["error"]).strip().splitlines()[-1][:120]
    if "summary" in line:
        return str(line["summary"])
    figures = {
        "kernels": "kernels",
        "launched ms": "launched_milliseconds",
        "loss off": "loss_difference",
        "gradient off": "gradient_difference",
        "ms": "milliseconds",
        "loss": "loss",
    }
    return ", ".join(f"{k} {line[v]:.3g}" for k, v in figures.items() if line.get(v) is not None)


def versions(device: str) -> dict[str, str]:
    """The machine's libraries and its GPU."""
    import transformers

    import loralab

    return {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "loralab": loralab.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def options() -> argparse.Namespace:
    """The command line."""
    known = parser(__doc__)
    known.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    known.add_argument("--tiny", action="store_true", help="tiny shapes, few steps: a trial")
    known.add_argument("--parts", nargs="+", choices=[*LIMITS], default=[*LIMITS])
    known.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["135m", "1b", "8b"])
    known.add_argument("--seconds", type=float, default=SECONDS, help="for everything; the last parts may be cut short")
    known.add_argument("--part", help=argparse.SUPPRESS)
    known.add_argument("--out", help=argparse.SUPPRESS)
    known.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    return known.parse_args()


def main() -> int:
    chosen = options()
    if chosen.worker:
        side, shape, data, steps, quantize = chosen.worker
        step_in_turn(side, shape, Path(data), int(steps), quantize, answering())
        return 0
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no GPU here; --device cpu --tiny tries the script without one", file=sys.stderr)
        return 2
    if chosen.part:
        act(chosen.part, chosen)
        return 0
    shapes = ["tiny"] if chosen.tiny else chosen.shapes
    own = {"train": [f"train:{s}" for s in shapes], "qlora": [f"qlora:{shapes[-1]}"]}
    parts = [one for part in chosen.parts for one in own.get(part, [part])]
    lines: list[Line] = []
    slack = 5 if chosen.tiny else 1  # a trial runs beside other work
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            left = slack * chosen.seconds - (time.perf_counter() - begun)  # parts that come late may be cut short
            limit = min(slack * LIMITS[part.partition(":")[0]], left)
            lines += run_part(part, chosen, limit, Path(folder) / f"{number}.jsonl")
    title = "loralab on a GPU" if chosen.device == "cuda" else "A trial on the processor"
    head = ("part", "shape", "case", "precision", "result", "figures")
    text = table(title, head, rows_of(lines))
    finish(text, {"versions": versions(chosen.device), "lines": lines}, chosen.json)
    return 1 if any(line.get("ok") is False for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
