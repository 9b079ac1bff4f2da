"""Compare tokenizers and configurations; restore prompts as they were in training.

A name says little: the folder or the hub id behind it may hold another revision by now.
"""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from loralab.errors import BaseMismatchWarning, ModelError, format_value
from loralab.models.kinds import VISION
from loralab.models.load import Base
from loralab.values import read_json

CONFIG = "config.json"
IGNORED_CONFIG_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
TEMPLATE_VALUES = re.compile(r"^(\{%- if (\w+) is not defined -%\}\{%- set \2 = [^\n]*? -%\}\{%- endif -%\})+")
PROBES = (  # texts that tokenizers cut differently
    "The Quick  brown fox's 3 jumps,\nover 12,345.67 lazy dogs!",
    "\tdef area(width: int) -> float: return width * 2  # naïve Ångström",
    "今天的天氣很好。Привет, мир! 👋🏽",
    "",
)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return 16 hexadecimal digits over the vocabulary and the ids of some texts, or how pictures are cut.

    Chat template and padding do not count, nor how a version of a library writes its files.
    """
    if not hasattr(tokenizer, "get_vocab"):  # Pictures: its settings are all there is
        return _digest([repr(tokenizer)])
    vocabulary = tokenizer.get_vocab()
    own = tokenizer.get_added_vocab()
    # some take the spaces around them, or stand alone only
    added = "\n".join(f"{token} a {token}a" for token in sorted(own, key=own.__getitem__))
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in (*PROBES, added)]
    return _digest([sorted(vocabulary, key=vocabulary.__getitem__), ids])


def without_template_values(template: str | None) -> str | None:
    """Return a chat template as it was before values of its variables were kept in it."""
    return TEMPLATE_VALUES.sub("", template, count=1) if template else template


def template_of(tokenizer: Any) -> str | None:
    """Return the chat template, of several the one that is used where none is named."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def config_digest(base: Base) -> str | None:
    """Return 16 hexadecimal digits over a model's config.json; None where there is no such file here.

    Of a live model it is the configuration as it would be written.
    """
    if base.live:
        return _config_digest(json.loads(base.model.config.to_json_string(use_diff=False)))
    return stored_config_digest(base.source)


def stored_config_digest(source: str) -> str | None:
    """Return the same of a folder or a hub id."""
    found = Path(source) / CONFIG
    if not Path(source).is_dir():
        cached = try_to_load_from_cache(source, CONFIG)
        if not isinstance(cached, str):
            return None
        found = Path(cached)
    return _config_digest(read_json(found, ModelError))


def _config_digest(content: Mapping[str, Any]) -> str:
    return _digest({key: content[key] for key in sorted(content.keys() - {*IGNORED_CONFIG_FIELDS})})


def as_trained(base: Base, stored: Mapping[str, Any], whose: object) -> Base:
    """Return the base with the chat template and the end of text that an adapter was trained with.

    What differs from the base's own, and what cannot be given back, is a BaseMismatchWarning.

    Args:
        stored: the tokenizer's part of loralab.json; what it does not hold is not compared.
        whose: the adapter, for the warning.
    """
    digest = stored.get("digest")
    if digest is not None and digest != tokenizer_digest(base.tokenizer):
        _warn(f"the tokenizer of {base.name} is not the one that {whose} was trained with, so its answers will differ")
    changed = tokenizer_changes(base, stored)
    warn_of(changed, base, whose)
    return with_tokenizer_changes(base, changed) if changed else base


def with_tokenizer_changes(base: Base, changed: Mapping[str, tuple[Any, str]]) -> Base:
    """Return the base with a copy of its tokenizer that has some attributes of another's."""
    tokenizer = copy.deepcopy(base.tokenizer)  # others may ask the same base in its own words
    for name, (value, _) in changed.items():
        setattr(tokenizer, name, value)
    return replace(base, tokenizer=tokenizer)


def warn_of(changed: Mapping[str, tuple[Any, str]], base: Base, whose: object) -> None:
    """Say what of a tokenizer is the adapter's own."""
    for text in filter(None, (text for _, text in changed.values())):
        _warn(f"{text} of {base.name} is not the one that {whose} was trained with, which is used")


def tokenizer_changes(base: Base, stored: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Compare a tokenizer with the one of a training.

    Returns:
        attribute -> its value then, and its name, of those that differ; the name is empty where that
        is as the user wanted it.
    """
    if base.kind == VISION:
        return {}
    found: dict[str, tuple[Any, str]] = {}
    template = template_of(base.tokenizer)
    if (trained := stored.get("chat_template", template)) != template:
        same = without_template_values(trained) == without_template_values(template)
        found["chat_template"] = trained, "" if same else "the chat template"
    end, own = stored.get("eos_token"), base.tokenizer.eos_token
    if end is not None and end != own and end in base.tokenizer.get_vocab():
        found["eos_token"] = end, f"the end of text ({format_value(own)}, then {format_value(end)})"
    return found


def _warn(text: str) -> None:
    warnings.warn(text, BaseMismatchWarning, stacklevel=3)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
