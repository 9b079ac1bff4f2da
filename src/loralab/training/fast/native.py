"""native.c, compiled once for this very machine and called through ctypes.

Where there is no C compiler, or LORALAB_NATIVE=off, `kernels()` is None and torch does the same
work in more passes over memory. Nothing but the standard C library is needed to compile.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from loralab.models.convert import cache_folder

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
PATIENCE = 60  # seconds a compiler may take
# pointer, long, float; every function ends with the number of threads, an int
SIGNATURES = {
    "rms_norm": "ppppllf", "rms_norm_backward": "pppppll", "swiglu": "pppl",
    "swiglu_backward": "pppppl", "rotate_in": "pppplllllf", "rotate_out": "pppplllllf",
    "heads_first": "ppllll", "heads_last": "ppllll", "softmax": "pppllll",
    "softmax_backward": "ppll", "cross_entropy": "pppll",
}  # fmt: skip
C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


class Kernels:
    """The compiled functions; tensors are passed as their addresses, so they must be dense."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Callable[..., None]] = {}
        for name, letters in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [*(C_TYPES[letter] for letter in letters), ctypes.c_int]
            function.restype = None
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Tensor | float) -> None:
        """Run one of native.c's functions on dense tensors and numbers."""
        assert all(not isinstance(a, Tensor) or a.is_contiguous() for a in arguments)
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self._functions[name](*plain, torch.get_num_threads())


def kernels_for(x: Tensor) -> Kernels | None:
    """The compiled functions, if they can take tensors like this one: bf16 on the processor."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    return kernels()


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """The compiled functions; None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("LORALAB_NATIVE", "on") == "off":
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None  # no such flag, no place to write, another OpenMP than torch's


def _built(compiler: str) -> Path:
    """The shared library, made if this source was not compiled here before."""
    library = cache_folder() / "native" / f"{_digest(compiler)}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        steps = Path(folder) / "native.o", Path(folder) / "native.so"
        _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", str(steps[0]))
        _run(compiler, "-shared", str(steps[0]), "-o", str(steps[1]))  # -fopenmp would link it
        steps[1].replace(library)
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def _digest(compiler: str) -> str:
    """Of all that the machine code depends on: source, flags, compiler and processor."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=PATIENCE
    ).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    processor = next((line for line in lines if line.startswith("flags")), platform.processor())
    model = next((line for line in lines if line.startswith("model name")), "")
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), version, processor.encode(),
             model.encode())  # fmt: skip
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
