"""Two sides that step in turn, each in a process of its own, so that both meet the same machine.

A benchmark starts its own file again as workers. A worker calls its `Turn` after each step; it
answers with a line of JSON and waits until it is told to go on. Beside that: medians with ranges,
the machine in words, texts to train on, the JSON file.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, float]
Turn = Callable[[Figures], None]  # told how many tokens have been seen so far
TEXTS = {  # median of a log-normal, its sigma, the longest row, the share that carries loss
    "mixed": (90, 0.8, 512, 0.4),
    "short": (38, 0.25, 90, 0.45),
}


class Worker:
    """A process that steps when it is told to."""

    def __init__(self, file: str, options: Sequence[str], preload: str = "") -> None:
        environment = os.environ | ({"LD_PRELOAD": preload} if preload else {})
        self._process = subprocess.Popen(
            [sys.executable, file, *options], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self) -> Figures:
        """The figures of the step that it has just made."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended early, with exit code {self._process.wait()}")
        found: Figures = json.loads(line)
        return found

    def step(self) -> Figures:
        """Let it make one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End it, wherever it is."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def in_turn(sides: Mapping[str, Callable[[], Worker]], pairs: int, warm_up: int) -> dict[str, list[Figures]]:
    """The figures of so many steps of every side, those of the warm-up left out."""
    workers: dict[str, Worker] = {}
    counted: dict[str, list[Figures]] = {name: [] for name in sides}
    try:
        for name, start in sides.items():
            workers[name] = start()
            workers[name].read()  # its first step, before the next one is started
        for number in range(1, warm_up + pairs):
            for name, worker in workers.items():
                figures = worker.step()
                if number >= warm_up:
                    counted[name].append(figures)
                    print(f"  {name}: {figures['seconds']:.2f} s", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
    return counted


def answering() -> Turn:
    """In a worker: what it calls after each step. What libraries print goes elsewhere."""
    from loralab.models.device import device_here
    from loralab.training.memory import peak_bytes

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state = {"since": time.perf_counter(), "tokens": 0.0}

    def turn(figures: Figures) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step is over when the GPU has done it
        seconds = time.perf_counter() - state["since"]
        tokens = figures["tokens"] - state["tokens"]
        line = {"seconds": seconds, "tokens": tokens, "peak": peak_bytes(device_here())}
        print(json.dumps(line), file=answers, flush=True)
        sys.stdin.readline()
        state.update(since=time.perf_counter(), tokens=figures["tokens"])

    return turn


def write_rows(file: Path, texts: str, rows: int) -> None:
    """Prompts and completions of random common words; a word is about one token."""
    median, sigma, longest, labelled = TEXTS[texts]
    words = ["the", "a", "film", "time", "people", "way", "day", "man", "woman", "life", "world"]
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            # the chat template adds about 30 tokens
            length = round(draw.lognormvariate(0, sigma) * median) - 30
            text = draw.choices(words, k=min(longest - 60, max(8, length)))
            cut = round(len(text) * (1 - labelled))
            row = {"prompt": " ".join(text[:cut]), "completion": " ".join(text[cut:])}
            out.write(json.dumps(row) + "\n")


def spread(values: Sequence[float]) -> Figures:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Figures:
    """Median and range of the ratios of what was measured one after the other."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def shown(figures: Figures, digits: int = 2) -> str:
    """ "7.05 (3.01 - 16.42)"."""
    middle, least, most = (f"{figures[k]:,.{digits}f}" for k in ("median", "least", "most"))
    return f"{middle} ({least} - {most})"


def machine() -> str:
    """Processor, cores, threads and library, as a table's caption."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = [li for li in information.read_text().splitlines() if li.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    abilities = torch.cpu.get_capabilities()
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if abilities.get(kind)]
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}; {name}"
    return (
        f"{name} ({kinds[0] if kinds else 'no vectors'}), {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A title and a table in Markdown."""
    lines = [[*map(str, head)], ["---"] * len(head), *([*map(str, row)] for row in rows)]
    return "\n".join([title, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    found = argparse.ArgumentParser(description=(documentation or "").splitlines()[0])
    found.add_argument("--json", type=Path, help="write the figures here too")
    return found


def finish(text: str, result: Mapping[str, Any], file: Path | None) -> None:
    """Print the table, and write the figures with their machine."""
    print(text)
    print(machine())
    if file is not None:
        content = {"machine": machine(), **result}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(
    title: str, rows: Sequence[Mapping[str, object]], results: Sequence[Mapping[str, Any]], file: Path | None
) -> None:
    """Print rows of named columns as a table, and write the results."""
    finish(table(title, list(rows[0]), [list(row.values()) for row in rows]), {"results": results}, file)
