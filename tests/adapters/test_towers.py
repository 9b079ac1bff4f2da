"""The preset "towers": layers of what reads pictures beside a language model."""

from pathlib import Path
from typing import Any

import pytest
from multimodal import FAMILIES
from tiny import fill, llama

from loralab.adapters.attach import attach
from loralab.adapters.left_out import TOWER
from loralab.adapters.load import load
from loralab.adapters.methods import LoRA
from loralab.adapters.targets import linear_names
from loralab.errors import LeftOutWarning, TargetError

every_family = pytest.mark.parametrize("name", FAMILIES)


def adapted(name: str, target: Any) -> Any:
    return attach(FAMILIES[name]()[0], LoRA(rank=2, target_modules=target))


@every_family
@pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning")
def test_towers_are_all_that_the_language_part_is_not(name: str) -> None:
    language = set(adapted(name, "all-linear").modules)
    towers = set(adapted(name, "towers").modules)
    both = adapted(name, ["all-linear", "towers"])
    assert towers and not towers & language
    assert set(both.modules) == towers | language
    model = FAMILIES[name]()[0]
    assert list(both.modules) == [path for path in linear_names(model) if path != "lm_head"]
    assert TOWER not in both.left_out.values()


@pytest.mark.filterwarnings("ignore::loralab.errors.LeftOutWarning")
def test_a_list_may_join_towers_with_names_and_presets() -> None:
    towers = set(adapted("llava", "towers").modules)
    named = adapted("llava", ["towers", "language_model.layers.0.self_attn.q_proj"])
    assert set(named.modules) == towers | {"model.language_model.layers.0.self_attn.q_proj"}
    attention = set(adapted("llava", "attention").modules)
    assert set(adapted("llava", ["attention", "towers"]).modules) == towers | attention


@pytest.mark.parametrize("target", ["towers", ["all-linear", "towers"]])
def test_a_model_without_towers_has_none_to_adapt(target: Any) -> None:
    with pytest.raises(TargetError) as caught:
        attach(llama(), LoRA(target_modules=target))
    assert (caught.value.code, caught.value.field) == ("no_towers", "target_modules")


@every_family
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_folder_with_towers_is_read_again_and_by_peft(name: str, tmp_path: Path) -> None:
    import peft
    from safetensors.torch import load_file

    adapter = fill(adapted(name, ["all-linear", "towers"]))
    adapter.save(tmp_path / "adapter")
    again = load(FAMILIES[name]()[0], tmp_path / "adapter")
    assert list(again.modules) == list(adapter.modules)
    model = peft.PeftModel.from_pretrained(FAMILIES[name]()[0], tmp_path / "adapter")
    theirs = {key for key in model.state_dict() if ".lora_" in key}
    assert len(theirs) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(adapter.modules)


def test_without_the_preset_they_are_left_out_and_named() -> None:
    with pytest.warns(LeftOutWarning, match="tower"):
        adapter = adapted("idefics3", "all-linear")
    assert TOWER in adapter.left_out.values()
