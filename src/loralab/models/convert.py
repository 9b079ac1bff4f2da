"""Files in other formats -> a model folder in the cache, written once.

The folder is named after the file's content, so a changed file is converted anew.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loralab import atomic, system
from loralab.atomic import cache_folder
from loralab.errors import ModelError
from loralab.models.gguf_header import require_sound
from loralab.models.plausible import require_plausible

Options = dict[str, Any]  # of transformers' from_pretrained
Write = Callable[[Path, Path], None]  # from a file, as a new folder


def converted(file: Path, name: str, write: Write | None = None) -> Path:
    """Return the folder that holds the model of a file in fp32, written the first time.

    Args:
        write: of a file in a format of its own; None for a GGUF file.

    Raises:
        ModelError: the package that reads such a file is not installed.
    """
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    # two processes may convert at once: each writes its own, the first to finish is kept
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        if write is None:
            _write_gguf(file, name, own)
        else:
            write(file, own)
    return _first(own, folder)


def require_package(package: str, extra: str, file: str) -> None:
    """Refuse a file whose reader is missing.

    Args:
        extra: ours that brings the package.

    Raises:
        ModelError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        text = f"{file} needs the package {package}: pip install 'loralab[{extra}]'"
        raise ModelError(text, code="not_installed", field=package)


def _write_gguf(file: Path, name: str, own: Path) -> None:
    require_package("gguf", "gguf", file.name)
    require_sound(file, model=True)
    options: Options = {"gguf_file": file.name, "trust_remote_code": False}
    with tempfile.TemporaryDirectory() as alone:  # nothing that lies beside the file is read
        system.place_beside(file.resolve(), Path(alone) / file.name)
        config = AutoConfig.from_pretrained(alone, **options)
        require_plausible(file.name, file.stat().st_size, lambda: AutoModelForCausalLM.from_config(config))
        tokenizer = AutoTokenizer.from_pretrained(alone, **options)
        model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32, **options)
    _forget_quantization(model)
    model.config._name_or_path = name
    with atomic.new_folder(own) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def _first(own: Path, folder: Path) -> Path:
    """Give `own` its final name, or drop it where another process was faster."""
    try:
        return own.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(own, ignore_errors=True)
        return folder


def _forget_quantization(model: Any) -> None:
    """Forget that the weights were quantised, so that they can be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
