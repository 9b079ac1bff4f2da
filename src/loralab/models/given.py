"""A live model of the user's, with its tokenizer, in the place of one that is loaded by name.

It is used as it is: nothing here changes its weights, and its dtype is the precision.
"""

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from loralab.errors import ConfigError, ModelError, format_value, join_limited
from loralab.models import pictures, processors
from loralab.models.kinds import (
    CAUSAL,
    CLASSIFIER,
    HEADS,
    IMAGE_TEXT,
    KINDS,
    LEARNERS,
    SCORED_PAIRS,
    SENTENCES,
    TAGGER,
    VISION,
    class_for,
    head_options,
    kind_of,
    require_kind,
)
from loralab.models.load import DTYPES, Base, pad_on_the_right, require_size, require_use
from loralab.models.pictures import Pictures
from loralab.models.precision import keep_statistics, require_precision

ACCEPTED = "a short name, a folder, a GGUF file, a hub id or a live model of transformers"


@dataclass(frozen=True, eq=False)
class Given:
    """A live model and its tokenizer, or what prepares pictures for it."""

    model: Any
    tokenizer: Any

    @property
    def name(self) -> str:
        """Return its name in errors and records, which nobody can load."""
        return f"{type(self.model).__name__} in memory"

    @property
    def kind(self) -> str:
        """Return its kind, by its class.

        Raises:
            ModelError: its class is none of those that are trained here.
        """
        return _kind(self.model, self._config, self.name)

    @property
    def _config(self) -> Any:
        """Return a copy of its configuration that names its class, as one of a folder does."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        return config

    def precision(self, asked: str) -> str:
        """Return the precision of the model's own dtype.

        Raises:
            ConfigError: another one is asked for, or its dtype is none that is computed in.
        """
        floating = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        dtype = floating[0] if floating else None
        own = next((name for name, known in DTYPES.items() if known == dtype), None)
        if own is None:
            raise ConfigError(
                f"{self.name} is in {dtype}; its weights must be in fp32, bf16 or fp16",
                code="dtype_unsupported",
                field="model",
            )
        if asked not in ("auto", own):
            raise ConfigError(
                f"{self.name} is in {own} and stays so; leave precision out, or convert the model "
                f"first: model.to({DTYPES.get(asked)})",
                code="precision_differs",
                field="precision",
            )
        return own

    def kind_for(self, data_format: str, wanted: str | None = None) -> str:
        """Return the kind for data of a format: of those that learn from it, one that this model's class is.

        Empty where there is none, or where the model's own is it.
        """
        config = self._config
        own = _kind(self.model, config, self.name)
        alike = [kind for kind in LEARNERS.get(data_format, ()) if class_for(config, kind) is class_for(config, own)]
        return wanted or ("" if own in alike or not alike else alike[0])

    def base(self, kind: str = "", *, labels: Sequence[str] = (), image_size: int | None = None) -> Base:
        """Return the model as a base: in evaluation mode, with a tokenizer that pads on the right.

        Args:
            kind: that it must be; empty is its own.
            labels: the classes of the data, which a model with a head must have.
            image_size: pixels of a side, for a vision model; None is its own.

        Raises:
            ModelError: it is of another kind, of none that is supported, or has other classes.
            ConfigError: its tokenizer does not suit it.
        """
        model, config = self.model, self._config
        own = _kind(model, config, self.name)
        if kind and class_for(config, kind) is class_for(config, own):
            own = kind
        if kind not in ("", own):
            raise ModelError(
                f"{self.name} is of kind {own}, and {kind} is needed; give a model of that class, "
                "or the name or folder of this one, which is loaded as what is needed",
                code="kind_unsupported",
                field="model",
            )
        _require_plain(model, config, own, self.name)
        require_precision(self.name, config, next(model.parameters()).dtype)
        if own in HEADS:
            for key, value in head_options(self.name, config, own, labels).items():
                if key == "problem_type":
                    model.config.problem_type = value
        tokenizer = self._reader(config, own, image_size)
        if own != VISION:
            pad_on_the_right(model, tokenizer)
        keep_statistics(model.eval())
        return Base(name=self.name, model=model, tokenizer=tokenizer, kind=own, source="")

    def _reader(self, config: Any, kind: str, image_size: int | None) -> Any:
        """Return a copy of the tokenizer, or how pictures are prepared."""
        if kind == VISION:
            return self._pictures(config, image_size)
        if image_size is not None:
            raise ConfigError(f"image_size has no effect: {self.name} reads text", code="no_effect", field="image_size")
        if kind == IMAGE_TEXT and processors.is_processor(self.tokenizer):
            tokenizer = processors.tokenizer_of(copy.deepcopy(self.tokenizer))
            require_use(self.name, tokenizer, config, kind)
            return tokenizer
        if not (callable(self.tokenizer) and hasattr(self.tokenizer, "pad_token_id")):
            raise _no_tokenizer(self.tokenizer, "a tokenizer of transformers")
        tokenizer = copy.deepcopy(self.tokenizer)
        require_use(self.name, tokenizer, config, kind)
        if kind == TAGGER:
            _require_words(tokenizer)
        return tokenizer

    def _pictures(self, config: Any, image_size: int | None) -> Pictures:
        own = self.tokenizer
        if isinstance(own, Pictures):
            found = own if image_size is None else replace(own, size=image_size)
        elif hasattr(own, "save_pretrained") and not hasattr(own, "get_vocab"):
            with tempfile.TemporaryDirectory() as place:
                own.save_pretrained(place)
                found = pictures.read(self.name, place, config, image_size)
        else:
            raise _no_tokenizer(own, "an image processor of transformers")
        require_size(self.name, self.model, found.size)
        return found


def given(model: Any, tokenizer: Any) -> Given | None:
    """Return a live model with its tokenizer; None where the model is a name.

    Raises:
        ConfigError: it is not a model, or the tokenizer is missing or has no effect.
        ModelError: it is a module without a configuration.
    """
    if isinstance(model, str):
        if tokenizer is not None:
            raise ConfigError(
                f"tokenizer has no effect: {model} is loaded with its own", code="no_effect", field="tokenizer"
            )
        return None
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be {ACCEPTED}, found {format_value(model)}", code="not_a_model", field="model")
    model = getattr(model, "_orig_mod", model)  # what torch.compile stands around
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise ModelError(
            f"{type(model).__name__} stands around a model; give that itself: model.module",
            code="wrapped_model",
            field="model",
        )
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ModelError(
            f"{type(model).__name__} has no config; a live model must be one of transformers (for "
            "any other module there is loralab.attach)",
            code="no_config",
            field="model",
        )
    if next(model.parameters(), None) is None:
        raise ModelError(f"{type(model).__name__} has no parameters", code="no_weights", field="model")
    if tokenizer is None:
        raise ConfigError(
            f"give tokenizer=, the one of {type(model).__name__}: a live model has none",
            code="no_tokenizer",
            field="tokenizer",
        )
    return Given(model, tokenizer)


@contextlib.contextmanager
def restored_after(own: Given | None, *, on_error_alone: bool = False) -> Iterator[None]:
    """Leave a live model after a block as it was before: device, modes, padding."""
    if own is None:
        yield
        return
    model = own.model
    text = model.config.get_text_config()
    padding = getattr(text, "pad_token_id", None)
    modes = {module: dict(_modes(module)) for module in model.modules()}
    device = next(model.parameters()).device
    done = False
    try:
        yield
        done = on_error_alone
    finally:
        if not done:
            if getattr(text, "pad_token_id", None) != padding:
                text.pad_token_id = padding
            if INPUT_HOOKS in model.__dict__ and INPUT_HOOKS not in modes[model]:
                model.disable_input_require_grads()
            for module, before in modes.items():
                for name in MODES:
                    module.__dict__.pop(name, None)
                module.__dict__.update(before)
            if next(model.parameters()).device != device:
                model.to(device)


INPUT_HOOKS = "_require_grads_hooks"  # that recomputation of activations has put in
MODES = (  # of a module, in its own dictionary
    "training",
    "train",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    INPUT_HOOKS,
)


def _modes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module.__dict__[name]) for name in MODES if name in module.__dict__)


def _kind(model: Any, config: Any, name: str) -> str:
    """Return the kind of a model by its class."""
    for kind in KINDS:
        built = class_for(config, kind)
        if built is not None and isinstance(model, built):
            if kind == SENTENCES and kind_of(config) == CAUSAL:
                break
            return kind_of(config) if kind == CLASSIFIER or kind_of(config) == IMAGE_TEXT else kind
    raise ModelError(
        f"{name} is of no class that is trained here: {', '.join(KINDS)}; take one with its head, "
        "such as AutoModelForCausalLM makes",
        code="kind_unsupported",
        field="model",
    )


def _require_plain(model: Any, config: Any, kind: str, name: str) -> None:
    """Refuse what could not be rebuilt from its configuration and its weights."""
    require_kind(name, config, kind)
    if len(devices := {p.device for p in model.parameters()}) > 1 or torch.device("meta") in devices:
        raise ModelError(
            f"{name} is on {join_limited(map(str, devices))}; all of it must be on one device",
            code="several_devices",
            field="model",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} is quantized; give its name and quantize= in its place",
            code="quantized_unsupported",
            field="model",
        )
    if kind in (SENTENCES, SCORED_PAIRS) and getattr(model, "pooler", None) is not None:
        raise ModelError(
            f"{name} has a pooler, which sentences do not use; make it with add_pooling_layer=False",
            code="pooler_unused",
            field="model",
        )


def _require_words(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not take words one by one."""
    try:
        tokenizer(["a", "b"], is_split_into_words=True).word_ids()
    except Exception as error:  # its kinds raise ValueError, AssertionError, AttributeError
        raise ConfigError(
            f"the tokenizer does not take words one by one ({error}); load it with "
            "add_prefix_space=True, and use_fast=True",
            code="tokenizer_unsuited",
            field="tokenizer",
        ) from None


def _no_tokenizer(found: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"tokenizer must be {wanted}, found {format_value(found)}", code="not_a_tokenizer", field="tokenizer"
    )
