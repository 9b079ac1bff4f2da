"""What a folder must hold is what its own class has; the rest of another class may be new."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertGenerationConfig,
    BertGenerationDecoder,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ErnieConfig,
    ErnieForMaskedLM,
    LevitConfig,
    LevitForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from loralab.errors import ModelError
from loralab.models.kinds import CLASSIFIER, SENTENCES
from loralab.models.load import kind_for, load, natural_kind

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
T5_SIZES: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 101,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART_SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
FAMILIES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "roberta": (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), ("classifier",)),
    "ernie": (lambda: ErnieForMaskedLM(ErnieConfig(**SIZES)), ("ernie.pooler", "classifier")),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), ("bert.pooler", "classifier")),
    "distilbert": (
        lambda: DistilBertForMaskedLM(
            DistilBertConfig(dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=101, pad_token_id=2)
        ),
        ("pre_classifier", "classifier"),
    ),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)), ("classification_head",)),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART_SIZES)), ("classification_head",)),
}


def ended(folder: Path) -> None:
    """Give a folder a tokenizer that ends every text, as that of an encoder-decoder does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture
def saved(save_tiny: Any) -> Callable[[str], Path]:
    def save(family: str) -> Path:
        torch.manual_seed(0)
        folder: Path = save_tiny(family, FAMILIES[family][0](), False)
        if family in ("t5", "bart"):
            ended(folder)
        return folder

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_folder_becomes_a_classifier_and_says_what_is_new(family: str, saved: Callable[[str], Path]) -> None:
    folder = str(saved(family))
    assert kind_for(folder, "text-label") == CLASSIFIER
    base = load(folder, kind=CLASSIFIER, labels=["a", "b"])
    assert set(base.new) == set(FAMILIES[family][1])


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_what_its_own_class_has_must_be_in_the_file(family: str, saved: Callable[[str], Path]) -> None:
    folder = saved(family)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "1" in name and name.endswith("weight"))
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(str(folder), kind=CLASSIFIER, labels=["a", "b"])
    assert error.value.code == "model_incomplete"
    assert lost.rpartition(".")[0] in str(error.value)


def test_a_pooler_that_was_lost_is_not_taken_for_a_new_one(tiny_bert_folder: Path) -> None:
    tensors = load_file(tiny_bert_folder / "model.safetensors")
    assert load(str(tiny_bert_folder), labels=["a", "b"]).new == ("classifier",)
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    try:
        save_file(kept, tiny_bert_folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError) as error:
            load(str(tiny_bert_folder), labels=["a", "b"])
    finally:
        save_file(tensors, tiny_bert_folder / "model.safetensors", metadata={"format": "pt"})
    assert error.value.code == "model_incomplete"


def test_half_of_a_backbone_is_no_new_head(save_tiny: Any) -> None:
    folder = save_tiny("t5-encoder", T5EncoderModel(T5Config(**T5_SIZES)), False)
    ended(folder)
    with pytest.raises(ModelError) as error:
        load(str(folder), kind=CLASSIFIER, labels=["a", "b"])
    assert error.value.code == "model_incomplete"
    assert "decoder" in str(error.value)


def test_the_head_for_tags_makes_way_for_one_of_classes(save_tiny: Any) -> None:
    model = BertForTokenClassification(BertConfig(**SIZES, num_labels=5))
    folder = str(save_tiny("tagger", model, False))
    assert kind_for(folder, "text-label") == CLASSIFIER
    base = load(folder, kind=CLASSIFIER, labels=["a", "b"])
    assert base.model.classifier.out_features == 2
    assert set(base.new) == {"bert.pooler", "classifier"}


def test_an_encoder_decoder_answers_prompts_and_is_refused_for_conversations_and_pairs(
    saved: Callable[[str], Path],
) -> None:
    folder = str(saved("t5"))
    assert natural_kind(folder) == "seq2seq"
    for form in ("prompt-completion", "instruction"):
        assert kind_for(folder, form) == "seq2seq"
    assert kind_for(folder, "text-label", "seq2seq") == "seq2seq"
    for form in ("messages", "text"):
        with pytest.raises(ModelError) as error:
            kind_for(folder, form)
        assert error.value.code == "seq2seq_unsupported"
    with pytest.raises(ModelError) as error:
        load(folder, kind=SENTENCES)
    assert error.value.code == "seq2seq_unsupported"


@pytest.mark.parametrize("family", ["bert-generation", "xlnet"])
def test_a_language_model_that_is_an_encoder_is_refused_for_answers(family: str, save_tiny: Any) -> None:
    made = {
        "bert-generation": lambda: BertGenerationDecoder(BertGenerationConfig(**SIZES)),
        "xlnet": lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=101, d_model=32, n_layer=1, n_head=4, d_inner=48)),
    }
    with pytest.raises(ModelError) as error:
        kind_for(str(save_tiny(family, made[family](), False)), "prompt-completion")
    assert error.value.code == "not_causal"


def test_an_encoder_decoder_needs_a_tokenizer_that_ends_a_text(
    saved: Callable[[str], Path], tiny_bert_folder: Path
) -> None:
    folder = saved("bart")
    AutoTokenizer.from_pretrained(tiny_bert_folder).save_pretrained(folder)
    with pytest.raises(ModelError) as error:
        load(str(folder), kind=CLASSIFIER, labels=["a", "b"])
    assert error.value.code == "tokenizer_unsuited"


def test_batch_norms_go_by_the_statistics_of_the_base_in_training_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LevitConfig(
        image_size=64, hidden_sizes=[16] * 3, num_attention_heads=[2] * 3, depths=[1] * 3, key_dim=[8] * 3
    )
    LevitForImageClassification(config).save_pretrained(tmp_path)
    model = load(str(tmp_path)).model
    pixels = torch.randn(2, 3, 64, 64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        expected = model(pixels).logits
        assert torch.equal(model.train()(pixels).logits, expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
