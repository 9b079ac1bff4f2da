"""Adapters that the loader refuses, with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from serving.adapters.test_loader import HEAD, base_of, save, state
from tiny import fill, llama
from torch import nn

from loralab.adapters import folder
from loralab.adapters.attach import attach
from loralab.adapters.methods import FullFineTune, LoRA, Prefix, Prompt
from loralab.errors import AdapterFileError
from loralab.models.load import Base
from loralab.serving.adapters.loader import AdapterLoader


def changed(place: Path, **record: Any) -> Path:
    """Change the record of a folder."""
    own = json.loads((place / folder.RECORD).read_text())
    own["base"] |= record.pop("base", {})
    (place / folder.RECORD).write_text(json.dumps({**own, **record}))
    return place


def refusal(base: Base, place: Path, **options: Any) -> AdapterFileError:
    before = state(base.model)
    loader = AdapterLoader(base, **options)
    good = save("llama" if base.kind == "causal-lm" else "bert", LoRA(rank=2), place.parent / "ok")
    with pytest.raises(AdapterFileError) as error:
        loader.load(folder.read(place))
    assert all(torch.equal(before[n], tensor) for n, tensor in base.model.state_dict().items())
    if not options:
        loader.load(folder.read(good))  # and goes on
    return error.value


def test_another_base_is_refused(tmp_path: Path) -> None:
    place = save("llama", LoRA(rank=2), tmp_path / "a")
    other = llama()
    nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(AdapterFileError) as error:
        AdapterLoader(base_of("llama", other)).load(folder.read(place))
    assert (error.value.code, error.value.field) == ("other_base", "base")
    changed(place, base={"dtype": "float16"})  # rounds its own way: not to be compared
    AdapterLoader(base_of("llama", other)).load(folder.read(place))


def test_the_base_in_another_dtype_is_the_same(tmp_path: Path) -> None:
    place = save("llama", LoRA(rank=2), tmp_path / "a")
    AdapterLoader(base_of("llama", llama().to(torch.bfloat16))).load(folder.read(place))


def test_the_fingerprint_is_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loralab.serving.adapters import loader as adapter_loader

    places = [save("llama", LoRA(rank=n), tmp_path / str(n)) for n in (2, 3)]
    calls, plain = [], adapter_loader.fingerprint
    monkeypatch.setattr(adapter_loader, "fingerprint", lambda *given: calls.append(1) or plain(*given))
    loader = AdapterLoader(base_of("llama"))
    for place in places * 2:
        loader.load(folder.read(place))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "method"), [("llama", FullFineTune()), ("bert", Prompt(tokens=3)), ("bert", Prefix(tokens=3))]
)
def test_what_cannot_be_served_says_why(name: str, method: Any, tmp_path: Path) -> None:
    assert refusal(base_of(name), save(name, method, tmp_path / "a")).code == "not_servable"


def test_the_head_of_a_classifier_is_not_for_a_language_model(tmp_path: Path) -> None:
    place = save("bert", LoRA(modules_to_save=HEAD), tmp_path / "a")
    assert refusal(base_of("llama"), place).code == "other_kind"
    (place / folder.RECORD).unlink()  # what another tool would have written
    assert refusal(base_of("llama"), place).code == "other_kind"


def test_new_tokens_and_other_packings_are_refused(tmp_path: Path) -> None:
    place = save("llama", LoRA(rank=2), tmp_path / "a", tokenizer={"new_tokens": ["<x>"]})
    assert refusal(base_of("llama"), place).code == "new_tokens"
    grown = llama()
    grown.resize_token_embeddings(52, mean_resizing=False)
    rows = fill(attach(grown, LoRA(rank=2, token_rows=(50, 51)))).save(tmp_path / "rows")
    assert refusal(base_of("llama"), rows).code == "new_tokens"
    packed = save("llama", LoRA(rank=2), tmp_path / "p", base={"quantize": "nf4"})
    assert refusal(base_of("llama"), packed).code == "other_quantize"
    plain = save("llama", LoRA(rank=2), tmp_path / "q", base={"quantize": "none"})
    assert refusal(base_of("llama"), plain, quantize="gguf").code == "other_quantize"


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("shape", [(3, 32), (2, 31), (2, 32, 1), None])
def test_tensors_that_do_not_fit_are_refused(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    place = save("llama", LoRA(rank=2), tmp_path / "a")
    tensors = safetensors.torch.load_file(place / folder.TENSORS)
    del tensors[KEY]
    if shape is not None:
        tensors[KEY] = torch.zeros(shape)
    safetensors.torch.save_file(tensors, place / folder.TENSORS)
    (place / folder.RECORD).unlink()
    loader = AdapterLoader(base_of("llama"))
    for _ in range(2):
        with pytest.raises(AdapterFileError) as error:
            loader.load(folder.read(place))
        assert (error.value.code, error.value.field) == ("does_not_fit", "path")
        assert KEY in str(error.value)


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path) -> None:
    place = save("gpt2", LoRA(rank=2), tmp_path / "a")
    assert refusal(base_of("llama"), place).code == "other_base"


def test_a_prefix_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    for method in (Prefix(tokens=40), Prompt(tokens=40)):
        place = save("gpt2", method, tmp_path / type(method).__name__)
        with pytest.raises(AdapterFileError) as error:
            AdapterLoader(base_of("gpt2")).load(folder.read(place))
        assert (error.value.code, error.value.field) == ("too_many_positions", "tokens")


@pytest.mark.parametrize(
    "record",
    [
        {"base": 5, "task": [], "tokenizer": "x"},
        {"base": {"kind": ["causal-lm"]}},
        {"base": {"fingerprint": {}}},
        {"base": {"quantize": []}},
        {"tokenizer": {"new_tokens": 5}},
        {"task": {"labels": 5}},
    ],
)
def test_records_of_odd_shape_raise_nothing_else(record: dict[str, Any], tmp_path: Path) -> None:
    place = save("bert", LoRA(modules_to_save=HEAD), tmp_path / "a")
    own = json.loads((place / folder.RECORD).read_text())
    (place / folder.RECORD).write_text(json.dumps({**own, **record}))
    try:
        AdapterLoader(base_of("bert")).load(folder.read(place))
    except AdapterFileError as error:
        assert str(place) in str(error)
