"""merge(): a complete model folder that does what the unmerged model does, or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loralab.adapters import folder
from loralab.adapters.adapter import Adapter
from loralab.adapters.attach import attach
from loralab.adapters.folder import RECORD, read_json
from loralab.adapters.methods import Bottleneck, LoRA, Prefix
from loralab.artefacts.certificate import verify
from loralab.artefacts.comparison import logits_of
from loralab.artefacts.export import export
from loralab.artefacts.loaded_adapter import load_with_base
from loralab.artefacts.merge import merge
from loralab.errors import (
    AdapterFileError,
    AdapterStateError,
    BaseMismatchWarning,
    CertificateError,
    ConfigError,
    OutputError,
)
from loralab.models.kinds import CAUSAL, CLASSIFIER
from loralab.models.load import load
from loralab.models.quantize import QuantizedLinear
from loralab.models.quantize import quantize as pack

MakeAdapter = Callable[..., Path]


def unmerged_logits(adapter: Path) -> torch.Tensor:
    live = load_with_base(adapter)
    return logits_of(live.base.model, live.stored.record["sample"], live.base.kind)


def merged_logits(path: Path, adapter: Path, kind: str = CAUSAL) -> torch.Tensor:
    sample = folder.read(adapter).record["sample"]
    return logits_of(load(str(path), kind=kind).model, sample, kind)


def test_a_merged_model_is_complete_and_proven_by_a_fresh_process(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    found = merge(adapter, tmp_path / "out")
    assert found.passed
    torch.testing.assert_close(merged_logits(tmp_path / "out", adapter), unmerged_logits(adapter))
    base = load(str(tiny_llama_folder))
    sample = folder.read(adapter).record["sample"]
    assert not torch.allclose(logits_of(base.model, sample, CAUSAL), unmerged_logits(adapter))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == base.tokenizer.chat_template
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [2, 5]
    record = read_json(tmp_path / "out" / RECORD)
    assert record["kind"] == "model"
    assert record["adapter"] == folder.read(adapter).digest
    assert record["base"]["name"] == str(tiny_llama_folder)
    assert not list(tmp_path.glob("out.*"))
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    again = verify(tmp_path / "out")
    assert again.passed
    assert again.max_logit_difference <= found.max_logit_difference


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("config", "stays_tied"),
    [
        (LoRA(rank=2), True),
        (LoRA(rank=2, target_modules=["q_proj", "lm_head"]), False),
        (LoRA(rank=2, modules_to_save=["lm_head"]), False),
        (LoRA(rank=2, modules_to_save=["embed_tokens"]), False),
        (LoRA(rank=2, modules_to_save=["lm_head", "embed_tokens"]), False),
    ],
    ids=["neither", "head", "trained-head", "trained-embedding", "both-trained"],
)
def test_tied_embeddings_stay_tied_unless_one_was_adapted(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, config: LoRA, stays_tied: bool
) -> None:
    adapter = make_adapter(tiny_llama_folder, config)
    merge(adapter, tmp_path / "out")
    torch.testing.assert_close(merged_logits(tmp_path / "out", adapter), unmerged_logits(adapter))
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == stays_tied
    original: Any = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    touched = "embed_tokens" in config.modules_to_save
    embedding, base = merged.model.embed_tokens.weight, original.model.embed_tokens.weight
    assert torch.equal(embedding, base) != touched


@pytest.mark.usefixtures("in_this_process")
def test_gpt2_with_its_transposed_layers_and_no_template(
    make_adapter: MakeAdapter, tiny_gpt2_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_gpt2_folder, LoRA(rank=2, target_modules=["c_attn", "lm_head"]))
    merge(adapter, tmp_path / "out")
    torch.testing.assert_close(merged_logits(tmp_path / "out", adapter), unmerged_logits(adapter))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("config", [LoRA(init="pissa"), LoRA(scaling="alpha/sqrt(r)")])
def test_starts_and_scalings_are_merged_as_they_act(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, config: LoRA
) -> None:
    adapter = make_adapter(tiny_llama_folder, config)
    merge(adapter, tmp_path / "out")
    torch.testing.assert_close(merged_logits(tmp_path / "out", adapter), unmerged_logits(adapter))


@pytest.mark.usefixtures("in_this_process")
def test_a_classifier_keeps_its_trained_head_and_label_names(
    make_adapter: MakeAdapter, tiny_bert_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(
        tiny_bert_folder, LoRA(rank=2, modules_to_save=["classifier"]), kind=CLASSIFIER, labels=["no", "maybe", "yes"]
    )
    merge(adapter, tmp_path / "out")
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    trained = load_with_base(adapter).base.model.classifier.trained.weight
    assert torch.equal(merged.classifier.weight, trained)
    torch.testing.assert_close(merged_logits(tmp_path / "out", adapter, CLASSIFIER), unmerged_logits(adapter))


@pytest.mark.usefixtures("in_this_process")
def test_a_new_head_that_was_not_trained_comes_back_from_its_seed(
    make_adapter: MakeAdapter, tiny_bert_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(
        tiny_bert_folder, LoRA(rank=2, target_modules=["query"]), kind=CLASSIFIER, labels=["a", "b"], seed=3
    )
    assert merge(adapter, tmp_path / "out").passed
    trained_on = load(str(tiny_bert_folder), kind=CLASSIFIER, labels=["a", "b"], seed=3).model
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.classifier.weight, trained_on.classifier.weight)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_weights_have_the_precision_asked_for(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, precision: str
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    found = merge(adapter, tmp_path / "out", precision=precision)
    assert found.precision == precision
    assert found.max_logit_difference > 0
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert str(merged.dtype) == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    assert verify(tmp_path / "out").passed


@pytest.mark.usefixtures("in_this_process")
def test_the_precision_of_the_training_is_the_default(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, precision="bf16")
    assert merge(adapter, tmp_path / "out").precision == "bf16"


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_merge_that_lost_the_adapter_is_not_published(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def as_if_nothing_was_trained(adapter: Adapter) -> nn.Module:
        return adapter.detach()

    monkeypatch.setattr(Adapter, "merge_and_detach", as_if_nothing_was_trained)
    adapter = make_adapter(tiny_llama_folder)
    with pytest.raises(CertificateError) as error:
        merge(adapter, tmp_path / "out", precision=precision)
    assert (error.value.code, error.value.field) == ("not_equal", "artefact")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    assert read_json(tmp_path / "out.rejected" / RECORD)["certificate"]["passed"] is False


@pytest.mark.usefixtures("in_this_process")
def test_another_copy_of_the_base_can_be_named(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    adapter = make_adapter(tiny_llama_folder)
    load(str(tiny_llama_folder)).model.save_pretrained(moved)
    load(str(tiny_llama_folder)).tokenizer.save_pretrained(moved)
    merge(adapter, tmp_path / "out", model=str(moved))
    assert read_json(tmp_path / "out" / RECORD)["base"]["name"] == str(moved)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", None])
def test_the_merged_model_is_asked_as_the_adapter_was_in_training(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path, template: str | None
) -> None:
    adapter = make_adapter(tiny_llama_folder)
    folder.update_record(adapter, tokenizer={"chat_template": template, "eos_token": "<s>"})
    with pytest.warns(BaseMismatchWarning) as caught:
        merge(adapter, tmp_path / "out")
    assert len(caught) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (template, "<s>")
    assert read_json(tmp_path / "out" / RECORD)["training"] == {"seed": 0}
    verify(tmp_path / "out")


def test_a_place_that_is_taken_and_an_adapter_that_is_none_are_refused(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    adapter = make_adapter(tiny_llama_folder)
    with pytest.raises(OutputError) as error:
        merge(adapter, tmp_path / "taken")
    assert (error.value.code, error.value.field) == ("output_exists", "output")
    with pytest.raises(AdapterFileError) as error:
        merge(tmp_path / "adaptre", tmp_path / "out")
    assert (error.value.code, error.value.field) == ("no_adapter", "path")
    with pytest.raises(ConfigError) as error:
        merge(adapter, tmp_path / "out", precision="int3")
    assert (error.value.code, error.value.field) == ("invalid_choice", "precision")
    assert not list(tmp_path.glob("out*"))


def test_a_merge_that_overflows_writes_nothing(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_llama_folder, LoRA(rank=2, alpha=1e8))
    with pytest.raises(AdapterStateError) as error:
        merge(adapter, tmp_path / "out", precision="fp16")
    assert (error.value.code, error.value.field) == ("merged_not_finite", "weight")
    assert not list(tmp_path.glob("out*"))


def wide(**options: Any) -> Any:
    """Return a Llama of whole 4-bit blocks."""
    return llama(2, hidden_size=64, intermediate_size=128, vocab_size=100, eos_token_id=2, **options)


def wide_adapter(place: Path, save: Any, size: float, precision: str = "bf16") -> Path:
    """Write a QLoRA adapter with an update of some relative size."""
    folder = save("wide", wide(), True)
    base = load(str(folder), dtype=torch.bfloat16)
    pack(base.model, "nf4", "")
    adapter = attach(base.model, LoRA(rank=8))
    for module in adapter.modules.values():
        torch.nn.init.normal_(module.lora_B)
        length = size * module.base.dequantize().norm() / module.delta().norm()
        module.lora_B.data.mul_(length)
    record = {
        "base": {"name": str(folder), "kind": CAUSAL, "precision": precision, "quantize": "nf4"},
        "sample": [[5, 6, 7, 8], [9, 10, 11]],
    }
    return adapter.save(place, record)


def test_an_adapter_on_4_bits_merges_into_16(tmp_path: Path, save_tiny: Any) -> None:
    adapter = wide_adapter(tmp_path / "a", save_tiny, 0.05)
    certificate = merge(adapter, tmp_path / "out")
    assert certificate.passed
    assert certificate.relative_difference < 0.05
    merged = load(str(tmp_path / "out"), dtype=torch.bfloat16)
    assert not any(isinstance(m, QuantizedLinear) for m in merged.model.modules())


def test_4_bits_again_are_refused_where_they_lose_the_update(
    tmp_path: Path, save_tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of what cannot move along the grid of its base, such as DoRA
    monkeypatch.setattr("loralab.artefacts.merge.suits_grid", lambda adapter: False)
    adapter = wide_adapter(tmp_path / "a", save_tiny, 0.02)
    with pytest.raises(CertificateError) as error:
        merge(adapter, tmp_path / "out", quantize="nf4")
    assert (error.value.code, error.value.field) == ("update_lost", "quantize")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError) as error:
        merge(adapter, tmp_path / "out", quantize="int3")
    assert (error.value.code, error.value.field) == ("invalid_choice", "quantize")
    certificate = merge(adapter, tmp_path / "out", quantize="nf4", force=True)
    assert certificate.passed
    record = read_json(tmp_path / "out" / RECORD)
    assert len(record["retained"]) == 14
    assert max(record["retained"].values()) < 0.9
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert size < 0.6 * sum(p.numel() * 2 for p in wide().parameters())


def test_what_cannot_be_merged_says_so_before_it_works(tmp_path: Path, save_tiny: Any) -> None:
    folder = save_tiny("wide", wide(tie_word_embeddings=False), True)
    base = load(str(folder))
    for method in (Prefix(), Bottleneck()):
        adapter = attach(base.model, method)
        path = adapter.save(tmp_path / type(method).__name__, {"base": {"name": str(folder), "kind": CAUSAL}})
        adapter.detach()
        with pytest.raises(ConfigError) as error:
            merge(path, tmp_path / "out")
        assert (error.value.code, error.value.field) == ("cannot_merge", "adapter")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError) as error:
        export(tmp_path / "Bottleneck", tmp_path / "out", to="peft")
    assert (error.value.code, error.value.field) == ("not_in_peft", "method")


def test_a_live_model_is_merged_as_its_folder_is(
    make_adapter: MakeAdapter, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    path = make_adapter(tiny_llama_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    named = merge(path, tmp_path / "named")
    own = merge(path, tmp_path / "own", model=model, tokenizer=tokenizer)
    assert own.passed and own.max_logit_difference == named.max_logit_difference
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "own")]
    assert weights[0] == weights[1]
    record = read_json(tmp_path / "own" / RECORD)["base"]
    assert (record["name"], record["live"]) == (None, True)
    assert verify(tmp_path / "own").passed
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError) as refused:
        merge(path, tmp_path / "other", model=model)
    assert (refused.value.code, refused.value.field) == ("no_tokenizer", "tokenizer")
    with pytest.raises(ConfigError) as refused:
        verify(tmp_path / "own", base=tiny_llama_folder)
    assert (refused.value.code, refused.value.field) == ("no_effect", "base")
