"""A name becomes a model, or one clear line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    FNetConfig,
    FNetForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from loralab.errors import ConfigError, ModelError
from loralab.models import convert, source
from loralab.models import load as models
from loralab.models.catalog import MODELS, NamedModel, in_package
from loralab.models.device import resolve_precision
from loralab.models.kinds import CAUSAL, CLASSIFIER
from loralab.models.load import load, natural_kind, parse_dtype
from loralab.models.source import resolve

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
NAMES = {0: "negative", 1: "positive"}


@pytest.fixture
def copied(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "tinyllama"))


@pytest.fixture
def classifier(save_tiny: Any) -> Path:
    """A classifier whose head knows its classes by name."""
    config = BertConfig(**SIZES, id2label=NAMES, label2id={"negative": 0, "positive": 1})
    return save_tiny("classifier", BertForSequenceClassification(config), False)


def rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}), encoding="utf-8")


def head(base: models.Base) -> torch.Tensor:
    weight: torch.Tensor = base.model.classifier.weight
    return weight


def test_a_folder_gives_model_and_tokenizer(tiny_llama_folder: Path) -> None:
    base = load(str(tiny_llama_folder))
    assert base.kind == CAUSAL
    assert not base.model.training
    assert all(p.requires_grad for p in base.model.parameters())
    assert base.tokenizer.padding_side == "right"
    assert base.name == str(tiny_llama_folder)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, reference(ids).logits)


def test_a_relative_folder_is_remembered_by_its_full_name(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    assert load(copied.name).name == str(copied)


def test_a_tokenizer_without_padding_pads_with_its_end(copied: Path) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        fields = json.loads((copied / name).read_text())
        fields = {k: v for k, v in fields.items() if k not in ("pad_token", "pad_token_id")}
        (copied / name).write_text(json.dumps(fields), encoding="utf-8")
    base = load(str(copied))
    assert base.tokenizer.pad_token == base.tokenizer.eos_token
    assert base.model.config.pad_token_id == base.tokenizer.eos_token_id


def test_padding_that_the_model_has_no_row_for_is_replaced_by_the_end(copied: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copied)
    base = load(str(copied))
    assert tokenizer.pad_token_id == base.model.get_input_embeddings().num_embeddings
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id


@pytest.mark.parametrize("pad", [0, 2, None])
def test_a_padded_text_is_put_into_the_class_that_it_is_put_into_alone(pad: int | None, save_tiny: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, id2label=NAMES, label2id={"negative": 0, "positive": 1}, pad_token_id=pad)
    folder = save_tiny("classifier", LlamaForSequenceClassification(config), False)
    base = load(str(folder))
    pad = base.tokenizer.pad_token_id
    ids = torch.tensor([[5, 6, 7, pad, pad], [5, 6, 7, 8, 9]])
    with torch.no_grad():
        both = base.model(input_ids=ids, attention_mask=(ids != pad).long()).logits
        alone = base.model(input_ids=ids[:1, :3]).logits
    assert torch.allclose(both[:1], alone, atol=1e-6)


@pytest.mark.parametrize("precision", models.DTYPES)
def test_the_dtype_is_as_asked(tiny_llama_folder: Path, precision: str) -> None:
    base = load(str(tiny_llama_folder), dtype=parse_dtype(precision))
    assert {p.dtype for p in base.model.parameters()} == {parse_dtype(precision)}


@pytest.mark.parametrize("precision", models.DTYPES)
def test_parameters_that_are_made_in_fp32_are_as_asked_too(save_tiny: Any, precision: str) -> None:
    config = XLNetConfig(vocab_size=101, d_model=32, n_layer=1, n_head=4, d_inner=48)
    folder = save_tiny("xlnet", XLNetLMHeadModel(config), False)
    model = load(str(folder), labels=["a", "b"], dtype=parse_dtype(precision)).model
    assert {p.dtype for p in model.parameters()} == {parse_dtype(precision)}
    ids = torch.tensor([[5, 6, 7], [5, 6, 2]])
    assert model(input_ids=ids, attention_mask=(ids != 2).long()).logits.isfinite().all()


def test_a_family_that_computes_in_fp32_alone_says_so(save_tiny: Any) -> None:
    sizes = {key: size for key, size in SIZES.items() if key != "num_attention_heads"}
    folder = str(save_tiny("fnet", FNetForMaskedLM(FNetConfig(**sizes)), False))
    with pytest.raises(ModelError) as error:
        load(folder, labels=["a", "b"], dtype=torch.bfloat16)
    assert (error.value.code, error.value.field) == ("precision_unsupported", "precision")
    assert load(folder, labels=["a", "b"]).kind == CLASSIFIER


def test_an_unknown_precision_proposes_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        parse_dtype("bf61")
    assert (error.value.code, error.value.field) == ("invalid_choice", "precision")


def test_nothing_is_printed_while_loading(tiny_bert_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(tiny_bert_folder), labels=["a", "b", "c"])  # a new head: transformers reports it
    assert capfd.readouterr() == ("", "")


def test_loading_leaves_the_users_random_numbers_alone(tiny_bert_folder: Path) -> None:
    before = torch.get_rng_state()
    load(str(tiny_bert_folder), labels=["a", "b"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kind_is_read_from_the_configuration_alone(
    tiny_gpt2_folder: Path, tiny_bert_folder: Path, classifier: Path, tmp_path: Path
) -> None:
    assert natural_kind(str(tiny_gpt2_folder)) == CAUSAL
    assert natural_kind(str(tiny_bert_folder)) == CLASSIFIER
    assert natural_kind(str(classifier)) == CLASSIFIER
    masked = Path(shutil.copytree(tiny_bert_folder, tmp_path / "masked"))
    rewrite_config(masked, architectures=["BertForMaskedLM"])
    (masked / "model.safetensors").write_bytes(b"")
    assert natural_kind(str(masked)) == CLASSIFIER


def test_an_encoder_becomes_a_classifier_with_a_seeded_head(tiny_bert_folder: Path) -> None:
    name = str(tiny_bert_folder)
    one, again, other = (load(name, labels=["a", "b", "c"], seed=s) for s in (1, 1, 2))
    assert one.model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert one.model.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert torch.equal(head(one), head(again))
    assert not torch.equal(head(one), head(other))


def test_a_causal_model_can_classify(tiny_gpt2_folder: Path) -> None:
    base = load(str(tiny_gpt2_folder), kind=CLASSIFIER, labels=["a", "b"])
    ids = torch.tensor([[5, 6, 7], [5, 6, base.tokenizer.pad_token_id]])
    assert base.model(input_ids=ids, attention_mask=(ids != 2).long()).logits.shape == (2, 2)


@pytest.mark.parametrize("labels", [(), ("negative", "positive"), ("LABEL_0", "LABEL_1")])
def test_a_head_that_is_there_is_kept_with_its_names(classifier: Path, labels: tuple[str, ...]) -> None:
    first, again = (load(str(classifier), labels=labels, seed=seed) for seed in (0, 1))
    assert torch.equal(head(first), head(again))
    assert first.model.config.id2label == NAMES


def test_a_head_without_names_takes_those_of_the_data(classifier: Path) -> None:
    rewrite_config(classifier, id2label={0: "LABEL_0", 1: "LABEL_1"})
    first, again = (load(str(classifier), labels=["a", "b"], seed=seed) for seed in (0, 1))
    assert first.model.config.id2label == {0: "a", 1: "b"}
    assert torch.equal(head(first), head(again))


@pytest.mark.parametrize("labels", [("positive", "negative"), ("a", "b", "c")])
def test_a_head_for_other_classes_is_refused(classifier: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as error:
        load(str(classifier), labels=labels)
    assert (error.value.code, error.value.field) == ("other_labels", "model")


def test_a_classifier_that_lost_its_head_is_refused(tiny_bert_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert_folder, tmp_path / "headless"))
    rewrite_config(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(ModelError) as error:
        load(str(folder))
    assert (error.value.code, error.value.field) == ("model_incomplete", "model")


def test_a_model_of_another_kind_is_refused(tiny_bert_folder: Path) -> None:
    with pytest.raises(ModelError) as found:
        load(str(tiny_bert_folder), kind=CAUSAL)
    assert found.value.code == "not_causal"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", "empty_name"),
        ("smolm2-135m", "unknown_model"),
        ("no/such/folder", "unknown_model"),
        (__file__, "not_a_model"),
    ],
)
def test_a_model_that_is_not_there(name: str, code: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert error.value.code == code


def test_a_folder_that_is_not_there_is_answered_with_its_neighbour(copied: Path) -> None:
    with pytest.raises(ModelError) as error:
        load(str(copied.with_name("tinylama")))
    assert (error.value.code, error.value.field) == ("unknown_model", "model")


def test_a_package_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(MODELS["smollm2-135m"], locate=lambda: None)
    monkeypatch.setattr(source, "MODELS", {"smollm2-135m": absent})
    with pytest.raises(ModelError) as error:
        natural_kind("smollm2-135m")
    assert (error.value.code, error.value.field) == ("not_installed", "model")


def test_a_short_name_is_meant_even_beside_a_folder_of_that_name(
    tiny_bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package_of_mine"
    shutil.copytree(tiny_bert_folder, package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    own = replace(MODELS["minilm-l6"], locate=in_package(package.name, "model"))
    monkeypatch.setattr(source, "MODELS", {"minilm-l6": own})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-l6").mkdir()
    base = load("minilm-l6")
    assert base.name == "minilm-l6"
    assert base.source == str(package / "model")


def test_a_file_in_a_format_of_its_own_is_converted_once(
    tiny_bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written = tmp_path / "weights.own", []
    file.write_bytes(b"one")

    def write(given: Path, folder: Path) -> None:
        written.append(given)
        shutil.copytree(tiny_bert_folder, folder)

    own = NamedModel(
        name="own", kind="encoder", parameters=1, licence="", description="", get="", locate=lambda: file, convert=write
    )
    monkeypatch.setattr(source, "MODELS", {"own": own})
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    first = resolve("own")
    assert resolve("own") == first and written == [file]
    assert (Path(first) / "config.json").is_file()
    file.write_bytes(b"another")
    assert resolve("own") != first and written == [file, file]


def test_a_hub_that_cannot_be_asked_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "model_info", refuse)
    with pytest.raises(ModelError) as found:
        load("nobody/nothing")
    assert (found.value.code, found.value.field) == ("no_such_model", "model")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("damage", ["half", "noise", "nothing"])
def test_damaged_weights_are_refused(copied: Path, damage: str) -> None:
    file = copied / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"half": content[:5000], "noise": b"noise" * 99, "nothing": b""}[damage])
    with pytest.raises(ModelError) as error:
        load(str(copied))
    assert (error.value.code, error.value.field) == ("damaged", "model")


@pytest.mark.parametrize(
    ("file", "code"),
    [("config.json", "no_config"), ("model.safetensors", "no_weights"), ("tokenizer*", "no_tokenizer")],
)
def test_a_folder_without_its_files_is_refused(copied: Path, file: str, code: str) -> None:
    for found in copied.glob(file):
        found.unlink()
    with pytest.raises(ModelError) as error:
        load(str(copied))
    assert error.value.code == code


def test_weights_as_a_pickle_are_refused(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        load(str(copied))
    assert (error.value.code, error.value.field) == ("pickle", "model")


def test_code_that_comes_with_a_model_is_never_run(copied: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (copied / "own.py").write_text(code, encoding="utf-8")
    rewrite_config(copied, model_type="own", auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(ModelError) as error:
        load(str(copied))
    assert (error.value.code, error.value.field) == ("unreadable", "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"num_hidden_layers": 3}, "model_incomplete"),
        ({"intermediate_size": 48}, "model_misshapen"),
        ({"model_type": "lama"}, "unreadable"),
    ],
)
def test_weights_and_configuration_must_agree(copied: Path, fields: dict[str, Any], code: str) -> None:
    rewrite_config(copied, **fields)
    with pytest.raises(ModelError) as error:
        load(str(copied))
    assert error.value.code == code


@pytest.mark.parametrize("layers", [300, 10**9])
def test_more_layers_than_weights_could_fill_are_not_built(copied: Path, layers: int) -> None:
    rewrite_config(copied, num_hidden_layers=layers)
    with pytest.raises(ModelError):
        load(str(copied))


@pytest.mark.parametrize("name", ["max_window_layers", "max_depth", "kv_heads_per_layer"])
def test_what_counts_no_layers_is_not_compared_with_the_weights(copied: Path, name: str) -> None:
    rewrite_config(copied, **{name: 200 if name.startswith("kv") else 10**9})
    assert load(str(copied)).kind == CAUSAL


def test_a_small_qwen3_keeps_its_usual_window(save_tiny: Any) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8))
    folder = save_tiny("qwen3", model, False)
    assert load(str(folder)).model.config.max_window_layers == 28


def test_a_configuration_without_padding_is_given_one(save_tiny: Any) -> None:
    config = RwkvConfig(
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        vocab_size=101,
        context_length=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = load(str(save_tiny("rwkv", RwkvForCausalLM(config), False)))
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 2


def test_a_model_without_a_table_of_tokens_is_loaded(save_tiny: Any) -> None:
    config = CanineConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0
    )
    model = CanineForSequenceClassification(config)
    assert load(str(save_tiny("canine", model, False))).tokenizer.pad_token == "</s>"


def test_a_vision_model_without_classes_is_not_asked_for_a_tokenizer(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    for form in ("image-label", "text-label"):
        with pytest.raises(ModelError) as error:
            models.kind_for(str(tmp_path), form)
        assert error.value.code == "input_unsupported"


def test_only_what_is_a_model_is_proposed(copied: Path) -> None:
    for name in ("tinylama2", "tinylamas"):
        copied.with_name(name).mkdir()
    with pytest.raises(ModelError) as error:
        resolve(str(copied.with_name("tinylama")))
    assert error.value.code == "unknown_model"
    assert str(error.value).count("tinyl") == 2  # what was asked for, and the one that is one


def test_the_mapping_that_is_proposed_is_read_as_one(tiny_llama_folder: Path) -> None:
    with pytest.raises(ModelError) as error:
        models.kind_for(str(tiny_llama_folder), "pair")
    proposed = re.search(r"--map (\S+)", str(error.value))
    assert proposed is not None
    assert dict(part.split("=") for part in proposed[1].split(",")) == {"prompt": "text_a", "completion": "text_b"}


def test_precision_is_bf16_only_where_a_gpu_multiplies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for real in (True, False):

        def supported(including_emulation: bool = True, real: bool = real) -> bool:
            return real or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert resolve_precision("auto") == ("bf16" if real else "fp32")


def test_a_damaged_gguf_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError) as error:
        load(str(tmp_path / "x.gguf"))
    assert (error.value.code, error.value.field) == ("damaged", "model")
    assert not (tmp_path / "cache" / "models").exists()


def test_the_first_of_two_conversions_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for own in ("model.1", "model.2"):
        (tmp_path / own).mkdir()
        (tmp_path / own / "config.json").write_text(own, encoding="utf-8")
        assert convert._first(tmp_path / own, folder) == folder
    assert (folder / "config.json").read_text() == "model.1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_smollm2_is_converted_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    base = load("smollm2-135m")
    (folder,) = (tmp_path / "models").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert load("smollm2-135m", dtype=torch.bfloat16).source == base.source == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert sum(p.numel() for p in base.model.parameters()) == MODELS["smollm2-135m"].parameters
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.tokenizer.eos_token == base.tokenizer.pad_token == "<|im_end|>"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = base.model.generate(**ids, max_new_tokens=10, do_sample=False)
    assert "Paris" in base.tokenizer.decode(answer[0])


@pytest.mark.slow
def test_minilm_loads_as_a_classifier() -> None:
    base = load("minilm-l6", labels=["a", "b"])
    assert base.model.classifier.out_features == 2
    encoder = base.model.bert
    assert sum(p.numel() for p in encoder.parameters()) == MODELS["minilm-l6"].parameters


@pytest.mark.parametrize(("file", "code"), [("adapter_config.json", "adapter_as_model"), ("notes.txt", "no_config")])
def test_an_adapter_in_the_place_of_a_model_is_named(file: str, code: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError) as raised:
        load(str(tmp_path))
    assert (raised.value.code, raised.value.field) == (code, "model")
