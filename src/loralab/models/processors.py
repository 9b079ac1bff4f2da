"""Processors of language models that read pictures too: a tokenizer, and how pictures become tokens.

The tokenizer stands in a base as that of any language model; its attribute `processor` is the whole,
its attribute `no_pictures` says why there is none.
"""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from loralab.errors import one_line

FILES = ("processor_config.json", "preprocessor_config.json")


def read(source: str) -> Any:
    """Return the tokenizer of a model, with its processor where there is one that can be loaded.

    Args:
        source: folder or hub id.
    """
    if not any(cached_file(source, file, _raise_exceptions_for_missing_entries=False) for file in FILES):
        return _text_alone(source, f"there is neither {FILES[0]} nor {FILES[1]}")
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, ValueError, OSError, TypeError, AttributeError) as error:
        # a part of it may need a package that rows of text do not
        return _text_alone(source, one_line(str(error))[:200])
    if not is_processor(processor):
        return _text_alone(source, f"its processor is a {type(processor).__name__}")
    return tokenizer_of(processor)


def is_processor(value: Any) -> bool:
    """Return whether an object is a tokenizer and an image processor in one."""
    return hasattr(value, "tokenizer") and hasattr(value, "image_processor")


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer of a processor, which knows that, and writes conversations as it does."""
    tokenizer = processor.tokenizer
    tokenizer.processor = processor
    if processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def save(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer, or what stands in its place, with its processor if it has one."""
    processor = getattr(tokenizer, "processor", None)
    tokenizer.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _text_alone(source: str, reason: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    tokenizer.no_pictures = reason
    return tokenizer
