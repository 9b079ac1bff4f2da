"""Copies of adapters as vLLM reads them, made once and cached under their content's digest."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loralab.adapters import folder
from loralab.adapters.folder import CONFIG, AdapterFolder
from loralab.artefacts.engines import VLLM_RANKS, allowed_rank, check_folder, read_base_info
from loralab.artefacts.updates import uniform, updates
from loralab.atomic import cache_folder
from loralab.errors import InputError, join_limited


@dataclass(frozen=True, kw_only=True)
class ExportCopies:
    """The folder that stands for each name, why others are left out, and the rank that holds all."""

    ready: Mapping[str, Path]
    refused: Mapping[str, str]
    rank: int


def prepare(adapters: Mapping[str, Path], model: str) -> ExportCopies:
    """Write what vLLM can serve of some adapter folders; the folders themselves stay as they are.

    Args:
        adapters: name -> folder.
        model: the base that will be served.

    Raises:
        ModelError: there is no such base.
        OutputError: the cache cannot be written.
    """
    ready, refused, largest = {}, {}, VLLM_RANKS[0]
    base = read_base_info(model)
    for name, path in adapters.items():
        try:
            stored = folder.read(path)
        except InputError as error:
            refused[name] = str(error)
            continue
        if lasting := check_folder(stored, "vllm", base).lasting:
            refused[name] = join_limited(lasting)
            continue
        ready[name] = _written(stored)
        largest = max(largest, *(one.rank for one in updates(stored)))
    return ExportCopies(ready=ready, refused=refused, rank=allowed_rank(largest))


def _written(stored: AdapterFolder) -> Path:
    """Return the folder in the cache; two processes may write at once, the first to finish is kept."""
    place = cache_folder() / "vllm" / stored.digest[:32]
    if (place / CONFIG).is_file():
        return place
    own = place.with_name(f"{place.name}.{os.getpid()}")
    shutil.rmtree(own, ignore_errors=True)
    folder.write(own, *uniform(stored), {"made_from": stored.digest})
    try:
        own.rename(place)
    except OSError:
        if not (place / CONFIG).is_file():
            raise
        shutil.rmtree(own, ignore_errors=True)
    return place
