"""Name -> Base: short name, folder, GGUF file or hub id.

Weights are read from safetensors or GGUF only, never from a pickle, and no code that comes with
a model is run. A GGUF file is converted once, to a folder in the cache.
"""

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from loralab import atomic
from loralab.errors import ConfigError, ModelError, OutputError, nearest, some
from loralab.models.catalog import MODELS, how_to_get, locate

Options = dict[str, Any]  # of transformers' from_pretrained
CAUSAL, CLASSIFIER = "causal-lm", "sequence-classification"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOADERS = {CAUSAL: AutoModelForCausalLM, CLASSIFIER: AutoModelForSequenceClassification}
# encoders that transformers can also run as a decoder: their weights were not trained for it
_ENCODERS = ("bert", "roberta", "electra", "camembert", "xlm-roberta", "data2vec-text", "ernie",
             "megatron-bert", "rembert", "roformer", "xmod", "mega", "nezha")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model, in evaluation mode, with its tokenizer (padded on the right).

    `name` is what the user wrote, a folder made absolute; `source` where it was read from.
    """

    name: str
    model: Any
    tokenizer: Any
    kind: str
    source: str


def load(
    name: str,
    *,
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Sequence[str] = (),
    seed: int = 0,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        kind: "causal-lm" or "sequence-classification"; None is the model's own.
        labels: class names of a new classification head; a model that has a head keeps it, and
            must know the same classes in the same order.
        seed: of that new head.

    Raises:
        ModelError: it does not exist, cannot be read, is of another kind, or knows other classes.
    """
    source = resolve(name)
    config = _config(name, source)
    kind = kind or _kind_of(config)
    options = _head_options(name, config, labels) if kind == CLASSIFIER else {}
    with _explained(name, source), torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = _LOADERS[kind].from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True,
            trust_remote_code=False, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    new_head = kind == CLASSIFIER and not _has_head(config)
    _require_complete(name, model, report, new_head=new_head)
    _prepare(model, tokenizer)
    shown = str(Path(name).resolve()) if name not in MODELS and Path(name).exists() else name
    return Base(name=shown, model=model.eval(), tokenizer=tokenizer, kind=kind, source=source)


def natural_kind(name: str) -> str:
    """What a model is, from its configuration alone: a classifier if it is an encoder.

    Raises:
        ModelError: it does not exist, or has no readable configuration.
    """
    return _kind_of(_config(name, resolve(name)))


def resolve(name: str) -> str:
    """The folder or hub id that transformers reads; a GGUF file is converted on the way.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    if name in MODELS:
        found = locate(MODELS[name])
        if found is None:
            raise ModelError(f"{name} is not installed; get it with: {how_to_get(MODELS[name])}")
        return str(_converted(found, name) if found.suffix == ".gguf" else found)
    path = Path(name).expanduser()
    if not name:
        raise ModelError(f"the name of the model is empty; short names: {', '.join(MODELS)}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file, but not .gguf; a model is a folder or a GGUF file")
        return str(_converted(path, path.stem))
    if path.is_dir():
        _require_model_folder(name, path)
        return str(path)
    if re.fullmatch(r"[\w\-.]+/[\w\-.]+", name) and not path.parent.is_dir():
        _require_on_hub(name)
        return name
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    hint = nearest(name, [*MODELS, *(str(p) for p in beside if p.is_dir())])
    raise ModelError(f"there is no model {name!r}{hint}; short names: {', '.join(MODELS)}")


def parse_dtype(precision: str) -> torch.dtype:
    """The dtype behind fp32, bf16 or fp16.

    Raises:
        ConfigError: another word.
    """
    if precision not in DTYPES:
        hint = nearest(precision, DTYPES)
        raise ConfigError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}{hint}")
    return DTYPES[precision]


def cache_folder() -> Path:
    """Where converted models are kept: $LORALAB_CACHE, or loralab in the user's cache."""
    if own := os.environ.get("LORALAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loralab"


def _converted(file: Path, name: str) -> Path:
    """The folder that holds a GGUF file's model in fp32, written the first time."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:16]}"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{file.name} needs the package gguf: pip install 'loralab[gguf]'")
    silence = contextlib.redirect_stderr(io.StringIO())  # a progress bar that has no switch
    with silence, _explained(str(file), str(file)):
        options: Options = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        _forget_quantization(model)
        model.config._name_or_path = name
        # two processes may convert at once: each writes its own, the first to finish is kept
        own = folder.with_name(f"{folder.name}.{os.getpid()}")
        with atomic.new_folder(own) as place:
            model.save_pretrained(place)
            tokenizer.save_pretrained(place)
    return _first(own, folder)


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
    """The weights are dequantised now, and may be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)


def _require_model_folder(name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{name} is no model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise ModelError(
                f"{name} holds its weights as a pickle, which can run code; "
                "convert them to safetensors"
            )
        raise ModelError(f"{name} holds no weights (*.safetensors)")
    if not any(any(path.glob(kind)) for kind in ("tokenizer*", "vocab*", "*.model")):
        raise ModelError(f"{name} holds no tokenizer (tokenizer.json)")


def _require_on_hub(name: str) -> None:
    """Ask once and briefly: transformers retries for half a minute, in a dozen lines."""
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise ModelError(f"there is neither a folder nor a model {name!r} on the hub") from None
    except Exception as error:  # the client's own, the HTTP library's, the system's
        raise ModelError(
            f"there is no folder {name!r}, and the model hub cannot be asked for it "
            f"({type(error).__name__}); short names: {', '.join(MODELS)}"
        ) from error


def _config(name: str, source: str) -> Any:
    with _explained(name, source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _kind_of(config: Any) -> str:
    architectures = config.architectures or [""]
    if any(found.endswith("ForCausalLM") or "LMHead" in found for found in architectures):
        return CAUSAL
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = _has_head(config) or config.model_type in _ENCODERS
    return CAUSAL if decoder and not encoder else CLASSIFIER


def _has_head(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _head_options(name: str, config: Any, labels: Sequence[str]) -> Options:
    """The classes of the head; those of a head that is there already are not renamed."""
    names = dict(enumerate(labels))
    options = {"num_labels": len(names), "id2label": names,
               "label2id": {label: index for index, label in names.items()}}  # fmt: skip
    if not names or not _has_head(config):
        return options if names else {}
    own = dict(config.id2label)
    if names == own or (_unnamed(names) and len(names) == len(own)):
        return {}
    if _unnamed(own) and len(names) == len(own):
        return options
    raise ModelError(
        f"{name} has a classification head for {some(own.values())}; the labels here are "
        f"{some(labels)}, and must be the same in the same order"
    )


def _unnamed(names: Mapping[int, str]) -> bool:
    return all(label == f"LABEL_{index}" for index, label in names.items())


def _require_complete(
    name: str, model: nn.Module, report: Mapping[str, Any], *, new_head: bool
) -> None:
    """Only what a new classification head consists of may be absent from the file."""
    heads = ("classifier.", "score.", "pre_classifier.", "bert.pooler.", "pooler.")
    missing: Iterable[str] = report["missing_keys"]
    lost = sorted(key for key in missing if not (new_head and key.startswith(heads)))
    if lost:
        raise ModelError(
            f"{name} is incomplete for {type(model).__name__}: it lacks {some(lost, 3)}"
        )
    misshapen = [
        f"{key} is {tuple(found)}, expected {tuple(expected)}"
        for key, found, expected in sorted(report["mismatched_keys"])
    ]
    if misshapen:
        raise ModelError(f"{name} does not fit its config.json: {some(misshapen, 3)}")


def _prepare(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports, where our own errors say it better."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str, source: str) -> Iterator[None]:
    """One line of ours for whatever transformers raises on a model that it cannot read."""
    try:
        with quiet():
            yield
    except (ModelError, OutputError):
        raise
    except SafetensorError as error:
        raise ModelError(f"{name}: the weights are damaged or truncated ({error})") from error
    except Exception as error:  # its readers raise some ten unrelated kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        place = "" if source in (name, str(Path(name).expanduser())) else f" from {source}"
        raise ModelError(f"{name} cannot be read{place}: {reason}") from error
