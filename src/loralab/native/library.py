"""The C files beside this one, compiled once for this very machine and called through ctypes.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.atomic import cache_folder
from loralab.errors import ConfigError, nearest

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.[ch]")))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fopenmp", "-fPIC")
SWITCH, ON, OFF = "LORALAB_NATIVE", "on", "off"
PATIENCE = 60  # seconds a compiler may take
# pointer, long, float; every function ends with the number of threads, an int
SIGNATURES = {
    "rms_norm": "ppppllf",
    "rms_norm_backward": "pppppll",
    "swiglu": "pppl",
    "swiglu_backward": "pppppl",
    "rotate_in": "pppplllllf",
    "rotate_out": "pppplllllf",
    "heads_first": "ppllll",
    "heads_last": "ppllll",
    "softmax": "pppllll",
    "softmax_backward": "ppll",
    "cross_entropy": "pppll",
    "nf4_moved": "pppppllll",
}
DOTS = {  # of the files that need the processor's own dot products
    "attention": "pppppppplllllf",
    "attention_backward": "pppppppppppppplllllf",
    "low_down": "ppplllllllf",
    "low_up": "ppplllllll",
    "low_outer": "ppplllllll",
    "low_many": "lpl",
    "llama_step": "pp",
}
C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


class SkinnyGemm(NamedTuple):
    """One of lowrank.c's products: x (N, W) dense, M (R, W) of any strides, low (N, R or more)."""

    x: Tensor
    M: Tensor
    low: Tensor
    start: int = 0  # the first of the R columns of `low`
    scale: float = 1.0


class _Thin(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "m", "low")],
        *[(name, ctypes.c_int64) for name in ("n", "width", "r", "sr", "sw", "stride", "offset")],
        ("scale", ctypes.c_double),
    ]


class Kernels:
    """The compiled functions; tensors are passed as their addresses, so they must be dense.

    `dots` is whether those of attention.c, lowrank.c and serve.c are among them, which need AVX-512
    with bfloat16; `tiles` whether attention and a serving step may use matrix registers (AMX).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Callable[..., None]] = {}
        self.dots, self.tiles = bool(library.has_dots()), bool(library.has_tiles())
        for name, letters in (SIGNATURES | (DOTS if self.dots else {})).items():
            function = getattr(library, name)
            function.argtypes = [*(C_TYPES[letter] for letter in letters), ctypes.c_int]
            function.restype = None
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Tensor | float | None) -> None:
        """Run one of the functions on dense tensors and numbers."""
        assert all(not isinstance(a, Tensor) or a.is_contiguous() for a in arguments)
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self._functions[name](*plain, torch.get_num_threads())

    def skinny_gemms(self, kind: str, products: Sequence[SkinnyGemm]) -> None:
        """Run one of lowrank.c's for many products that do not write to the same place."""
        rows = [
            _Thin(
                x.data_ptr(),
                M.data_ptr(),
                low.data_ptr(),
                *x.shape,
                M.shape[0],
                *M.stride(),
                low.stride(0),
                start,
                scale,
            )
            for x, M, low, start, scale in products
        ]
        found = (_Thin * len(rows))(*rows)
        number = ("down", "up", "outer").index(kind)
        address = ctypes.addressof(found)
        self._functions["low_many"](number, address, len(found), torch.get_num_threads())

    def addressed(self, name: str, *addresses: int) -> None:
        """Run one of the functions on structures of the caller's."""
        self._functions[name](*addresses, torch.get_num_threads())

    def skinny_gemm(self, name: str, x: Tensor, M: Tensor, low: Tensor, start: int, *scale: float) -> None:
        """Run one of lowrank.c's: x (N, W) dense, M (R, W) of any strides, low (N, R or more)."""
        n, width = x.shape
        self._functions[name](
            x.data_ptr(),
            M.data_ptr(),
            low.data_ptr(),
            n,
            width,
            M.shape[0],
            *M.stride(),
            low.stride(0),
            start,
            *scale,
            torch.get_num_threads(),
        )


def kernels_for(x: Tensor) -> Kernels | None:
    """Return the compiled functions, if they can take tensors like this one: bf16 on the processor."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    return kernels()


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Return the compiled functions; None where they cannot be had.

    Raises:
        ConfigError: LORALAB_NATIVE is neither on nor off.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not _is_wanted() or compiler is None:
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None  # no such flag, no place to write, another OpenMP than torch's


def _is_wanted() -> bool:
    """Return whether LORALAB_NATIVE leaves the compiled functions on, as they are unless it says off."""
    asked = os.environ.get(SWITCH, ON)
    if asked not in (ON, OFF):
        raise ConfigError(
            f"{SWITCH} must be {ON} or {OFF}, got {asked!r}{nearest(asked, (ON, OFF))}",
            code="wrong_value",
            field=SWITCH,
        )
    return asked == ON


def _built(compiler: str) -> Path:
    """Return the shared library, made if this source was not compiled here before."""
    library = cache_folder() / "native" / f"{_digest(compiler)}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        parts = {file: Path(folder) / f"{file.stem}.o" for file in SOURCES if file.suffix == ".c"}
        for file, part in parts.items():
            _run(compiler, *FLAGS, "-c", str(file), "-o", str(part))
        made = Path(folder) / "native.so"
        # without -fopenmp, which would link another OpenMP library than torch's
        _run(compiler, "-shared", *map(str, parts.values()), "-o", str(made))
        made.replace(library)
    return library


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)


def _digest(compiler: str) -> str:
    """Digest all that the machine code depends on: source, flags, compiler and processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=PATIENCE).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    processor = next((line for line in lines if line.startswith("flags")), platform.processor())
    model = next((line for line in lines if line.startswith("model name")), "")
    sources = [file.read_bytes() for file in SOURCES]
    parts = (*sources, " ".join(FLAGS).encode(), version, processor.encode(), model.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
