"""Bodies and answers of embeddings, scores and reranking: OpenAI's shape of the first, vLLM's of the others."""

import base64
import sys
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from loralab.serving.http.errors import ApiError, wrong_value
from loralab.serving.http.requests import RequestBody, Texts, Tokens, Whole
from loralab.serving.http.responses import AdapterIdentity, AnswerHead, Schema, ShortUsage
from loralab.serving.http.shapes import head, usage
from loralab.serving.request import Embeddings, PairScores

NEUTRAL = {"add_special_tokens": (True,), "priority": (0,)}
FIRST, SECOND = ("text_1", "queries", "data_1"), ("text_2", "documents", "data_2", "items")
Truncation = Annotated[int | None, Field(default=None, ge=-1)]


class _PoolingBody(RequestBody):
    """Fields that they share; texts are cut to `truncate_prompt_tokens` tokens, -1 is what the model can take."""

    neutral = RequestBody.neutral | NEUTRAL
    model: str
    truncate_prompt_tokens: Truncation

    @property
    def truncate(self) -> int:
        """Return the tokens after which a text is cut; 0 refuses a longer one."""
        if self.truncate_prompt_tokens == 0:
            raise wrong_value("truncate_prompt_tokens", "must be at least 1, or -1")
        return self.truncate_prompt_tokens or 0


class EmbeddingBody(_PoolingBody):
    """POST /v1/embeddings."""

    input: str | Texts | Tokens | Annotated[list[Tokens], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = Field(default=None, ge=1)

    def inputs(self) -> list[str | tuple[int, ...]]:
        """Return each input, as text or as tokens."""
        given: Any = self.input
        several = given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
        return [one if isinstance(one, str) else tuple(one) for one in several]


class ScoreBody(_PoolingBody):
    """POST /v1/score: one of `text_1`, `queries`, `data_1`, and one of `text_2`, `documents`, `data_2`, `items`.

    One first text is scored with every second one; otherwise there are as many of both.
    """

    text_1: str | Texts | None = None
    queries: str | Texts | None = None
    data_1: str | Texts | None = None
    text_2: str | Texts | None = None
    documents: str | Texts | None = None
    data_2: str | Texts | None = None
    items: str | Texts | None = None
    use_activation: bool | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs of texts.

        Raises:
            ApiError: 400, one side is missing, given twice or of another length.
        """
        (first_name, first), (second_name, second) = self._side(FIRST), self._side(SECOND)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            text = f"{first_name} has {len(first)} texts and {second_name} {len(second)}; give one, or as many"
            raise ApiError(400, text, param=first_name, code="invalid_value")
        return list(zip(first, second, strict=True))

    def _side(self, names: Sequence[str]) -> tuple[str, list[str]]:
        given = [(name, value) for name in names if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            problem = f"give one of {', '.join(names)}, got {len(given)}"
            raise ApiError(400, problem, param=given[1][0] if given else names[0], code="invalid_value")
        ((name, texts),) = given
        return name, [texts] if isinstance(texts, str) else texts


class RerankBody(_PoolingBody):
    """POST /v1/rerank; without `top_n`, or with 0, all documents come back."""

    query: str
    documents: Texts
    top_n: Whole | None = Field(default=None, ge=0)
    return_documents: bool | None = None
    use_activation: bool | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Return the query with each document."""
        return [(self.query, document) for document in self.documents]


class Embedding(Schema):
    """The vector of one input: numbers, or the base64 of little-endian fp32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(AnswerHead):
    """The vectors of all inputs."""

    object: Literal["list"]
    data: list[Embedding]
    usage: ShortUsage


class PairScore(Schema):
    """The fit of a pair's second text to the first."""

    object: Literal["score"]
    index: int
    score: float


class ScoreList(AnswerHead):
    """The scores of all pairs."""

    object: Literal["list"]
    data: list[PairScore]
    usage: ShortUsage


class Document(Schema):
    """A document that was ranked."""

    text: str


class RankedDocument(Schema):
    """A document's place among those that were given, and its score."""

    index: int
    document: Document | None = None
    relevance_score: float


class Reranking(AnswerHead):
    """Documents, the most relevant first."""

    results: list[RankedDocument]
    usage: ShortUsage


def embedding_list(body: EmbeddingBody, adapter: AdapterIdentity | None, found: Embeddings) -> EmbeddingList:
    """Return the answer to a request for vectors."""
    coded = body.encoding_format == "base64"
    vectors = [_base64(own) if coded else own for own in found.vectors]
    data = [Embedding(object="embedding", index=number, embedding=own) for number, own in enumerate(vectors)]
    return EmbeddingList(**_head("embd-", body, adapter, found.tokens), object="list", data=data)


def score_list(body: ScoreBody, adapter: AdapterIdentity | None, found: PairScores) -> ScoreList:
    """Return the answer to a request for scores."""
    data = [PairScore(object="score", index=number, score=score) for number, score in enumerate(found.scores)]
    return ScoreList(**_head("score-", body, adapter, found.tokens), object="list", data=data)


def reranking(body: RerankBody, adapter: AdapterIdentity | None, found: PairScores) -> Reranking:
    """Return the answer to a request for the best documents; equal ones stay in their order."""
    order = sorted(range(len(found.scores)), key=lambda number: -found.scores[number])
    results = []
    for number in order[: body.top_n or len(order)]:
        shown = {} if body.return_documents is False else {"document": Document(text=body.documents[number])}
        results.append(RankedDocument(index=number, relevance_score=found.scores[number], **shown))
    return Reranking(**_head("rerank-", body, adapter, found.tokens), results=results)


def _head(prefix: str, body: _PoolingBody, adapter: AdapterIdentity | None, tokens: int) -> dict[str, Any]:
    return {**head(prefix, body.model, adapter), "usage": usage(tokens)}


def _base64(vector: Sequence[float]) -> str:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
