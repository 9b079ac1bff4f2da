"""The kind of a model: a language model, or an encoder that ends in classes or in sentences.

All from its configuration, without its weights: what it is by itself, what it can become, and one
line for what nothing here trains.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from loralab.errors import ModelError, join_limited

CAUSAL, CLASSIFIER = "causal-lm", "sequence-classification"
TAGGER, VISION, SENTENCES = "token-classification", "image-classification", "sentence-encoder"
SEQ2SEQ = "seq2seq"  # what an encoder-decoder is by itself; it can become a classifier
MULTI_LABEL, REGRESSION, RERANKER = "multi-label", "regression", "reranker"
SCORED_PAIRS = "scored-pairs"
IMAGE_TEXT = "image-text-to-text"  # a language model with a tower that reads pictures
KINDS = (
    CAUSAL,
    CLASSIFIER,
    TAGGER,
    VISION,
    SENTENCES,
    SEQ2SEQ,
    MULTI_LABEL,
    REGRESSION,
    RERANKER,
    SCORED_PAIRS,
    IMAGE_TEXT,
)
# kinds that end in outputs of their own, and how transformers calls a model that has such a head
HEADS = {
    CLASSIFIER: "ForSequenceClassification",
    TAGGER: "ForTokenClassification",
    VISION: "ForImageClassification",
    MULTI_LABEL: "ForSequenceClassification",
    REGRESSION: "ForSequenceClassification",
    RERANKER: "ForSequenceClassification",
}
# what transformers takes the outputs of a head for
PROBLEMS = {
    CLASSIFIER: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
    RERANKER: None,
}
SERVED = (CAUSAL, CLASSIFIER, VISION, SENTENCES)  # by `loralab serve`
ONE_OUTPUT = (REGRESSION, RERANKER)
# format of rows (tasks/formats.py) -> kinds that learn from it, the usual one first
ANSWERS = (CAUSAL, SEQ2SEQ, IMAGE_TEXT)
LEARNERS: dict[str, tuple[str, ...]] = {
    "messages": (CAUSAL, IMAGE_TEXT),
    "text": (CAUSAL, IMAGE_TEXT),
    "prompt-completion": ANSWERS,
    "instruction": ANSWERS,
    "text-label": (CAUSAL, CLASSIFIER, SEQ2SEQ, IMAGE_TEXT),
    "pair-label": (CAUSAL, CLASSIFIER, SEQ2SEQ, IMAGE_TEXT),
    "text-labels": (MULTI_LABEL,),
    "pair-labels": (MULTI_LABEL,),
    "text-score": (REGRESSION,),
    "pair-score": (SCORED_PAIRS, REGRESSION),
    "query-passage": (RERANKER,),
    "query-candidates": (RERANKER,),
    "tokens-tags": (TAGGER,),
    "image-label": (VISION,),
    "pair": (SENTENCES,),
}
LOADERS: dict[str, Any] = {
    CAUSAL: AutoModelForCausalLM,
    CLASSIFIER: AutoModelForSequenceClassification,
    TAGGER: AutoModelForTokenClassification,
    VISION: AutoModelForImageClassification,
    SENTENCES: AutoModel,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    MULTI_LABEL: AutoModelForSequenceClassification,
    REGRESSION: AutoModelForSequenceClassification,
    RERANKER: AutoModelForSequenceClassification,
    SCORED_PAIRS: AutoModel,
    IMAGE_TEXT: AutoModelForImageTextToText,
}
SUPPORTED = "supported are language models, encoders of text, and vision models that classify"
_OTHER_SENSES = re.compile("vision|visual|image|video|audio|speech|acoustic|sound|codec|vq")
_INPUTS = {
    "pixel_values": "pictures, and has no class in transformers that classifies them",
    "input_features": "sound and not text",
    "input_values": "sound and not text",
}


def kind_of(config: Any) -> str:
    """Return the kind of a model that nobody has asked to be another one."""
    if has_head(config, CLASSIFIER):
        return _kind_of_head(config)
    if has_head(config, TAGGER):
        return TAGGER
    if config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return VISION
    if config.is_encoder_decoder:
        return SEQ2SEQ
    if _reads_both(config):
        return IMAGE_TEXT
    decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return CAUSAL if decoder and _looks_back(config) else CLASSIFIER


def _reads_both(config: Any) -> bool:
    """Return whether a folder is that of a language model with a tower of pictures beside it."""
    if not hasattr(config, "text_config") or not any(_OTHER_SENSES.search(key) for key in _part_names(config)):
        return False
    built = class_for(config, IMAGE_TEXT)
    return built is not None and class_named(config) in (built.__name__, type(config).__name__)


def _kind_of_head(config: Any) -> str:
    """Return what a head of a text's classes is for: of one output alone it is a number."""
    problem = getattr(config, "problem_type", None)
    if problem == PROBLEMS[MULTI_LABEL]:
        return MULTI_LABEL
    return REGRESSION if problem == PROBLEMS[REGRESSION] or config.num_labels == 1 else CLASSIFIER


def recorded_kind(kind: str) -> str:
    """Return the kind that whoever loads a trained model needs: scored pairs make an encoder of sentences."""
    return SENTENCES if kind == SCORED_PAIRS else kind


def describe_kind(kind: str) -> str:
    """Return a kind in words."""
    names = {CAUSAL: "a language model", VISION: "a vision model", SEQ2SEQ: "an encoder-decoder"}
    names[IMAGE_TEXT] = "a language model that reads pictures"
    return names.get(kind, "an encoder of text")


def class_named(config: Any) -> str:
    """Return the class that a folder was saved from, as its configuration says it."""
    return str((config.architectures or [type(config).__name__])[0])


def class_for(config: Any, kind: str) -> Any:
    """Return the class that a model becomes; None where transformers has none of this kind for it."""
    # transformers lets nobody ask in public; auto classes have had this name since version 4
    mapping = LOADERS[kind]._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def require_kind(name: str, config: Any, kind: str) -> None:
    """Refuse a model that cannot be of a kind, or that reads what nothing here gives it.

    Raises:
        ModelError: it reads sound, or text and pictures at once; it is not a model of this kind, or
            attends to what it should predict.
    """
    require_text_or_pictures(name, config)
    who, own = f"{name} is {class_named(config)}", kind_of(config)
    if any((kind == one) != (own == one) for one in (VISION, IMAGE_TEXT)):
        raise ModelError(
            f"{name} is {describe_kind(own)} ({config.model_type}), it cannot do {kind}",
            code="kind_unsupported",
            field="model",
        )
    if own == SEQ2SEQ and kind not in (*HEADS, SEQ2SEQ):
        raise ModelError(
            f"{who}, an encoder-decoder, and cannot do {kind}: it learns from rows of prompt, completion; or take a "
            f"language model such as smollm2-135m{_for_classes(config)}",
            code="seq2seq_unsupported",
            field="model",
        )
    if class_for(config, kind) is None:
        raise ModelError(
            f"{who}: transformers has no model of kind {kind} for {config.model_type}; {SUPPORTED}",
            code="kind_unsupported",
            field="model",
        )
    if kind == CAUSAL and not _looks_back(config):
        raise ModelError(
            f"{who}, which sees the tokens after each one as well: as a language model it would "
            f"read what it should predict; take a decoder such as smollm2-135m"
            f"{_for_classes(config)}",
            code="not_causal",
            field="model",
        )


def require_text_or_pictures(name: str, config: Any) -> None:
    """Refuse what reads neither text nor pictures, or both where the other input would be left out.

    A model of both may classify pictures, for that is a class of its own without the text; or it is a
    language model with a tower, which answers a text with pictures in it.

    Raises:
        ModelError: it reads something else, or more than one thing.
    """
    if kind_of(config) in (VISION, IMAGE_TEXT):
        return
    who = f"{name} is {class_named(config)} ({config.model_type})"
    parts = [key for key in _part_names(config) if _OTHER_SENSES.search(key)]
    # a text_config of its own says that there is something else, whatever that is called
    if parts or hasattr(config, "text_config"):
        named = ", ".join(key.removesuffix("_config") for key in parts) or "something else"
        raise ModelError(
            f"{who}, a model of text with {named}: models of more than one input are not supported yet; {SUPPORTED}",
            code="multimodal_unsupported",
            field="model",
        )
    read = getattr(class_for(config, SENTENCES), "main_input_name", "input_ids")
    if read != "input_ids":
        what = _INPUTS.get(read, f"{read} and not text")
        raise ModelError(
            f"{who}, which reads {what}: not supported; {SUPPORTED}", code="input_unsupported", field="model"
        )
    if _OTHER_SENSES.search(f"{class_named(config)} {config.model_type}".lower()) or _hears(config):
        raise ModelError(
            f"{who}, which is made for more than text: not supported; {SUPPORTED}",
            code="multimodal_unsupported",
            field="model",
        )


def _hears(config: Any) -> bool:
    """Return whether an encoder-decoder has an encoder of speech beside that of text."""
    return any(key.startswith("speech_encoder") for key in vars(config))


def is_writer(config: Any) -> bool:
    """Return whether the class that was saved is its family's language model."""
    return class_named(config) == getattr(class_for(config, CAUSAL), "__name__", None)


def has_head(config: Any, kind: str) -> bool:
    """Return whether a model ends in the classes of a kind already."""
    return any(name.endswith(HEADS[kind]) for name in config.architectures or [])


def head_options(name: str, config: Any, kind: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return the options of from_pretrained for the classes; a head that is there keeps its own.

    Args:
        labels: class names of the data; none if it has none.

    Raises:
        ModelError: the model's head has other classes.
    """
    if kind in ONE_OUTPUT:
        return _one_output(name, config, kind)
    names = dict(enumerate(labels))
    problem = _problem(config, kind)
    options = {
        **problem,
        "num_labels": len(names),
        "id2label": names,
        "label2id": {label: index for index, label in names.items()},
    }
    if not names or not has_head(config, kind):
        return options if names else problem
    # a few families count their classes without naming them
    own = dict(config.id2label or {n: f"LABEL_{n}" for n in range(config.num_labels)})
    if names == own or (_unnamed(names) and len(names) == len(own)):
        return problem
    if _unnamed(own) and len(names) == len(own):
        return options
    raise ModelError(
        f"{name} has a classification head for {join_limited(own.values())}; the labels here are "
        f"{join_limited(labels)}, and must be the same in the same order",
        code="other_labels",
        field="model",
    )


def _one_output(name: str, config: Any, kind: str) -> dict[str, Any]:
    """Return the options for a head of one number; one that is there keeps its own.

    Raises:
        ModelError: the model's head has several outputs.
    """
    problem = {"problem_type": PROBLEMS[kind]}
    if not has_head(config, kind):
        return {"num_labels": 1, "id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, **problem}
    if config.num_labels == 1:
        return problem
    raise ModelError(
        f"{name} has a classification head of {config.num_labels} classes, and {kind} needs one output; take the "
        "model that it was made from",
        code="other_labels",
        field="model",
    )


def _problem(config: Any, kind: str) -> dict[str, Any]:
    """Return the option that says what the outputs are, where the configuration says another thing."""
    own, wanted = getattr(config, "problem_type", None), PROBLEMS.get(kind)
    usual = own is None and wanted == PROBLEMS[CLASSIFIER]
    return {} if wanted is None or usual or own == wanted else {"problem_type": wanted}


def _unnamed(names: Mapping[int, str]) -> bool:
    return all(label == f"LABEL_{index}" for index, label in names.items())


def _part_names(config: Any) -> Iterator[str]:
    """Yield the fields that hold the configuration of a part, and those of its own parts."""
    for key in getattr(config, "sub_configs", {}):
        if (part := getattr(config, key, None)) is not None:
            yield key
            yield from _part_names(part)


def _looks_back(config: Any) -> bool:
    """Return whether each token sees those before it alone, of families that can do both."""
    if config.model_type in (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "xlnet", "bert-generation"):
        names = ("is_decoder", "causal")
        named = any(getattr(config, name, False) for name in names)
        return named or getattr(config, "attn_type", "bi") == "uni"
    return getattr(config, "use_bidirectional_attention", None) not in (True, "all")


def _for_classes(config: Any) -> str:
    has = class_for(config, CLASSIFIER) is not None
    return ", or give it rows of text, label: it can classify" if has else ""
