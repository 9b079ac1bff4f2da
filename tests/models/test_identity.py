"""What tells one tokenizer from another, and prompts as they were in training."""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loralab.errors import BaseMismatchWarning
from loralab.models.identity import as_trained, stored_config_digest, template_of, tokenizer_digest
from loralab.models.load import Base, load
from loralab.models.pictures import Pictures


@pytest.fixture(scope="module")
def base(tiny_llama_folder: Path) -> Base:
    return load(str(tiny_llama_folder))


def stored_of(base: Base) -> dict[str, Any]:
    return {
        "chat_template": template_of(base.tokenizer),
        "eos_token": base.tokenizer.eos_token,
        "digest": tokenizer_digest(base.tokenizer),
    }


def said(base: Base, stored: Mapping[str, Any]) -> tuple[Base, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = as_trained(base, stored, "here")
    assert all(issubclass(one.category, BaseMismatchWarning) for one in caught)
    return found, [str(one.message) for one in caught]


def test_nothing_changes_where_nothing_differs(base: Base) -> None:
    for stored in (stored_of(base), {}, {"digest": None, "eos_token": None}):
        found, texts = said(base, stored)
        assert found is base
        assert texts == []


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}"])
def test_the_stored_template_is_used_and_the_base_keeps_its_own(base: Base, template: str | None) -> None:
    own = base.tokenizer.chat_template
    found, texts = said(base, {**stored_of(base), "chat_template": template})
    assert len(texts) == 1
    assert found.tokenizer.chat_template == template
    assert found.model is base.model
    assert base.tokenizer.chat_template == own


def test_the_stored_end_of_text_is_used(base: Base) -> None:
    found, texts = said(base, {**stored_of(base), "eos_token": "<s>"})
    assert len(texts) == 1
    assert (found.tokenizer.eos_token_id, base.tokenizer.eos_token_id) == (1, 2)
    assert said(base, {**stored_of(base), "eos_token": "<of another>"}) == (base, [])


def test_of_several_templates_the_default_is_compared(base: Base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base.source)
    tokenizer.chat_template = {"default": base.tokenizer.chat_template, "tool_use": "x"}
    several = replace(base, tokenizer=tokenizer)
    assert stored_of(several) == stored_of(base)
    assert said(several, stored_of(base)) == (several, [])


def test_another_tokenizer_is_said(base: Base) -> None:
    found, texts = said(base, {**stored_of(base), "digest": "0" * 16})
    assert found is base
    assert len(texts) == 1


def edited(folder: Path, place: Path, edit: Any) -> str:
    shutil.copytree(folder, place)
    content = json.loads((place / "tokenizer.json").read_text())
    edit(content)
    (place / "tokenizer.json").write_text(json.dumps(content))
    return tokenizer_digest(AutoTokenizer.from_pretrained(place))


def test_a_digest_tells_vocabularies_and_ways_of_cutting_apart(tiny_llama_folder: Path, tmp_path: Path) -> None:
    def swap(content: Any) -> None:
        known = content["model"]["vocab"]
        known["10"], known["11"] = known["11"], known["10"]

    def by_characters(content: Any) -> None:
        content["pre_tokenizer"] = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}

    def alone(content: Any) -> None:
        content["added_tokens"][-1]["single_word"] = True

    edits = {"same": lambda _: None, "swap": swap, "cut": by_characters, "alone": alone}
    found = {n: edited(tiny_llama_folder, tmp_path / n, edit) for n, edit in edits.items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    assert tokenizer_digest(tokenizer) == found["same"]
    assert len({*found.values()}) == len(found)
    tokenizer(["a b", "a"], truncation=True, max_length=1, padding=True)
    tokenizer.chat_template = "another"
    assert tokenizer_digest(tokenizer) == found["same"]


def test_a_digest_of_how_pictures_are_read() -> None:
    found = {
        tokenizer_digest(Pictures(size=28)),
        tokenizer_digest(Pictures(size=56)),
        tokenizer_digest(Pictures(size=28, mean=(0.5, 0.5, 0.5))),
    }
    assert len(found) == 3


def test_a_configuration_is_its_content(tiny_llama_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "config.json"
    content = json.loads((tiny_llama_folder / "config.json").read_text())
    for own in (content, {**content, "transformers_version": "0", "dtype": "float16"}):
        place.write_text(json.dumps(dict(reversed(own.items())), indent=8))
        assert stored_config_digest(str(tmp_path)) == stored_config_digest(str(tiny_llama_folder))
    place.write_text(json.dumps({**content, "rms_norm_eps": 0.1}))
    assert stored_config_digest(str(tmp_path)) != stored_config_digest(str(tiny_llama_folder))
    assert stored_config_digest("no-such/model") is None
