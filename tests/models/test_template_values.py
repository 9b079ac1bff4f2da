"""Values of a chat template's variables are kept in the template, and hold where the caller gives none."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import QWEN3, SMOLLM3
from transformers import AutoTokenizer

from loralab.errors import ConfigError
from loralab.models.identity import as_trained, without_template_values
from loralab.models.load import Base
from loralab.models.template_values import with_template_values

ASKED = [{"role": "user", "content": "q"}]


@pytest.fixture
def base(tiny_llama_folder: Any) -> Base:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = QWEN3
    return Base(name="tiny", model=None, tokenizer=tokenizer, kind="causal-lm", source="tiny")


def asked(base: Base, **more: Any) -> str:
    text: str = base.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False, **more)
    return text


@pytest.mark.parametrize("template", [QWEN3, SMOLLM3])
def test_whoever_renders_the_template_writes_as_it_was_told(template: str, base: Base) -> None:
    base.tokenizer.chat_template = template
    told = with_template_values(base, {"enable_thinking": False})
    assert asked(told) == asked(base, enable_thinking=False) != asked(base)
    assert asked(told, enable_thinking=True) == asked(base, enable_thinking=True)
    assert base.tokenizer.chat_template == template
    assert without_template_values(told.tokenizer.chat_template) == template
    assert without_template_values(template) == template


def test_the_base_asked_as_trained_does_not_warn_of_what_was_asked_for(base: Base) -> None:
    told = with_template_values(base, {"enable_thinking": False})
    stored = {"chat_template": told.tokenizer.chat_template}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(as_trained(base, stored, "it")) == asked(told)


def test_a_value_without_effect_is_refused(base: Base) -> None:
    assert with_template_values(base, {}) is base
    base.tokenizer.chat_template = None
    for own in (base, replace(base, name="other")):
        with pytest.raises(ConfigError) as caught:
            with_template_values(own, {"enable_thinking": False})
        assert (caught.value.code, caught.value.field) == ("no_effect", "chat_template_kwargs")
