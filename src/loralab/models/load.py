"""Name -> Base: short name, folder, GGUF file or hub id.

Weights are read from safetensors, GGUF or ONNX only, never from a pickle, and no code that comes
with a model is run. A GGUF or ONNX file is converted once, to a folder in the cache.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from loralab.errors import ConfigError, LoralabError, ModelError, nearest, shown, some
from loralab.models import pictures
from loralab.models.catalog import MODELS, how_to_get, locate
from loralab.models.complete import new_modules
from loralab.models.convert import NEEDS, Options, converted
from loralab.models.kinds import (
    CAUSAL,
    CLASSIFIER,
    HEADS,
    KINDS,
    LOADERS,
    SENTENCES,
    SEQ2SEQ,
    TAGGER,
    VISION,
    class_for,
    has_head,
    head_options,
    is_writer,
    kind_of,
    require_kind,
    require_text_or_pictures,
    said,
)
from loralab.models.plausible import require_folder, require_plausible, require_weights
from loralab.models.precision import cast, keep_statistics, require_precision
from loralab.values import check_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LABELLED = ("text-label", "pair-label")  # formats of data that a classifier learns from
_FREE_SIZES = ("dinov2", "dinov2_with_registers", "swin", "swinv2")  # fit their places themselves


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model, in evaluation mode, with its tokenizer (padded on the right).

    A vision model has Pictures (models/pictures.py) in the place of a tokenizer.
    `name` is what the user wrote, a folder made absolute; `source` where it was read from, empty
    for a live model; `new` are the paths of modules that start at random, since the file has
    nothing for them.
    """

    name: str
    model: Any
    tokenizer: Any
    kind: str
    source: str
    new: tuple[str, ...] = ()

    @property
    def live(self) -> bool:
        """Tell if this is the user's own model in memory (given.py): nobody else can load it."""
        return not self.source

    @property
    def recorded(self) -> dict[str, Any]:
        """Its name and kind as records have them: a live model has no name to load it by."""
        live = {"name": None, "live": True} if self.live else {"name": self.name}
        return {**live, "kind": self.kind}


def load(
    name: str,
    *,
    kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Sequence[str] = (),
    seed: int = 0,
    image_size: int | None = None,
) -> Base:
    """Load a base model and its tokenizer.

    Args:
        kind: one of KINDS; None is the model's own.
        labels: class names of a new classification head; a model that has a head keeps it, and
            must know the same classes in the same order.
        seed: of that new head.
        image_size: pixels of a side, for a vision model; None is the model's own.

    Raises:
        ModelError: it does not exist, cannot be read, is of another kind, or knows other classes.
        ConfigError: the kind is unknown, or the model cannot take pictures of that size.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind of model {kind!r} ({some(KINDS)}){nearest(kind, KINDS)}")
    source = resolve(name)
    config = _config(name, source)
    kind = kind or kind_of(config)
    require_kind(name, config, kind)
    if image_size is not None and kind != VISION:
        raise ConfigError(f"image_size has no effect: {name} is {said(kind)}")
    require_precision(name, config, dtype)
    options = _options(name, config, kind, labels)
    with _explained(name, source), torch.random.fork_rng():
        _require_whole(name, Path(source), config, kind)
        torch.manual_seed(seed)
        tokenizer = _reader(name, source, config, kind, image_size)
        if kind != VISION:
            require_use(name, tokenizer, config, kind)
        model, report = LOADERS[kind].from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            **options,
        )
    cast(model, dtype)
    new_head = kind in HEADS and not has_head(config, kind)
    new = new_modules(name, model, report, new_head=new_head)
    if kind == VISION:
        require_size(name, model, tokenizer.size)
    else:
        pad_on_the_right(model, tokenizer)
    keep_statistics(model.eval())
    shown = str(Path(name).resolve()) if name not in MODELS and Path(name).exists() else name
    return Base(name=shown, model=model, tokenizer=tokenizer, kind=kind, source=source, new=new)


def natural_kind(name: str) -> str:
    """What a model is, from its configuration alone: a classifier if it is an encoder.

    Raises:
        ModelError: it does not exist, has no readable configuration, or reads what nothing here
            gives it.
    """
    config = configuration(name)
    require_text_or_pictures(name, config)
    return kind_of(config)


def configuration(name: str) -> Any:
    """transformers' configuration of a model, without its weights.

    Raises:
        ModelError: it does not exist, or has no readable configuration.
    """
    return _config(name, resolve(name))


def kind_for(name: str, data_format: str) -> str:
    """What a model becomes for data of a format (tasks/formats.py names them).

    Raises:
        ModelError: it does not exist, or cannot learn from such data.
    """
    config = configuration(name)
    require_text_or_pictures(name, config)
    natural = kind_of(config)
    if (natural == VISION) != (data_format == "image-label"):
        wanted = "text: take a language model or an encoder"
        if data_format == "image-label":
            wanted = "pictures: take a vision model, such as dinov2-s"
        raise _unsuited(f"{name} is {said(natural)}, and the data is {wanted}")
    if data_format == "tokens-tags":
        if class_for(config, TAGGER) is None:
            raise _unsuited(f"{name} ({config.model_type}) cannot tag words; take minilm-l6")
        return TAGGER
    if data_format == "pair":
        if natural == CAUSAL:
            raise _unsuited(
                f"{name} is {said(natural)}; text_a, text_b without a label trains an encoder of "
                "sentences: take minilm-l6, or say --map prompt=text_a,completion=text_b"
            )
        return SENTENCES
    if natural == SEQ2SEQ or (natural == CLASSIFIER and is_writer(config)):
        require_kind(name, config, CLASSIFIER if data_format in LABELLED else CAUSAL)
        return CLASSIFIER
    return CLASSIFIER if natural == TAGGER else natural  # its body reads any text


def _unsuited(message: str) -> ModelError:
    return ModelError(message, code="kind_unsupported", field="model")


def resolve(name: str) -> str:
    """The folder or hub id that transformers reads; a GGUF file is converted on the way.

    Raises:
        ModelError: there is no such model, or its package is not installed.
    """
    if name in MODELS:
        found = locate(MODELS[name])
        if found is None:
            raise ModelError(f"{name} is not installed; get it with: {how_to_get(MODELS[name])}")
        with _explained(name, str(found)):
            return str(converted(found, name) if found.suffix in NEEDS else found)
    path = Path(name).expanduser()
    if not name:
        raise ModelError(f"the name of the model is empty; short names: {', '.join(MODELS)}")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file, but not .gguf; a model is a folder or a GGUF file")
        with _explained(str(path), str(path)):
            return str(converted(path, path.stem))
    if path.is_dir():
        _require_model_folder(name, path)
        return str(path)
    if re.fullmatch(r"[\w\-.]+/[\w\-.]+", name) and not path.parent.is_dir():
        _require_on_hub(name)
        return name
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    hint = nearest(name, [*MODELS, *(str(p) for p in beside if _is_model(p))])
    raise ModelError(
        f"there is no model {name!r}{hint}; short names: {', '.join(MODELS)}", code="unknown_model", field="model"
    )


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def parse_dtype(precision: str) -> torch.dtype:
    """The dtype behind fp32, bf16 or fp16.

    Raises:
        ConfigError: another word.
    """
    check_choice("precision", precision, tuple(DTYPES))
    return DTYPES[precision]


def _require_model_folder(name: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        found = "it is an adapter; name its base, and this with --adapter" if adapter else "it has no config.json"
        code = "adapter_as_model" if adapter else "no_config"
        raise ModelError(f"{name} is no model folder: {found}", code=code, field="model")
    if not any(path.glob("*.safetensors")):
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise ModelError(f"{name} holds its weights as a pickle, which can run code; convert them to safetensors")
        raise ModelError(f"{name} holds no weights (*.safetensors)")
    require_folder(name, path)


def _require_whole(name: str, path: Path, config: Any, kind: str) -> None:
    """Look at the files of a folder before they are read."""
    if not path.is_dir():
        return
    require_plausible(name, require_weights(name, path), lambda: LOADERS[kind].from_config(config))
    if kind != VISION:
        _require_tokenizer(name, path)


def has_tokenizer(source: str | Path) -> bool:
    """Tell whether a folder holds a tokenizer; a hub id is taken to have one."""
    path = Path(source)
    kinds = ("tokenizer*", "vocab*", "*.model", "preprocessor_config.json")
    return not path.is_dir() or any(any(path.glob(kind)) for kind in kinds)


def _require_tokenizer(name: str, path: Path) -> None:
    if not has_tokenizer(path):
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
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise ModelError(f"{name}: architectures must be a list of names, found {shown(named)}")
    return config


def _reader(name: str, source: str, config: Any, kind: str, image_size: int | None) -> Any:
    """The tokenizer, or what stands in its place for pictures."""
    if kind == VISION:
        return pictures.read(name, source, config, image_size)
    # byte-level tokenizers take words one by one only if each may begin with a space
    options: Options = {"add_prefix_space": True} if kind == TAGGER else {}
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def _options(name: str, config: Any, kind: str, labels: Sequence[str]) -> Options:
    """What from_pretrained must know beyond the source."""
    if kind in HEADS:
        return head_options(name, config, kind, labels)
    if kind == SENTENCES:  # sentences are the mean of their tokens: a pooler would stay unused
        built = class_for(config, SENTENCES)
        if "add_pooling_layer" in inspect.signature(built.__init__).parameters:
            return {"add_pooling_layer": False}
    return {}


def require_size(name: str, model: Any, size: int) -> None:
    """A model whose places are fixed takes its own size alone."""
    own = pictures.side(getattr(pictures.settings(model.config), "image_size", None))
    fits = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if own in (None, size) or fits or model.config.model_type in _FREE_SIZES:
        return
    raise ConfigError(f"{name} takes pictures of {own} pixels alone, got image_size {size}")


def require_use(name: str, tokenizer: Any, config: Any, kind: str) -> None:
    """A tokenizer whose files are odd is found out when it is used, so it is used here."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{name}: tokenizer_config.json has model_max_length "
            f"{shown(tokenizer.model_max_length)}, which is no number"
        )
    last = tokenizer("a", verbose=False)["input_ids"][-1:]
    # the classes of an encoder-decoder are read off the one end token that each text has
    ended = kind == CLASSIFIER and config.is_encoder_decoder and not config.sub_configs
    if ended and (last != [config.eos_token_id] or tokenizer.pad_token_id in (None, *last)):
        raise ModelError(
            f"{name}: {config.model_type} classifies by the end token of a text "
            f"(eos_token_id {config.eos_token_id}), and its tokenizer adds none, or pads with it",
            code="tokenizer_unsuited",
            field="model",
        )


def pad_on_the_right(model: Any, tokenizer: Any) -> None:
    """Pad with a token that the model has a row for: labels and mask hide it.

    The model must know it too, as some classifiers look for the last token before it.
    """
    rows = _rows(model)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _rows(model: Any) -> int | None:
    """Those of the embedding; None where tokens are not looked up in one table (Canine)."""
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):
        return None


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
    except LoralabError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{name}: the weights are damaged or truncated ({error})") from error
    except Exception as error:  # its readers raise some ten unrelated kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        place = "" if source in (name, str(Path(name).expanduser())) else f" from {source}"
        raise ModelError(f"{name} cannot be read{place}: {reason}") from error
