"""Routes whose answers come at once: classes, vectors, scores of pairs, and reranking."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from loralab.errors import LoralabError
from loralab.serving.http import shapes
from loralab.serving.http.errors import ApiError, to_api_error
from loralab.serving.http.pooling import EmbeddingBody, RerankBody, ScoreBody, embedding_list, reranking, score_list
from loralab.serving.http.requests import ClassifyBody
from loralab.serving.http.responses import AdapterIdentity
from loralab.serving.http.service import Service, digest_header
from loralab.serving.http.stream import guarded
from loralab.serving.request import Ranked

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo
    from loralab.serving.encoder_engine import EncoderEngine


def add_awaited(app: FastAPI, service: Service) -> None:
    """Add classification, embeddings, scores and reranking."""

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        asking = await _Asking.of(service, request, ClassifyBody, "classify", "input")
        given, engine, entry = asking.body.inputs(), service.engine, asking.entry
        asking.require(given, service.limits.inputs)
        ranked: list[Ranked] = await asking.answer(lambda: engine.classify(given, adapter=entry), _tokens_of)
        labels = () if entry is None else entry.labels
        return asking.response(shapes.classification(asking.body.model, entry, ranked, labels))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        asking = await _Asking.of(service, request, EmbeddingBody, "embeddings", "input")
        body, given = asking.body, asking.body.inputs()
        asking.require(given, service.limits.texts)
        options = {"dimensions": body.dimensions or 0, "truncate": body.truncate}
        found = await asking.answer(lambda: asking.encoder.embed(given, adapter=asking.entry, **options))
        return asking.response(embedding_list(body, asking.identity, found))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        asking = await _Asking.of(service, request, ScoreBody, "score", "text_2")
        return asking.response(score_list(asking.body, asking.identity, await _scores(asking)))

    @app.post("/v1/rerank")
    async def rerank(request: Request) -> Response:
        asking = await _Asking.of(service, request, RerankBody, "rerank", "documents")
        return asking.response(reranking(asking.body, asking.identity, await _scores(asking)))


async def _scores(asking: "_Asking") -> Any:
    body, pairs = asking.body, asking.body.pairs()
    asking.require([text for pair in pairs for text in pair], 2 * asking.service.limits.texts)
    options = {"activation": body.use_activation is not False, "truncate": body.truncate}
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
    async def of(service: Service, request: Request, kind: type[Any], what: str, param: str) -> "_Asking":
        """Read a request, and see that its model can do what is asked for."""
        key = service.authorise(request)
        body = await service.body(request, kind)
        entry = await service.model(body.model, key)
        if what != "classify":  # which says itself what is missing
            service.require_capable(what, body.model, entry)
        return _Asking(service, request, key, body, entry, param)

    @property
    def encoder(self) -> "EncoderEngine":
        """Return the engine, which can do what is asked for."""
        engine: Any = self.service.engine
        return engine

    @property
    def identity(self) -> AdapterIdentity | None:
        """Return which adapter answers."""
        return None if self.entry is None else AdapterIdentity(**shapes.identity(self.entry))

    def require(self, given: Sequence[Any], most: int) -> None:
        """Refuse no inputs, too many, and texts that are far too long.

        Raises:
            ApiError: 400.
        """
        self.service.require_some(len(given), self._param, most)
        for text in given:
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

    def response(self, content: BaseModel | dict[str, Any]) -> Response:
        """Return an answer, and which adapter gave it."""
        told = content if isinstance(content, dict) else content.model_dump(exclude_none=True)
        if not isinstance(content, dict):
            told["adapter"] = told.get("adapter")
        return JSONResponse(told, headers=digest_header(None if self.entry is None else self.entry.digest))


def _tokens_of(ranked: Sequence[Ranked]) -> int:
    return sum(one.tokens for one in ranked)


async def _awaited(future: "Future[Any]") -> Any:
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:  # by the engine, as only an engine that stops does
        raise ApiError(503, "the server stops; ask again later", code="stopping") from None
