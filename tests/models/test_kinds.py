"""A family becomes what it can be, or is refused by name; from its configuration alone."""

from typing import Any

import pytest
import transformers
from transformers import PreTrainedConfig

from loralab.errors import ModelError
from loralab.models.kinds import (
    CAUSAL,
    CLASSIFIER,
    IMAGE_TEXT,
    KINDS,
    LEARNERS,
    MULTI_LABEL,
    REGRESSION,
    SENTENCES,
    SEQ2SEQ,
    TAGGER,
    VISION,
    class_for,
    head_options,
    kind_of,
    require_kind,
    require_text_or_pictures,
)
from loralab.tasks.formats import FORMATS
from loralab.tasks.kinds.registry import kinds, kinds_for


def config(name: str, saved_as: str, **fields: Any) -> PreTrainedConfig:
    """A configuration of a family, as the folder of one of its classes has it."""
    made: PreTrainedConfig = getattr(transformers, f"{name}Config")(**fields)
    made.architectures = [saved_as]
    return made


NATURAL = [
    ("Llama", "LlamaForCausalLM", {}, CAUSAL),
    ("Llama", "LlamaForSequenceClassification", {}, CLASSIFIER),
    ("Qwen3", "Qwen3Model", {}, CAUSAL),
    ("Bert", "BertForMaskedLM", {}, CLASSIFIER),
    ("Bert", "BertLMHeadModel", {}, CLASSIFIER),
    ("Bert", "BertLMHeadModel", {"is_decoder": True}, CAUSAL),
    ("Bert", "BertForTokenClassification", {}, TAGGER),
    ("XLMRobertaXL", "XLMRobertaXLForMaskedLM", {}, CLASSIFIER),
    ("RobertaPreLayerNorm", "RobertaPreLayerNormModel", {}, CLASSIFIER),
    ("BigBird", "BigBirdForMaskedLM", {}, CLASSIFIER),
    ("Flaubert", "FlaubertWithLMHeadModel", {}, CLASSIFIER),
    ("XLM", "XLMWithLMHeadModel", {}, CLASSIFIER),
    ("XLM", "XLMWithLMHeadModel", {"causal": True}, CAUSAL),
    ("XLNet", "XLNetLMHeadModel", {}, CLASSIFIER),
    ("Gemma3Text", "Gemma3TextModel", {"use_bidirectional_attention": True}, CLASSIFIER),
    ("Gemma3Text", "Gemma3ForCausalLM", {}, CAUSAL),
    ("T5", "T5ForConditionalGeneration", {}, SEQ2SEQ),
    ("T5", "T5ForSequenceClassification", {}, CLASSIFIER),
    ("Bart", "BartForConditionalGeneration", {}, SEQ2SEQ),
    ("Bart", "BartForCausalLM", {"is_decoder": True, "is_encoder_decoder": False}, CAUSAL),
    ("Bert", "BertForSequenceClassification", {"num_labels": 1}, REGRESSION),
    ("Bert", "BertForSequenceClassification", {"problem_type": "multi_label_classification"}, MULTI_LABEL),
    ("Dinov2", "Dinov2Model", {}, VISION),
    ("CLIP", "CLIPModel", {}, VISION),
    ("Gemma3", "Gemma3ForConditionalGeneration", {}, IMAGE_TEXT),
    ("Llava", "LlavaForConditionalGeneration", {}, IMAGE_TEXT),
    ("Mistral3", "Mistral3ForConditionalGeneration", {}, IMAGE_TEXT),
    ("Qwen2VL", "Qwen2VLForConditionalGeneration", {}, IMAGE_TEXT),
]


@pytest.mark.parametrize(("name", "saved_as", "fields", "kind"), NATURAL)
def test_a_family_is_what_its_attention_makes_it(name: str, saved_as: str, fields: dict[str, Any], kind: str) -> None:
    found = config(name, saved_as, **fields)
    require_text_or_pictures("m", found)
    assert kind_of(found) == kind
    if kind in KINDS:
        require_kind("m", found, kind)


SENSES = [
    ("Qwen2Audio", "Qwen2AudioForConditionalGeneration", "multimodal_unsupported"),
    ("Whisper", "WhisperForConditionalGeneration", "input_unsupported"),
    ("Speech2Text", "Speech2TextForConditionalGeneration", "input_unsupported"),
    ("Moonshine", "MoonshineForConditionalGeneration", "input_unsupported"),
    ("Pix2Struct", "Pix2StructForConditionalGeneration", "multimodal_unsupported"),
    ("VisionEncoderDecoder", "VisionEncoderDecoderModel", "multimodal_unsupported"),
    ("SpeechEncoderDecoder", "SpeechEncoderDecoderModel", "multimodal_unsupported"),
    ("SeamlessM4T", "SeamlessM4TForSpeechToText", "multimodal_unsupported"),
    ("SpeechT5", "SpeechT5ForSpeechToText", "input_unsupported"),
    ("Florence2", "Florence2ForConditionalGeneration", "multimodal_unsupported"),
    ("T5Gemma2", "T5Gemma2ForConditionalGeneration", "multimodal_unsupported"),
    ("Musicgen", "MusicgenForConditionalGeneration", "multimodal_unsupported"),
    ("Wav2Vec2", "Wav2Vec2ForCTC", "input_unsupported"),
    ("CLIPVision", "CLIPVisionModel", "input_unsupported"),
    ("PatchTST", "PatchTSTForPrediction", "input_unsupported"),
]


@pytest.mark.parametrize(("name", "saved_as", "code"), SENSES)
def test_what_is_not_read_here_is_refused_by_the_name_of_its_class(name: str, saved_as: str, code: str) -> None:
    found = config(name, saved_as)
    for refuse in (require_text_or_pictures, lambda *named: require_kind(*named, CAUSAL)):
        with pytest.raises(ModelError) as error:
            refuse("folder", found)
        assert (error.value.code, error.value.field) == (code, "model")
        assert saved_as in str(error.value)


@pytest.mark.parametrize(
    ("name", "saved_as", "kind", "code"),
    [
        ("T5", "T5ForConditionalGeneration", CAUSAL, "seq2seq_unsupported"),
        ("T5", "T5ForConditionalGeneration", SENTENCES, "seq2seq_unsupported"),
        ("Bart", "BartForConditionalGeneration", CAUSAL, "seq2seq_unsupported"),
        ("Pegasus", "PegasusForConditionalGeneration", CLASSIFIER, "kind_unsupported"),
        ("XLNet", "XLNetLMHeadModel", CAUSAL, "not_causal"),
        ("Roberta", "RobertaForMaskedLM", CAUSAL, "not_causal"),
        ("BertGeneration", "BertGenerationDecoder", CAUSAL, "not_causal"),
        ("Mamba", "MambaForCausalLM", CLASSIFIER, "kind_unsupported"),
        ("Dinov2", "Dinov2Model", CLASSIFIER, "kind_unsupported"),
        ("Bert", "BertModel", VISION, "kind_unsupported"),
    ],
)
def test_a_kind_that_a_family_cannot_be_is_refused(name: str, saved_as: str, kind: str, code: str) -> None:
    with pytest.raises(ModelError) as error:
        require_kind("folder", config(name, saved_as), kind)
    assert (error.value.code, error.value.field) == (code, "model")


@pytest.mark.parametrize("name", ["T5", "MT5", "Bart", "MBart"])
def test_an_encoder_decoder_can_classify(name: str) -> None:
    found = config(name, f"{name}ForConditionalGeneration")
    require_kind("folder", found, CLASSIFIER)
    assert class_for(found, CLASSIFIER).__name__ == f"{name}ForSequenceClassification"


def test_a_family_of_several_base_classes_has_one() -> None:
    assert class_for(config("Funnel", "FunnelModel"), SENTENCES).__name__ == "FunnelModel"


def test_classes_that_are_counted_and_not_named_are_counted() -> None:
    found = config("Pvt", "PvtForImageClassification")
    found.id2label = None
    with pytest.raises(ModelError):
        head_options("folder", found, VISION, ["a", "b"])


def test_models_and_rows_agree_on_which_kinds_there_are_and_what_they_learn_from() -> None:
    assert set(kinds()) == set(KINDS)
    for form in FORMATS:
        assert {kind.name for kind in kinds_for(form)} == set(LEARNERS.get(form, (CAUSAL,))), form
