"""A training run and its memory: before the model, once it is loaded, and while it takes steps.

A process that has peaked while loading hides what its steps need. So the kernel's high-water mark
is noted when loading is done, and counted anew from there.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import torch

from loralab.models.device import device_here
from loralab.studies.study import Record, Trial
from loralab.studies.trained import Tell, forget, trained
from loralab.training.memory import held_bytes, peak_bytes
from loralab.training.record import read_metrics

MEASURE_PEAKS = "loralab.studies.measures.peaks:measure"
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MARK = "VmHWM:"  # the most memory that was resident, in kB


def measure(trial: Trial, folder: Path, tell: Tell) -> Record:
    """Train, and note the memory and the time of the steps and of what was before them."""
    gauge = Gauge(tell)
    run = trained(trial, folder, gauge)
    events = [e for e in read_metrics(folder / "run") if e["kind"] == "step"]
    times = [float(e["seconds"]) for e in events]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    numbers = {
        **gauge.numbers(),
        "parameters": float(run.adapter.num_parameters),
        "step_seconds": float(torch.tensor(gaps or times).median()),
        "seconds": times[-1],
        "tokens": float(run.tokens),
    }
    forget(folder, 0)
    series = {"loss": [float(e["loss"]) for e in events], "step_seconds": gaps or times}
    return trial.record(numbers=numbers, series=series)


class Gauge:
    """Listener to a run: the peak so far when loading is done, and the peak of the steps alone."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._device = tell, device_here()
        self._start = held_bytes(self._device)
        self._loading = self._held = self._steps = 0
        self._apart = False

    def __call__(self, event: dict[str, Any]) -> None:
        """Note what an event stands for, and pass it on."""
        if event["kind"] == "plan":
            self._loading, self._held = peak_bytes(self._device), held_bytes(self._device)
            self._apart = reset_peak(self._device)
        elif event["kind"] == "step":
            self._steps = peak_since(self._device)
        self._tell(event)

    def numbers(self) -> dict[str, float]:
        """Return bytes: `peak_bytes` of the whole run; `steps_bytes` only where it can be told apart."""
        found = {"start_bytes": self._start, "loading_bytes": self._loading, "held_bytes": self._held}
        found["peak_bytes"] = max(self._loading, self._steps)
        found |= {"steps_bytes": self._steps} if self._apart else {}
        return {name: float(size) for name, size in found.items()}


def reset_peak(device: torch.device) -> bool:
    """Count the peak anew from what is held now; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        RESET.write_text("5", encoding="ascii")
        return math.isfinite(_mark())
    except OSError:
        return False


def peak_since(device: torch.device) -> int:
    """Return the peak since it was last counted anew; since the start where it never was."""
    mark = math.nan if device.type == "cuda" else _mark()
    return int(mark) if math.isfinite(mark) else peak_bytes(device)


def _mark() -> float:
    """Return the kernel's high-water mark in bytes; not a number on other systems."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return math.nan
    found = [line.split()[1] for line in lines if line.startswith(MARK)]
    return 1024.0 * int(found[0]) if found else math.nan
