"""Output tokens a second of a mixed batch, every request its own adapter out of ten; seconds to read long prompts.

SmolLM2-135M in bfloat16, LoRA r=8 on its seven projections, greedy: prompts of 32 random tokens with 64
new ones, and prompts of 512 and 4,096 tokens with one. loralab's engine against transformers' generate
on a PeftModel, and against vLLM where a Python that has it is named (its requirements exclude ours).
All sides answer the same batch in turn, several times. Beside that ours alone: 64 adapters in a batch
of 64, ranks from 1 to 256, one adapter against the same one merged, and the time from disk to the first
token of a thousand adapters with 64 places in memory.

    python benchmarks/serve.py [--pairs 5] [--batches 1 8 32] [--vllm PYTHON] [--thousand 1000]
        [--json FILE]
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from serve_sides import ADAPTERS
from sides import finish, parser, ratios, shown, spread, table

SIDES_FILE = Path(__file__).with_name("serve_sides.py")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 8)
DECODING = {"prompt": 32, "new": 64}
PREFILL = ((1, 512), (8, 512), (1, 4096))  # prompts, tokens of each
OWN = {  # ours alone: what is asked, and against what
    "10 adapters": ("ours", "mixed", 32),
    "one adapter": ("ours", "one", 32),
    "one adapter, merged": ("merged", "none", 32),
    "ranks 1 to 256": ("ours", "ranks", 32),
    "64 adapters": ("ours", "many", 64),
    "no adapter, 64": ("ours", "none", 64),
}


class Side:
    """A server in a process of its own."""

    def __init__(self, side: str, folder: Path, python: str = sys.executable) -> None:
        self._process = subprocess.Popen(
            [python, str(SIDES_FILE), side, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def tokens_per_second(self, rows: int, mode: str, seed: int) -> float:
        """Return the tokens that it writes in a second, of one batch."""
        found = self._ask(rows=rows, mode=mode, seed=seed, **DECODING)
        return float(found["tokens"] / found["seconds"])

    def seconds_to_first(self, rows: int, length: int, mode: str, seed: int) -> float:
        """Return how long it takes to read some prompts."""
        return float(self._ask(rows=rows, mode=mode, seed=seed, prompt=length, new=1)["seconds"])

    def _ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended early, with exit code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def write_model(folder: Path) -> None:
    """Write the base, and the same with an adapter merged into it."""
    from loralab.models.load import load
    from loralab.models.source import resolve

    shutil.copytree(resolve("smollm2-135m"), folder / "model")
    base = load(str(folder / "model"), dtype=torch.bfloat16)
    write_adapters(base.model, folder / "store")
    import loralab

    adapter = loralab.load(base.model, folder / "store" / "mixed-0")
    adapter.merge_and_detach().save_pretrained(folder / "merged")
    base.tokenizer.save_pretrained(folder / "merged")


def write_adapters(model: Any, store: Path) -> None:
    """64 adapters of rank 8, and ten of ranks from 1 to 256; random, and not at their start."""
    from loralab import LoRA, attach

    for name, ranks in (("mixed", (8,) * 64), ("ranks", RANKS)):
        for number, rank in enumerate(ranks):
            adapter = attach(model, LoRA(rank=rank))
            draw = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
            adapter.save(store / f"{name}-{number}")
            adapter.detach()


def write_thousand(folder: Path, count: int) -> None:
    """As many adapters of about 5 MB: those of rank 4 in fp32, each with a digest of its own."""
    from loralab import LoRA, attach
    from loralab.models.load import load

    model = load(str(folder / "model"), dtype=torch.bfloat16).model
    adapter = attach(model, LoRA(rank=4))
    first = adapter.parameters()[0]
    for number in range(count):
        with torch.no_grad():
            first.fill_(number / count)
        adapter.save(folder / "thousand" / f"a{number:04d}")


def compared(
    sides: Mapping[str, Side], batches: Sequence[int], pairs: int
) -> dict[tuple[int, str], dict[str, list[float]]]:
    """Tokens a second of every side in turn, for each batch without and with adapters."""
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for rows in batches:
        for mode in ("none", "mixed"):
            own: dict[str, list[float]] = {name: [] for name in sides}
            for trial in range(pairs + 1):
                for name, side in sides.items():
                    speed = side.tokens_per_second(rows, mode, 1000 * rows + trial)
                    if trial:  # the first one builds what the others find ready
                        own[name].append(speed)
                        print(f"  {rows} {mode} {name}: {speed:.0f}", file=sys.stderr)
            found[rows, mode] = own
    return found


def prefill(sides: Mapping[str, Side], pairs: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds that every side needs to read long prompts, in turn, without and with adapters."""
    found: dict[str, dict[str, list[float]]] = {}
    for rows, length in PREFILL:
        for mode in ("none", "mixed"):
            own: dict[str, list[float]] = {name: [] for name in sides}
            for trial in range(pairs + 1):
                for name, side in sides.items():
                    seconds = side.seconds_to_first(rows, length, mode, 7000 * rows + trial)
                    if trial:
                        own[name].append(seconds)
                        print(f"  {rows} x {length} {mode} {name}: {seconds:.2f} s", file=sys.stderr)
            found[f"{rows} x {length} {mode}"] = own
    return found


def prefill_rows(found: Mapping[str, Mapping[str, list[float]]]) -> list[list[str]]:
    """Return the rows of the table of prompts."""
    rows = []
    for what, own in found.items():
        row = [what, shown(spread(own["loralab"]), 2)]
        for name, theirs in own.items():
            if name != "loralab":
                row += [shown(spread(theirs), 2), shown(ratios(theirs, own["loralab"]))]
        rows.append(row)
    return rows


def alone(folder: Path, pairs: int) -> dict[str, list[float]]:
    """Time loralab alone in several uses, in turn."""
    sides = {name: Side(name, folder) for name in ("ours", "merged")}
    found: dict[str, list[float]] = {name: [] for name in OWN}
    found["no adapter"] = []
    uses = {"no adapter": ("ours", "none", 32), **OWN}
    for trial in range(pairs + 1):
        for name, (side, mode, rows) in uses.items():
            speed = sides[side].tokens_per_second(rows, mode, 50_000 + trial)
            if trial:
                found[name].append(speed)
    for side in sides.values():
        side.close()
    return found


def cold(folder: Path, count: int) -> dict[str, Any]:
    """Return the result of serve_sides.py's `loads`, in a fresh process."""
    write_thousand(folder, count)
    done = subprocess.run(
        [sys.executable, str(SIDES_FILE), "loads", str(folder)], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def against(found: Mapping[tuple[int, str], Mapping[str, list[float]]]) -> list[list[str]]:
    """Rows of the first table."""
    rows = []
    for (size, mode), own in found.items():
        ours = own["loralab"]
        row = [str(size), "none" if mode == "none" else f"{ADAPTERS} mixed", shown(spread(ours), 0)]
        for name, theirs in own.items():
            if name != "loralab":
                row += [shown(spread(theirs), 0), shown(ratios(ours, theirs))]
        rows.append(row)
    return rows


def main() -> None:
    """Write the models, run the sides in turn, print the tables."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--vllm", help="a Python that has vLLM")
    options.add_argument("--thousand", type=int, default=1000, help="adapters to load; 0 is none")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        sides = {"loralab": Side("ours", folder), "peft": Side("peft", folder)}
        if chosen.vllm:
            sides["vLLM"] = Side("vllm", folder, chosen.vllm)
        found = compared(sides, chosen.batches, chosen.pairs)
        read = prefill(sides, chosen.pairs)
        for side in sides.values():
            side.close()
        own = alone(folder, chosen.pairs)
        thousand = cold(folder, chosen.thousand) if chosen.thousand else {}
    head = ["batch", "adapters", "loralab"]
    head += [part for name in sides if name != "loralab" for part in (name, f"ours / {name}")]
    text = table("Output tokens a second, median (range)", head, against(found))
    head = ["prompts", "loralab"]
    head += [part for name in sides if name != "loralab" for part in (name, f"{name} / ours")]
    text += "\n" + table("Seconds to the first token, median (range)", head, prefill_rows(read))
    base = own["no adapter"]
    pairs = {
        "10 adapters, batch 32": (own["10 adapters"], base, "no adapter"),
        "one adapter, batch 32": (own["one adapter"], own["one adapter, merged"], "merged"),
        "ranks 1 to 256, batch 32": (own["ranks 1 to 256"], base, "no adapter"),
        "64 adapters, batch 64": (own["64 adapters"], own["no adapter, 64"], "no adapter"),
    }
    rows = [[what, shown(spread(a), 0), f"{shown(ratios(a, b))} of {of}"] for what, (a, b, of) in pairs.items()]
    text += "\n" + table("Ours alone", ["use", "tokens/s", "ratio"], rows)
    if thousand:
        text += "\n" + loaded(thousand)
    result = {
        "pairs": chosen.pairs,
        "prefill": read,
        "alone": own,
        "loads": thousand,
        "compared": {f"{size} {mode}": sides_ for (size, mode), sides_ in found.items()},
    }
    finish(text, result, chosen.json)


def loaded(thousand: Mapping[str, Any]) -> str:
    """Return the table of loads."""
    cold_ms, memory = thousand["cold_ms"], thousand["rss_mb"]
    rows = [
        ["from disk to the first token, beyond a resident one's", f"{shown(spread(cold_ms), 1)} ms"],
        ["of a resident one", f"{shown(spread(thousand['warm_ms']), 1)} ms"],
        ["bytes of an adapter", f"{thousand['bytes'] / 1e6:.1f} MB"],
        ["loads, evictions", f"{thousand['loads']}, {thousand['evictions']}"],
        ["memory after each hundred", ", ".join(f"{value:.0f}" for value in memory) + " MB"],
        ["of loads below 30 ms", f"{statistics.fmean(ms <= 30 for ms in cold_ms):.1%}"],
    ]
    return table(f"{thousand['adapters']} adapters, 64 places", ["", ""], rows)


if __name__ == "__main__":
    main()
