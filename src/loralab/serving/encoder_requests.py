"""Build live requests for an encoder; every error in the input is raised here."""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from loralab.errors import DataError
from loralab.models.kinds import (
    CLASSIFIER,
    MULTI_LABEL,
    PROBLEMS,
    REGRESSION,
    RERANKER,
    SENTENCES,
    VISION,
    class_for,
    has_head,
)
from loralab.models.load import Base
from loralab.models.sentences import Pooling, matryoshka
from loralab.serving.adapters.info import AdapterInfo
from loralab.serving.encoder_request import Classes, Cosines, EncoderRequest, Reading, Relevance, Vectors
from loralab.serving.request_builder import origin, require_inputs, require_tokens, unlabelled
from loralab.serving.runners.encoder import body_of
from loralab.tasks.examples import Example, Ids
from loralab.tasks.forward import require_known
from loralab.tasks.pictures import from_bytes

TRAINED = Pooling()  # of adapters that were trained on pairs here, whatever the base's own is
MAX_LISTED_DIMENSIONS = 10
IDENTITY = "Identity"  # of torch: the activation of cross-encoders whose scores are logits


class EncoderRequests:
    """Makes live requests for one encoder.

    Args:
        context: the most tokens of an input.
        pooling: the base's own; or why it has none.
    """

    def __init__(self, base: Base, context: int, pooling: Pooling | str) -> None:
        self._base, self._context = base, context
        self._pooling = pooling if isinstance(pooling, Pooling) else TRAINED
        self._no_pooling = "" if isinstance(pooling, Pooling) else pooling
        config = base.model.config
        self._dimensions = matryoshka(config, int(getattr(config, "hidden_size", 0)) * len(self._pooling.modes))
        named = getattr(config, "id2label", None) or {}
        headed = base.kind == VISION or has_head(config, CLASSIFIER)
        self._labels = tuple(str(named[number]) for number in sorted(named)) if headed else ()
        self._numbers = itertools.count()  # of inputs

    def refusal(self, what: str, entry: AdapterInfo | None) -> str:
        """Return why something cannot be asked of an adapter; empty if it can."""
        if what == "classify":
            return self._why_no_classes(entry)
        if what == "embeddings":
            return self._why_no_vectors(entry)
        if what in ("score", "rerank"):
            return "" if self._reads_pairs(entry) else self._why_no_vectors(entry)
        return f"{self._base.name} does not generate text; use {self._instead(entry)}"

    def classification(self, inputs: Sequence[str | bytes], entry: AdapterInfo | None) -> EncoderRequest:
        """Build the request for the classes of texts or pictures.

        Raises:
            DataError: no labels are known, or an input is too long or of another kind.
        """
        require_inputs(inputs, bytes if self._base.kind == VISION else str, self._base.name)
        if reason := self._why_no_classes(entry):
            raise DataError(reason, code="no_labels")
        several = getattr(self._base.model.config, "problem_type", None) == PROBLEMS[MULTI_LABEL]
        reading = Classes(
            labels=self._labels if entry is None else entry.labels,
            independent=several if entry is None else entry.kind == MULTI_LABEL,
        )
        examples = [
            Example(number, (), (0,), image=from_bytes(one, f"input {number}"))
            if isinstance(one, bytes)
            else self._example(number, (one,), self._context)
            for number, one in enumerate(inputs)
        ]
        return self._request(examples, reading, entry)

    def embedding(
        self, inputs: Sequence[str | Ids], entry: AdapterInfo | None, *, dimensions: int = 0, truncate: int = 0
    ) -> EncoderRequest:
        """Build the request for the vectors of texts, given as texts or as token ids.

        Args:
            dimensions: to which vectors are cut; 0 is their own.
            truncate: tokens after which a text is cut, -1 is what the model can take; 0 refuses one
                that is longer.

        Raises:
            DataError: the model makes no vectors, or none of so many dimensions, or an input is
                empty, too long or has unknown tokens.
        """
        if reason := self._why_no_vectors(entry):
            raise DataError(reason, code="not_embeddable", field="model")
        _require_given(inputs)
        if dimensions and dimensions not in self._dimensions:
            few = len(self._dimensions) < MAX_LISTED_DIMENSIONS
            known = " or ".join(map(str, self._dimensions)) if few else f"1 to {self._dimensions[-1]}"
            raise DataError(
                f"vectors of {self._base.name} have {known} dimensions, got {dimensions}",
                code="invalid_value",
                field="dimensions",
            )
        for number, ids in enumerate(inputs):
            if not isinstance(ids, str):
                require_tokens(self._base.model, ids, "input", f"input {number}")
        pooling = self._pooling_of(entry)
        examples = self._pooled(inputs, pooling, truncate)
        return self._request(examples, Vectors(pooling=pooling, dimensions=dimensions or self._dimensions[-1]), entry)

    def scores(
        self, pairs: Sequence[tuple[str, str]], entry: AdapterInfo | None, *, activation: bool = True, truncate: int = 0
    ) -> EncoderRequest:
        """Build the request for the scores of pairs: of a cross-encoder's logit, or cosines of vectors.

        Args:
            activation: put a logit through the activation of the model, as a rule the sigmoid.
            truncate: as in `embedding`.

        Raises:
            DataError: the model scores nothing, or a text is empty or too long.
        """
        texts = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
        _require_given(texts)
        if self._reads_pairs(entry):
            examples = [self._example(n, pair, self._context, truncate) for n, pair in enumerate(pairs)]
            return self._request(examples, Relevance(sigmoid=activation and self._sigmoid(entry)), entry)
        if reason := self._why_no_vectors(entry):
            raise DataError(reason, code="not_scorable", field="model")
        pooling, places = self._pooling_of(entry), {text: number for number, text in enumerate(texts)}
        reading = Cosines(pooling=pooling, pairs=[(places[first], places[second]) for first, second in pairs])
        return self._request(self._pooled(texts, pooling, truncate), reading, entry)

    def _request(self, examples: Sequence[Example], reading: Reading, entry: AdapterInfo | None) -> EncoderRequest:
        require_known(self._base.model, self._base.tokenizer, [example.input_ids for example in examples])
        numbered = {next(self._numbers): example for example in examples}
        return EncoderRequest(**origin(entry), examples=numbered, reading=reading, future=Future())

    def _pooled(self, inputs: Sequence[str | Ids], pooling: Pooling, truncate: int) -> list[Example]:
        """Return texts as a model with this pooling reads them; token ids are taken as they are."""
        limit = min(self._context, pooling.max_length or self._context)
        given = [(pooling.written(one),) if isinstance(one, str) else one for one in inputs]
        return [self._example(number, one, limit, truncate) for number, one in enumerate(given)]

    def _example(self, number: int, given: tuple[str, ...] | Ids, limit: int, truncate: int = 0) -> Example:
        """Return one text, two that are read together, or token ids, as an input of at most `limit` tokens."""
        most = limit if truncate < 0 else min(limit, truncate)
        options = {"truncation": True, "max_length": most} if truncate else {}
        written = isinstance(given[0], str)
        coded = self._base.tokenizer(*given, verbose=False, **options) if written else {"input_ids": given}
        ids, types = tuple(coded["input_ids"]), tuple(coded.get("token_type_ids") or ())
        ids = ids[:most] if truncate else ids
        if len(ids) > limit:
            raise DataError(
                f"input {number} has {len(ids)} tokens, and the model can take {limit}",
                code="context_length_exceeded",
                field="input",
            )
        return Example(number, ids, (0,), token_types=types if any(types) else ())

    def _reads_pairs(self, entry: AdapterInfo | None) -> bool:
        """Return whether a pair of texts is read together and ends in one logit."""
        if entry is not None and (entry.form or entry.embeds):
            return entry.kind == RERANKER or (entry.kind == REGRESSION and entry.form == "pair-score")
        return len(self._labels) == 1 and (entry is None or len(entry.labels) < 2)

    def _sigmoid(self, entry: AdapterInfo | None) -> bool:
        """Return whether scores are the sigmoid of a logit, which the checkpoint may deny."""
        if entry is not None and entry.form and entry.kind in (RERANKER, REGRESSION):
            return entry.kind == RERANKER
        config = self._base.model.config
        stated = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        stated = stated or getattr(config, "sbert_ce_default_activation_function", None)
        return not str(stated).endswith(f".{IDENTITY}")

    def _pooling_of(self, entry: AdapterInfo | None) -> Pooling:
        return TRAINED if entry is not None and entry.embeds and entry.form else self._pooling

    def _why_no_vectors(self, entry: AdapterInfo | None) -> str:
        if self._reads_pairs(entry):
            return f"{self._name(entry)} reads two texts together and makes no vectors; use /v1/score"
        if self._base.kind == VISION:
            return f"{self._base.name} reads pictures, and makes no vectors of texts"
        return "" if entry is not None and entry.embeds else self._no_pooling

    def _why_no_classes(self, entry: AdapterInfo | None) -> str:
        return "" if entry is None and self._labels else unlabelled(entry, self._base.name)

    def _instead(self, entry: AdapterInfo | None) -> str:
        known = [f"/v1/{what}" for what in ("classify", "embeddings", "score") if not self.refusal(what, entry)]
        return " or ".join(known) or "/v1/classify with an adapter that knows labels"

    def _name(self, entry: AdapterInfo | None) -> str:
        return self._base.name if entry is None else entry.name


def why_no_pooling(base: Base) -> str:
    """Return why an encoder without a stated pooling makes no vectors; empty if their mean will do."""
    config = base.model.config
    if base.kind != VISION and has_head(config, CLASSIFIER):
        return f"{base.name} ends in classes and states no pooling, so it makes no vectors; use /v1/classify"
    if base.kind != VISION and type(body_of(base.model)) is not class_for(config, SENTENCES):
        return f"{base.name} ({config.model_type}) is not an encoder alone, and makes no vectors"
    return ""


def _require_given(texts: Sequence[Any]) -> None:
    if not texts:
        raise DataError("there is no input", code="invalid_value", field="input")
    if (empty := next((number for number, text in enumerate(texts) if not text), None)) is not None:
        raise DataError(f"input {empty} is empty", code="invalid_value", field="input")
