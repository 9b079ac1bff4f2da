"""What a model is: a language model, or an encoder that ends in classes or in sentences.

All from its configuration, without its weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from loralab.errors import ModelError, some

CAUSAL, CLASSIFIER = "causal-lm", "sequence-classification"
TAGGER, VISION, SENTENCES = "token-classification", "image-classification", "sentence-encoder"
KINDS = (CAUSAL, CLASSIFIER, TAGGER, VISION, SENTENCES)
# kinds that end in classes, and how transformers calls a model that has such a head
HEADS = {CLASSIFIER: "ForSequenceClassification", TAGGER: "ForTokenClassification",
          VISION: "ForImageClassification"}  # fmt: skip
# encoders that transformers can also run as a decoder: their weights were not trained for it
_ENCODERS = ("bert", "roberta", "electra", "camembert", "xlm-roberta", "data2vec-text", "ernie",
             "megatron-bert", "rembert", "roformer", "xmod", "mega", "nezha")  # fmt: skip


def kind_of(config: Any) -> str:
    """The kind of a model that nobody has asked to be another one."""
    architectures = config.architectures or [""]
    if any(found.endswith("ForCausalLM") or "LMHead" in found for found in architectures):
        return CAUSAL
    if config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return VISION
    if has_head(config, TAGGER):
        return TAGGER
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = has_head(config, CLASSIFIER) or config.model_type in _ENCODERS
    return CAUSAL if decoder and not encoder else CLASSIFIER


def said(kind: str) -> str:
    """A kind in words."""
    names = {CAUSAL: "a language model", VISION: "a vision model"}
    return names.get(kind, "an encoder of text")


def has_head(config: Any, kind: str) -> bool:
    """Whether a model ends in the classes of a kind already."""
    return any(name.endswith(HEADS[kind]) for name in config.architectures or [])


def head_options(name: str, config: Any, kind: str, labels: Sequence[str]) -> dict[str, Any]:
    """What from_pretrained must know of the classes; a head that is there keeps its own.

    Args:
        labels: class names of the data; none if it has none.

    Raises:
        ModelError: the model's head has other classes.
    """
    names = dict(enumerate(labels))
    options = {"num_labels": len(names), "id2label": names,
               "label2id": {label: index for index, label in names.items()}}  # fmt: skip
    if not names or not has_head(config, kind):
        return options if names else {}
    own = dict(config.id2label)
    if names == own or (_unnamed(names) and len(names) == len(own)):
        return {}
    if _unnamed(own) and len(names) == len(own):
        return options
    raise ModelError(
        f"{name} has a classification head for {some(own.values())}; the labels here are "
        f"{some(labels)}, and must be the same in the same order"
    )


def _unnamed(names: Mapping[int, str]) -> bool:
    return all(label == f"LABEL_{index}" for index, label in names.items())
