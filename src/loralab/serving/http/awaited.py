"""Routes whose answers come at once: classes, vectors, scores of pairs, and reranking."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel

from loralab.errors import LoralabError
from loralab.serving.http import shapes
from loralab.serving.http.description import DIGEST, GENERATION_ERRORS, Operations
from loralab.serving.http.errors import ApiError, to_api_error
from loralab.serving.http.pooling import (
    EmbeddingBody,
    EmbeddingList,
    RerankBody,
    Reranking,
    ScoreBody,
    ScoreList,
    embedding_list,
    reranking,
    score_list,
)
from loralab.serving.http.requests import ClassifyBody
from loralab.serving.http.responses import Classification, Schema
from loralab.serving.http.service import Service, digest_header
from loralab.serving.http.stream import guarded
from loralab.serving.request import Ranked

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo
    from loralab.serving.encoder_engine import EncoderEngine


def add_awaited(app: FastAPI, service: Service, operations: Operations) -> None:
    """Add classification, embeddings, scores and reranking."""

    def asks(summary: str, answer: type[BaseModel]) -> dict[str, Any]:
        return operations.asks(summary, answer, GENERATION_ERRORS, headers=DIGEST)

    @app.post("/v1/classify", **asks("put inputs into classes", Classification))
    async def classify(request: Request, body: ClassifyBody) -> Response:
        asking = await _Asking.of(service, request, body, "classify", "input")
        given, engine, entry = body.inputs(), service.engine, asking.entry
        asking.require(given, service.limits.inputs)
        ranked: list[Ranked] = await asking.answer(lambda: engine.classify(given, adapter=entry), _tokens_of)
        return asking.response(shapes.classification(body.model, entry, ranked))

    @app.post("/v1/embeddings", **asks("make vectors of texts", EmbeddingList))
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        asking, given = await _Asking.of(service, request, body, "embeddings", "input"), body.inputs()
        asking.require(given, service.limits.texts)
        options = {"dimensions": body.dimensions or 0, "truncate": body.truncate}
        found = await asking.answer(lambda: asking.encoder.embed(given, adapter=asking.entry, **options))
        return asking.response(embedding_list(body, shapes.identity(asking.entry), found))

    @app.post("/v1/score", **asks("score pairs of texts", ScoreList))
    async def score(request: Request, body: ScoreBody) -> Response:
        asking = await _Asking.of(service, request, body, "score", "text_2")
        return asking.response(score_list(body, shapes.identity(asking.entry), await _scores(asking, body)))

    @app.post("/v1/rerank", **asks("sort documents by their relevance", Reranking))
    async def rerank(request: Request, body: RerankBody) -> Response:
        asking = await _Asking.of(service, request, body, "rerank", "documents")
        return asking.response(reranking(body, shapes.identity(asking.entry), await _scores(asking, body)))


async def _scores(asking: "_Asking", body: ScoreBody | RerankBody) -> Any:
    pairs = body.pairs()
    asking.require(pairs, asking.service.limits.texts, texts=itertools.chain.from_iterable(pairs))
    options: dict[str, Any] = {"activation": body.use_activation is not False, "truncate": body.truncate}
    return await asking.answer(lambda: asking.encoder.score(pairs, adapter=asking.entry, **options))


class _Asking:
    """One request to an engine that answers at once.

    Args:
        param: the field that errors of the inputs are about.
    """

    def __init__(
        self, service: Service, request: Request, key: Any, body: Any, entry: "AdapterInfo | None", param: str
    ) -> None:
        self.service, self.body, self.entry = service, body, entry
        self._request, self._key, self._param = request, key, param

    @staticmethod
    async def of(service: Service, request: Request, body: Any, what: str, param: str) -> "_Asking":
        """Find the model of a request, and see that it can do what is asked for."""
        key = service.key(request)
        entry = await service.model(body.model, key)
        if what != "classify":  # which says itself what is missing
            service.require_capable(what, body.model, entry)
        return _Asking(service, request, key, body, entry, param)

    @property
    def encoder(self) -> "EncoderEngine":
        """Return the engine, which can do what is asked for."""
        engine: Any = self.service.engine
        return engine

    def require(self, given: Sequence[Any], most: int, *, texts: Iterable[str] | None = None) -> None:
        """Refuse no inputs, too many, and texts that are far too long.

        Args:
            texts: of the inputs, if one has several.

        Raises:
            ApiError: 400.
        """
        self.service.require_some(len(given), self._param, most)
        for text in given if texts is None else texts:
            if not isinstance(text, bytes):
                self.service.require_fitting(len(text), self._param)

    async def answer(self, work: Callable[[], "Future[Any]"], tokens: Callable[[Any], int] | None = None) -> Any:
        """Return what the engine answers; what it took is counted for the key."""
        service = self.service
        grant, used = service.admit(self._key, 0), 0
        try:
            waiting = await service.run_in_tokenizer_thread(work)
            found = await guarded(
                self._request.receive, _awaited(waiting), service.limits.timeout, cancel=waiting.cancel
            )
            used = found.tokens if tokens is None else tokens(found)
        except LoralabError as error:
            raise to_api_error(
                error, error.field if error.field in type(self.body).model_fields else self._param
            ) from None
        finally:
            service.settle(grant, used)
        return found

    def response(self, answer: Schema) -> Response:
        """Return an answer, and which adapter gave it."""
        headers = digest_header(None if self.entry is None else self.entry.digest)
        return Response(answer.as_text(), media_type="application/json", headers=headers)


def _tokens_of(ranked: Sequence[Ranked]) -> int:
    return sum(one.tokens for one in ranked)


async def _awaited(future: "Future[Any]") -> Any:
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:  # by the engine, as only an engine that stops does
        raise ApiError(503, "the server stops; ask again later", code="stopping") from None
