"""Name -> Base: short name, folder, GGUF file or hub id.

Weights are read from safetensors, GGUF or ONNX only, never from a pickle, and no code that comes
with a model is run. A GGUF or ONNX file is converted once, to a folder in the cache.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from loralab.errors import ConfigError, ModelError, format_value, join_limited, nearest
from loralab.models import pictures, processors
from loralab.models.catalog import MODELS
from loralab.models.complete import new_modules
from loralab.models.convert import Options
from loralab.models.kinds import (
    CAUSAL,
    CLASSIFIER,
    HEADS,
    IMAGE_TEXT,
    KINDS,
    LEARNERS,
    LOADERS,
    REGRESSION,
    SCORED_PAIRS,
    SENTENCES,
    SEQ2SEQ,
    TAGGER,
    VISION,
    class_for,
    describe_kind,
    has_head,
    head_options,
    is_writer,
    kind_of,
    recorded_kind,
    require_kind,
    require_text_or_pictures,
)
from loralab.models.plausible import require_plausible, require_weights
from loralab.models.precision import cast, keep_statistics, require_precision, require_whole_blocks
from loralab.models.reading import lean_reading
from loralab.models.source import as_model_error, require_tokenizer_files, resolve
from loralab.values import check_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FREE_SIZES = ("dinov2", "dinov2_with_registers", "swin", "swinv2")  # fit their places themselves


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model, in evaluation mode, with its tokenizer (padded on the right).

    A vision model has Pictures (models/pictures.py) in the place of a tokenizer; that of a language
    model which reads pictures too knows its processor (models/processors.py).
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
        """Return its name and kind as records have them: a live model has no name to load it by."""
        live = {"name": None, "live": True} if self.live else {"name": self.name}
        return {**live, "kind": recorded_kind(self.kind)}


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
    _require_known(kind)
    source = resolve(name)
    config = _config(name, source)
    kind = kind or kind_of(config)
    require_kind(name, config, kind)
    if image_size is not None and kind != VISION:
        raise ConfigError(
            f"image_size has no effect: {name} is {describe_kind(kind)}", code="no_effect", field="image_size"
        )
    require_precision(name, config, dtype)
    options = _options(name, config, kind, labels)
    with as_model_error(name, source), torch.random.fork_rng():
        _require_whole(name, Path(source), config, kind)
        torch.manual_seed(seed)
        tokenizer = _reader(name, source, config, kind, image_size)
        if kind != VISION:
            require_use(name, tokenizer, config, kind)
        with lean_reading(dtype):
            model, report = LOADERS[kind].from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                **options,
            )
    require_whole_blocks(name, model)
    cast(model, dtype)
    new_head = kind in HEADS and not has_head(config, kind)
    new = new_modules(name, model, report, new_head=new_head)
    if kind == VISION:
        require_size(name, model, tokenizer.size)
    else:
        pad_on_the_right(model, tokenizer)
    keep_statistics(model.eval())
    display_name = str(Path(name).resolve()) if name not in MODELS and Path(name).exists() else name
    return Base(name=display_name, model=model, tokenizer=tokenizer, kind=kind, source=source, new=new)


def _require_known(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise ConfigError(
            f"unknown kind of model {kind!r} ({join_limited(KINDS)}){nearest(kind, KINDS)}",
            code="unknown_kind",
            field="kind",
        )


def natural_kind(name: str) -> str:
    """Return the kind of a model from its configuration alone: a classifier if it is an encoder.

    Raises:
        ModelError: it does not exist, has no readable configuration, or reads what nothing here
            gives it.
    """
    config = configuration(name)
    require_text_or_pictures(name, config)
    return kind_of(config)


def configuration(name: str) -> Any:
    """Return transformers' configuration of a model, without its weights.

    Raises:
        ModelError: it does not exist, or has no readable configuration.
    """
    return _config(name, resolve(name))


def kind_for(name: str, data_format: str, wanted: str | None = None) -> str:
    """Return the kind of a model for data of a format (tasks/formats.py names them).

    Args:
        wanted: what it shall be; None is the usual kind for such rows.

    Raises:
        ModelError: it does not exist, or cannot learn from such data.
        ConfigError: the kind is unknown, or does not learn from such rows.
    """
    config = configuration(name)
    require_text_or_pictures(name, config)
    natural = kind_of(config)
    learners = LEARNERS.get(data_format, (CAUSAL,))
    if wanted is not None:
        _require_known(wanted)
        require_learner(wanted, data_format)
        require_kind(name, config, wanted)
        return wanted
    if (natural == VISION) != (VISION in learners):
        pictured = "pictures: take a vision model, such as dinov2-s"
        what = pictured if VISION in learners else "text: take a language model or an encoder"
        raise _unsuited(f"{name} is {describe_kind(natural)}, and the data is {what}")
    if TAGGER in learners and class_for(config, TAGGER) is None:
        raise _unsuited(f"{name} ({config.model_type}) cannot tag words; take minilm-l6")
    if SENTENCES in learners and natural == CAUSAL:
        raise _unsuited(
            f"{name} is {describe_kind(natural)}; text_a, text_b without a label trains an encoder of "
            "sentences: take minilm-l6, or say --map prompt=text_a,completion=text_b"
        )
    if natural == IMAGE_TEXT and IMAGE_TEXT not in learners:
        raise _unsuited(
            f"{name} is {describe_kind(natural)}, and does not learn from {data_format} rows; it learns from prompt, "
            "completion or messages, with an image or without"
        )
    return _usual(name, config, natural, learners)


def require_learner(kind: str, data_format: str) -> None:
    """Refuse a kind that does not learn from rows of a format.

    Raises:
        ConfigError: it does not.
    """
    learners = LEARNERS.get(data_format, (CAUSAL,))
    if kind not in learners:
        raise ConfigError(
            f"kind {kind} does not learn from {data_format} rows, which are for {join_limited(learners)}"
            + ("; say --map score=label if the label is a number" if kind == REGRESSION else ""),
            code="format_unsuited",
            field="kind",
        )


def _usual(name: str, config: Any, natural: str, learners: Sequence[str]) -> str:
    """Return the kind that a model becomes for rows that some kinds learn from."""
    texts = CAUSAL in learners
    if natural == IMAGE_TEXT or (texts and natural == CAUSAL):
        return natural
    if natural == SEQ2SEQ and SEQ2SEQ in learners:
        return CLASSIFIER if CLASSIFIER in learners and class_for(config, CLASSIFIER) else SEQ2SEQ
    if not texts:
        able = [kind for kind in learners if kind != SCORED_PAIRS or natural not in (CAUSAL, SEQ2SEQ)]
        return able[0]
    if natural == SEQ2SEQ or (natural != TAGGER and is_writer(config)):
        require_kind(name, config, CLASSIFIER if CLASSIFIER in learners else CAUSAL)
    return CLASSIFIER  # its body reads any text


def _unsuited(message: str) -> ModelError:
    return ModelError(message, code="kind_unsupported", field="model")


def parse_dtype(precision: str) -> torch.dtype:
    """Return the dtype behind fp32, bf16 or fp16.

    Raises:
        ConfigError: another word.
    """
    check_choice("precision", precision, tuple(DTYPES))
    return DTYPES[precision]


def _require_whole(name: str, path: Path, config: Any, kind: str) -> None:
    """Look at the files of a folder before they are read."""
    if not path.is_dir():
        return
    require_plausible(name, require_weights(name, path), lambda: LOADERS[kind].from_config(config))
    if kind != VISION:
        require_tokenizer_files(name, path)


def _config(name: str, source: str) -> Any:
    with as_model_error(name, source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise ModelError(
            f"{name}: architectures must be a list of names, found {format_value(named)}",
            code="invalid_config",
            field="architectures",
        )
    return config


def _reader(name: str, source: str, config: Any, kind: str, image_size: int | None) -> Any:
    """Return the tokenizer, or what stands in its place for pictures."""
    if kind == VISION:
        return pictures.read(name, source, config, image_size)
    if kind == IMAGE_TEXT:
        return processors.read(source)
    # byte-level tokenizers take words one by one only if each may begin with a space
    options: Options = {"add_prefix_space": True} if kind == TAGGER else {}
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def _options(name: str, config: Any, kind: str, labels: Sequence[str]) -> Options:
    """Return the options of from_pretrained beyond the source."""
    if kind in HEADS:
        return head_options(name, config, kind, labels)
    if kind in (SENTENCES, SCORED_PAIRS):  # sentences are the mean of their tokens: a pooler would stay unused
        built = class_for(config, SENTENCES)
        if "add_pooling_layer" in inspect.signature(built.__init__).parameters:
            return {"add_pooling_layer": False}
    return {}


def require_size(name: str, model: Any, size: int) -> None:
    """Refuse other picture sizes than its own, for a model whose positions are fixed."""
    own = pictures.side(getattr(pictures.settings(model.config), "image_size", None))
    fits = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if own in (None, size) or fits or model.config.model_type in _FREE_SIZES:
        return
    raise ConfigError(
        f"{name} takes pictures of {own} pixels alone, got image_size {size}", code="invalid_value", field="image_size"
    )


def require_use(name: str, tokenizer: Any, config: Any, kind: str) -> None:
    """Use a tokenizer once: odd files are found out only then."""
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(
            f"{name}: tokenizer_config.json has model_max_length "
            f"{format_value(tokenizer.model_max_length)}, which is not a number",
            code="invalid_config",
            field="model_max_length",
        )
    last = tokenizer("a", verbose=False)["input_ids"][-1:]
    # the classes of an encoder-decoder are read off the one end token that each text has
    ended = HEADS.get(kind) == HEADS[CLASSIFIER] and config.is_encoder_decoder and not config.sub_configs
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
    """Return the rows of the embedding; None where tokens are not looked up in one table (Canine)."""
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):
        return None
