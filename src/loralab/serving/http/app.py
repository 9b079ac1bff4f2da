"""The HTTP interface: OpenAI's for asking, vLLM's for loading, and one page to look at.

Needs the extra `serve`.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from loralab.errors import LoralabError
from loralab.serving.constraints import Compiled, Grammar
from loralab.serving.http import responses as answers
from loralab.serving.http import shapes
from loralab.serving.http.awaited import add_awaited
from loralab.serving.http.description import BODY, DIGEST, GENERATION_ERRORS, WARNING, Operations, document
from loralab.serving.http.errors import MAX_ECHOED_CHARACTERS, ApiError, to_api_error
from loralab.serving.http.gate import Gate, HeadAsGet, Hosts
from loralab.serving.http.keys import Key, Keys
from loralab.serving.http.messages import turns_of
from loralab.serving.http.metrics import CONTENT_TYPE
from loralab.serving.http.origins import Origins
from loralab.serving.http.prompts import Prompts
from loralab.serving.http.requests import ChatBody, CompletionBody, LoadBody, UnloadBody
from loralab.serving.http.routes import AdminRoute, Route
from loralab.serving.http.service import Service, digest_header
from loralab.serving.http.shapes import ChatShape, CompletionShape
from loralab.serving.http.stream import ClientGoneError, EventStream, Gathered, guarded
from loralab.serving.http.tools import forced, parser_of, tools_by_name
from loralab.serving.page.routes import add_page
from loralab.serving.request import Answer
from loralab.serving.settings import Limits
from loralab.serving.tool_calls import ToolParser

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo
    from loralab.serving.opening import AnyEngine
    from loralab.serving.text_engine import TextEngine

WARNING_HEADER = "X-Loralab-Warning"
CLIENT_GONE = 499
STORE_FIELDS = {"name": "lora_name", "path": "lora_path"}  # what vLLM calls them


def build_app(
    engine: "AnyEngine",
    *,
    keys: Keys | None,
    limits: Limits | None = None,
    hosts: Hosts | None = None,
    origins: frozenset[str] = frozenset(),
) -> FastAPI:
    """Return the application around an engine that runs; `app.state.service` is what it is made of.

    Args:
        keys: None leaves everything open.
        hosts: what the server may be called; None is what this machine calls itself.
        origins: of `origins_of` (origins.py): pages of other sites that may ask.
    """
    service = Service(engine, keys, limits or Limits())
    # no /docs: its page loads scripts from elsewhere
    app = FastAPI(title="loralab", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service, app.router.route_class = service, Route
    operations = Operations(with_keys=keys is not None)
    app.add_middleware(Origins, allowed=origins)
    app.add_middleware(Gate, hosts=hosts or Hosts())
    app.add_middleware(HeadAsGet)  # the outermost
    _add_errors(app)
    add_page(app, service)
    _add_state(app, service, operations)
    _add_generation(app, service, operations)
    add_awaited(app, service, operations)
    _add_store(app, service, operations)
    return app


def _add_errors(app: FastAPI) -> None:
    """Give every error one shape."""

    @app.exception_handler(ApiError)
    async def _ours(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(LoralabError)
    async def _loralab(_: Request, error: LoralabError) -> Response:
        return to_api_error(error).response()

    @app.exception_handler(ClientGoneError)
    @app.exception_handler(ClientDisconnect)
    async def _gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def _routing(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.scope['path'][:MAX_ECHOED_CHARACTERS]}"
        allow = (error.headers or {}).get("Allow")
        allow = "GET, HEAD" if allow == "GET" else allow
        return ApiError(error.status_code, f"{where}: {error.detail}", allow=allow).response()

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error; see the server's log").response()


def _add_state(app: FastAPI, service: Service, operations: Operations) -> None:
    """Add the routes that report on the server."""
    engine = service.engine
    drawn = functools.cache(lambda: document(app, with_keys=service.keys is not None))

    @app.get("/openapi.json", **operations.asks("this document", dict[str, Any], open_to_all=True))
    async def openapi() -> Response:
        return JSONResponse(drawn())

    @app.get("/health", **operations.asks("whether the server answers", answers.Health, (503,), open_to_all=True))
    async def health() -> Response:
        service.require_working()
        return JSONResponse(answers.Health(status="ok").as_json())

    @app.get("/metrics", **operations.asks("numbers for Prometheus", str, (403,)))
    async def metrics(request: Request) -> Response:
        key = service.key(request)
        if key is not None and not key.sees_all:  # they name every adapter
            raise ApiError(403, f"key {key.name} may not see the metrics: they name all adapters")
        content = await asyncio.to_thread(service.metrics.text)  # it asks the store
        return Response(content, media_type=CONTENT_TYPE)

    @app.get("/store", **operations.asks("adapters, and how busy the engine is", answers.StoreState))
    async def store(request: Request) -> Response:
        entries = await service.visible(service.key(request))
        found = answers.StoreState(
            base=answers.BaseName(name=service.base_id, kind=engine.base.kind),
            engine=answers.EngineState(
                running=engine.running,
                waiting=engine.waiting,
                context=engine.context,
                max_waiting=engine.max_waiting,
                healthy=engine.healthy,
                evictions=engine.store.evictions,
            ),
            adapters=[shapes.stored_adapter(entry) for entry in entries],
        )
        return JSONResponse(found.as_json())

    @app.get("/v1/models", **operations.asks("all models", answers.Models))
    async def models(request: Request) -> Response:
        key = service.key(request)
        found = _models(service, await service.visible(key))
        listed = found if key is None or key.base else found[1:]
        return JSONResponse(answers.Models(object="list", data=listed).as_json())

    @app.get("/v1/models/{name:path}", **operations.asks("one model", answers.Model, (404,)))
    async def model(name: str, request: Request) -> Response:
        entry = await service.model(name, service.key(request))
        return JSONResponse(_models(service, [] if entry is None else [entry])[-1].as_json())


def _models(service: Service, entries: Sequence["AdapterInfo"]) -> list[answers.Model]:
    """Return the base and some adapters."""
    engine, base = service.engine, service.base_id
    return shapes.models(base, engine.base.kind, engine.context, entries, service.started, engine.capabilities)


def _add_generation(app: FastAPI, service: Service, operations: Operations) -> None:
    """Add completions and chats."""
    prompts, headers = Prompts(service), DIGEST | WARNING
    texts = operations.asks(
        "continue texts", answers.Completion, GENERATION_ERRORS, headers=headers, chunk=answers.CompletionChunk
    )
    chats = operations.asks(
        "answer a conversation", answers.Chat, GENERATION_ERRORS, headers=headers, chunk=answers.ChatChunk
    )

    @app.post("/v1/completions", **texts)
    async def completions(request: Request, body: CompletionBody) -> Response:
        key = service.key(request)
        entry = await _generating_adapter(service, "completions", body.model, key)
        given = body.prompts()
        service.require_some(len(given) * (body.n or 1), "prompt", service.limits.inputs)
        ids = [await prompts.text_ids(prompt) for prompt in given]
        return await _answer(prompts, request, body, entry, key, ids)

    @app.post("/v1/chat/completions", **chats)
    async def chat(request: Request, body: ChatBody) -> Response:
        key = service.key(request)
        entry = await _generating_adapter(service, "chat", body.model, key)
        try:
            tokenizer = prompts.engine.tokenizer(entry)
            tools = tools_by_name(body.tools, body.tool_choice)
            parser = parser_of(tokenizer, tools) if tools else None
            ids = await prompts.chat_ids(turns_of(body.messages, tokenizer), entry, list(tools.values()))
        except LoralabError as error:
            raise to_api_error(error, "messages") from None
        return await _answer(prompts, request, body, entry, key, [ids], parser)


async def _answer(
    prompts: Prompts,
    request: Request,
    body: CompletionBody | ChatBody,
    entry: "AdapterInfo | None",
    key: Key | None,
    given: Sequence[Sequence[int]],
    parser: ToolParser | None = None,
) -> Response:
    """Return the answers to some prompts, `n` each, whole or as a stream."""
    service, param = prompts.service, "prompt" if isinstance(body, CompletionBody) else "messages"
    choices, structure = body.n or 1, await prompts.structure(_grammar(body, parser))
    asked = [
        (ids, body.sampling(prompts.max_answer_tokens(ids, entry, param), choice))
        for ids in given
        for choice in range(choices)
    ]
    grant = service.admit(key, sum(len(ids) + sampling.max_tokens for ids, sampling in asked))
    try:
        answers = _submit_all(prompts.engine, asked, entry, structure)
    except LoralabError as error:
        service.settle(grant, 0)
        raise to_api_error(error, param, fields={name: name for name in type(body).model_fields}) from None
    gathered = Gathered(answers, lambda tokens: service.settle(grant, tokens))
    make = CompletionShape if isinstance(body, CompletionBody) else functools.partial(ChatShape, parser=parser)
    read = sum(map(len, given)) if body.with_usage_so_far else None
    shape = make(
        answers,
        model=body.model,
        choices=choices,
        usage=body.with_usage,
        prompt_tokens=read,
        logprobs=asked[0][1].logprobs is not None,
    )
    headers, seconds = digest_header(answers[0].digest), service.limits.timeout
    if warning := shapes.warning_of(answers):
        headers[WARNING_HEADER] = warning
    if body.stream:
        return EventStream(gathered, shape, seconds, headers)
    done = await guarded(request.receive, gathered.completed(), seconds, cancel=gathered.cancel)
    return JSONResponse(shape.whole(done).as_json(), headers=headers)


def _grammar(body: CompletionBody | ChatBody, parser: ToolParser | None) -> Grammar | None:
    """Return the structure of the answers: a call that must come, or what the body asks for."""
    grammar = body.grammar()
    if parser is None or not isinstance(body, ChatBody):
        return grammar
    try:
        call = forced(parser, body.tool_choice, several=body.parallel_tool_calls is not False)
    except LoralabError as error:
        raise to_api_error(error) from None
    if call is not None and grammar is not None:
        text = "tool_choice requires a call, and response_format or structured_outputs another structure; leave one out"
        raise ApiError(400, text, param="tool_choice", code="invalid_value")
    return call or grammar


def _submit_all(
    engine: "TextEngine",
    asked: Sequence[tuple[Sequence[int], Any]],
    entry: "AdapterInfo | None",
    structure: Compiled | None,
) -> list[Answer]:
    """Return all of them or none."""
    answers: list[Answer] = []
    try:
        for ids, sampling in asked:
            # the entry and not its name, which may stand for another one by now
            answers.append(engine.submit(ids, adapter=entry, sampling=sampling, structure=structure))
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers


def _add_store(app: FastAPI, service: Service, operations: Operations) -> None:
    """Add loading and unloading of adapters, with vLLM's names, bodies and answers."""
    errors, app.router.route_class = (403, 404, *BODY, 429, 500, 503), AdminRoute

    @app.post(
        "/v1/load_lora_adapter",
        **operations.asks("give a name to an adapter of the store", str, errors, headers=DIGEST),
    )
    async def load(request: Request, body: LoadBody) -> Response:
        entry = await _change_store(
            lambda: service.engine.store.load(body.lora_name, body.lora_path, replace=body.load_inplace is not False),
            "lora_path",
        )
        text = f"Success: LoRA adapter '{entry.name}' added successfully."
        return PlainTextResponse(text, headers=digest_header(entry.digest))

    @app.post("/v1/unload_lora_adapter", **operations.asks("take a name away", str, errors, headers=DIGEST))
    async def unload(request: Request, body: UnloadBody) -> Response:
        entry = await _change_store(lambda: service.engine.store.unload(body.lora_name), "lora_name")
        text = f"Success: LoRA adapter '{entry.name}' removed successfully."
        return PlainTextResponse(text, headers=digest_header(entry.digest))


async def _change_store(work: Callable[[], "AdapterInfo"], param: str) -> "AdapterInfo":
    """Run work in a thread, as reading an adapter takes a while."""
    try:
        return await asyncio.to_thread(work)
    except LoralabError as error:
        raise to_api_error(error, param, fields=STORE_FIELDS) from None


async def _generating_adapter(service: Service, what: str, name: str, key: Key | None) -> "AdapterInfo | None":
    """Return the adapter that is asked to write; None is the base."""
    entry = await service.model(name, key)
    service.require_capable(what, name, entry)
    await service.have_tokenizer(entry)
    return entry
