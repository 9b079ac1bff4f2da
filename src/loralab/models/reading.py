"""Weights from disk into memory without a second copy, and without threads that wait for each other.

transformers maps a file of weights. Where they are kept in the file's own dtype the model stands on
the mapping, and processes share its pages. Where they are cast, each page of the file would stay in
memory beside what was made of it until all are read; plain reads keep one tensor at a time.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import modeling_utils

from loralab.lanes import threads
from loralab.models.weights import DTYPES

_one_at_a_time = threading.RLock()  # what is changed for a while is the whole process's


@contextlib.contextmanager
def lean_reading(dtype: torch.dtype) -> Iterator[None]:
    """Let transformers read files of weights plainly where it will cast them to another dtype.

    Its loading threads cast side by side, each alone: torch's own would wait for each other.
    """
    with _one_at_a_time:
        usual = modeling_utils.safe_open
        modeling_utils.safe_open = _plainly(usual, dtype)
        try:
            with threads(1):
                yield
        finally:
            modeling_utils.safe_open = usual


def _plainly(usual: Any, dtype: torch.dtype) -> Any:
    """Return what opens a file as `usual` does, without a mapping where it will be cast."""

    def opened(file: Any, *places: Any, **options: Any) -> Any:
        found = usual(file, *places, **options)
        if options.get("backend") != "mmap" or not _is_cast(found, dtype):
            return found
        return usual(file, *places, **{**options, "backend": "pread"})

    return opened


def _is_cast(file: Any, dtype: torch.dtype) -> bool:
    """Return whether an open file of weights holds numbers of another dtype than they will have."""
    stored = {DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118  (no mapping)
    return any(kept is not None and kept.is_floating_point and kept != dtype for kept in stored)
