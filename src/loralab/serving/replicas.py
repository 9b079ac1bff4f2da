"""Several engines behind one address, on the machines of a Ray cluster: Ray Serve's part.

    serve run loralab.serving.replicas:app model=smollm2-135m store=/shared/runs replicas=4

A request goes through the door to a replica that has asked for its adapter before (Ray's model
multiplexing), to another where that one's batch is full; there the same application answers it
that one server has (http/app.py). Needs the extras `serve` and `ray`.
"""

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loralab.cluster import joined, library, nodes, on
from loralab.errors import ConfigError, LoralabError, RunError, nearest
from loralab.models.load import natural_kind
from loralab.serving.http.app import build_app
from loralab.serving.http.errors import ApiError
from loralab.serving.http.gate import Hosts
from loralab.serving.http.keys import Key, Keys
from loralab.serving.http.service import ServerInfo, read_content, server_info
from loralab.serving.http.stream import GRACE
from loralab.serving.opening import open_engine, require_store
from loralab.serving.settings import Limits, ServeSettings

APP = "loralab"
CHANGE_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
ALREADY_DONE = ("model_not_found", "name_taken")  # refusals of a change that has been made already
REPLICA_HEADER = b"x-loralab-replica"
SCOPE_KEYS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
    "root_path",
)
MAX_TRIES = 4  # replicas that may die under one request
REPLICA_LOST = ApiError(503, "the replica was lost; ask again", code="replica_lost", retry_after=1)


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """Configuration of every replica; models and store are read on its machine."""

    model: str
    store: str | Path
    adapters: Mapping[str, str | Path] = field(default_factory=dict)
    pinned: Sequence[str] = ()
    settings: ServeSettings = field(default_factory=ServeSettings)
    limits: Limits = field(default_factory=Limits)
    keys: tuple[Key, ...] | None = None
    hosts: Hosts = field(default_factory=Hosts)
    origins: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what replicas cannot keep: each would count alone."""
        if self.limits.connections != Limits().connections:
            raise ConfigError(
                "--connections has no effect with --replicas: Ray's proxy holds the connections",
                code="no_effect",
                field="connections",
            )
        for key in self.keys or ():
            if key.requests_per_minute is not None or key.tokens_per_day is not None:
                raise ConfigError(
                    f"key {key.name} has a quota, which replicas do not count together; leave it "
                    "out, or serve without --replicas",
                    code="quota_with_replicas",
                    field="keys",
                )


class Replica:
    """One engine and its application; made by Ray Serve on some machine."""

    def __init__(self, plan: ReplicaPlan) -> None:
        serve = library("ray.serve")
        self._engine = open_engine(
            model=plan.model, store=plan.store, adapters=plan.adapters, pinned=plan.pinned, settings=plan.settings
        )
        keys = None if plan.keys is None else Keys(plan.keys)
        self._app = build_app(self._engine, keys=keys, limits=plan.limits, hosts=plan.hosts, origins=plan.origins)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._wanted = serve.get_multiplexed_model_id

        async def hold(model_id: str) -> str:
            return model_id  # the engine's store brings it in; Ray need only know that it is here

        self._hold = serve.multiplexed(max_num_models_per_replica=plan.settings.resident)(hold)
        self._engine.start()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield what the application sends for a request."""
        wanted = self._wanted()
        if wanted and await asyncio.to_thread(self._knows, wanted):  # it may have to be read
            await self._hold(wanted)
        async for message in call_app(self._app, scope, body):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name)]
            yield message

    async def change(self, scope: Scope, body: bytes) -> list[Message]:
        """Answer as `answer` does, but whole: for requests that go to all replicas."""
        return [message async for message in call_app(self._app, scope, body)]

    async def server_info(self) -> ServerInfo:
        """Return the base and the adapters of this replica."""
        return server_info(self._engine)

    def check_health(self) -> None:
        """Raise if the engine has died, so that Ray Serve starts another replica."""
        if not self._engine.healthy:
            raise RuntimeError("the engine has died")

    def _knows(self, name: str) -> bool:
        with contextlib.suppress(LoralabError):
            return bool(self._engine.store.entry(name))
        return False

    def __del__(self) -> None:
        """Stop the engine, once Ray Serve has let the answers under way end."""
        if engine := getattr(self, "_engine", None):
            engine.stop(drain=False)


class Router:
    """Hands every request to a replica, and what that sends to the client."""

    def __init__(self, replicas: Any, limits: Limits) -> None:
        self._replicas, self._limits = replicas, limits
        self._died = library("ray.exceptions").RayActorError
        self._changing = asyncio.Lock()  # the same order for all replicas

    async def __call__(self, request: Request) -> Response:
        """Return the answer of a replica."""
        scope = {key: request.scope[key] for key in SCOPE_KEYS if key in request.scope}
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await read_content(request, self._limits.body_bytes)
        except TimeoutError:
            return ApiError(408, "the body took too long to arrive", code="timeout").response()
        except ApiError as error:
            return error.response()
        if scope["path"] in CHANGE_PATHS:
            return await self._everywhere(scope, body)
        return await self._somewhere(scope, body)

    async def server_info(self) -> ServerInfo:
        """Return the base and the adapters of the replicas."""
        found: ServerInfo = await self._replicas.server_info.remote()
        return found

    async def _somewhere(self, scope: Scope, body: bytes) -> Response:
        """Answer from one replica; from another where it dies before the answer begins."""
        handle = self._replicas.options(stream=True, multiplexed_model_id=model_in(body))
        for _ in range(MAX_TRIES):
            messages = handle.answer.remote(scope, body)
            try:
                async with asyncio.timeout(self._limits.timeout + 2 * GRACE):
                    return ProxiedResponse(await anext(messages), messages, self._died)
            except self._died:
                continue
            except TimeoutError:
                messages.cancel()
                return ApiError(504, "no replica answers", code="timeout").response()
            except BaseException:  # the client is gone
                messages.cancel()
                raise
        return REPLICA_LOST.response()

    async def _everywhere(self, scope: Scope, body: bytes) -> Response:
        """Answer from one replica, which may refuse; else from all others too, which do the same."""
        async with self._changing:
            found = await self._replicas.change.remote(scope, body)
            if found[0]["status"] == 200:
                others = self._replicas.broadcast("change", scope, body)
                found = merged_outcome(found, await others.results_async())
        whole = Response(_body(found), found[0]["status"])
        whole.raw_headers = list(found[0]["headers"])
        return whole


class ProxiedResponse(Response):
    """Streamed response of a replica."""

    def __init__(self, start: Message, rest: Any, died: type[Exception]) -> None:
        super().__init__(status_code=start["status"])
        self.raw_headers = [(bytes(k), bytes(v)) for k, v in start["headers"]]
        self._start, self._rest, self._died = start, rest, died

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client or the replica is gone."""
        await send(self._start)
        try:
            async for message in self._rest:
                await send(message)
        except self._died:
            if "text/event-stream" not in self.headers.get("content-type", ""):
                raise
            text = f"data: {json.dumps(REPLICA_LOST.body())}\n\ndata: [DONE]\n\n"
            await send({"type": "http.response.body", "body": text.encode(), "more_body": False})
        finally:
            self._rest.cancel()


def merged_outcome(first: list[Message], others: Sequence[list[Message]]) -> list[Message]:
    """Return the common answer of all replicas to a change of names that the first one made.

    Where they share a store, the others find it done: a name gone, or taken. That is no refusal.
    """
    wrong = [one for one in others if one[0]["status"] != 200 and _code(one) not in ALREADY_DONE]
    return max(wrong, key=lambda messages: int(messages[0]["status"]), default=first)


def _code(messages: Sequence[Message]) -> Any:
    """Return the code of an answer that is an error; None for any other."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return json.loads(_body(messages))["error"]["code"]
    return None


def _body(messages: Sequence[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages[1:])


async def call_app(app: ASGIApp, scope: Scope, body: bytes) -> AsyncIterator[Message]:
    """Yield what an application sends for a request with a complete body; closing disconnects it."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (message := next(given, None)) is None:
            await asyncio.Event().wait()  # until the task is cancelled
        assert message is not None
        return message

    task = asyncio.ensure_future(app(dict(scope), receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def model_in(body: bytes) -> str:
    """Return the model that a body asks for; empty where it names none."""
    try:
        found = json.loads(body)["model"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


# -- starting it -------------------------------------------------------------------------------


def application(plan: ReplicaPlan, replicas: int, *, threads: int, gpus: int = 0) -> Any:
    """Return the door and its replicas, as Ray Serve runs them.

    Args:
        threads: processors that one replica takes; gpus: accelerators.
    """
    serve = library("ray.serve")
    ready = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=replicas,
        max_ongoing_requests=plan.settings.max_batch,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=plan.limits.timeout,
        max_constructor_retry_count=2,
        ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
    )
    most = replicas * (plan.settings.max_batch + plan.settings.queue)
    router = serve.deployment(Router, name="Router", max_ongoing_requests=most, ray_actor_options={"num_cpus": 0})
    return router.bind(ready.bind(plan), plan.limits)


def app(args: Mapping[str, Any]) -> Any:
    """Build the application for `serve run` and Serve's configuration files.

    Args:
        args: model, store, replicas, threads, gpus, timeout, and the fields of ServeSettings.

    Raises:
        ConfigError: one is missing or not known.
    """
    own = {"model", "store", "replicas", "threads", "gpus", "timeout"}
    known = own | {each.name for each in fields(ServeSettings)}
    if unknown := [name for name in args if name not in known]:
        raise ConfigError(
            f"{unknown[0]} is not an argument{nearest(unknown[0], known)}", code="unknown_argument", field=unknown[0]
        )
    if missing := [name for name in ("model", "store") if name not in args]:
        raise ConfigError(f"give {missing[0]}=...", code="missing_argument", field=missing[0])
    hints = get_type_hints(ServeSettings)
    settings: dict[str, Any] = {
        name: str(value) if hints[name] is str else int(value) for name, value in args.items() if name not in own
    }
    plan = ReplicaPlan(
        model=str(args["model"]),
        store=str(args["store"]),
        settings=ServeSettings(**settings),
        limits=Limits(timeout=float(args.get("timeout", Limits().timeout))),
    )
    numbers = {name: int(args.get(name, least)) for name, least in (("threads", 1), ("gpus", 0))}
    return application(plan, int(args.get("replicas", 1)), **numbers)


@contextlib.contextmanager
def running(plan: ReplicaPlan, replicas: int, address: str, host: str, port: int) -> Iterator[ServerInfo]:
    """Run the application at an address of the cluster's head, until the block ends.

    Raises:
        ConfigError: no such cluster, not enough processors, or a machine lacks model or store.
        RunError: the replicas could not be started.
    """
    with joined(address, cpus=replicas) as ray:
        threads = max(1, torch.get_num_threads() // (replicas if address == "local" else 1))
        gpus = _require_ready(ray, plan, replicas, threads)
        serve = library("ray.serve")
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        rest = math.ceil(plan.limits.keep_alive)
        options = {"host": host, "port": port, "keep_alive_timeout_s": rest}
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
        try:
            handle = serve.run(application(plan, replicas, threads=threads, gpus=gpus), name=APP, logging_config=quiet)
            yield handle.server_info.remote().result()
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise RunError(
                f"the replicas could not be started: {said:.300}", code="not_started", field="replicas"
            ) from None
        finally:
            with contextlib.suppress(Exception):
                serve.delete(APP)
                if address == "local":
                    serve.shutdown()


def _require_ready(ray: Any, plan: ReplicaPlan, replicas: int, threads: int) -> int:
    """Check the room for all replicas, and model and store on every machine; return the GPUs of each."""
    found = nodes(ray)
    gpus = 1 if any(node.gpus for node in found) else 0
    room = {node.id: min(node.cpus // threads, node.gpus) if gpus else node.cpus // threads for node in found}
    if (places := sum(room.values())) < replicas:
        raise ConfigError(
            f"--replicas {replicas}: the cluster has room for {places}, with {threads} processors "
            f"and {gpus} GPUs each; OMP_NUM_THREADS=1 asks for one processor",
            code="no_room",
            field="replicas",
        )
    task = ray.remote(num_cpus=0)(_lacks)
    able = [node for node in found if room[node.id]]
    said = [task.options(scheduling_strategy=on(node)).remote(plan) for node in able]
    for node, wrong in zip(able, ray.get(said), strict=True):
        if wrong:
            raise ConfigError(f"node {node.name}: {wrong}", code="node_not_ready", field="replicas")
    return gpus


def _lacks(plan: ReplicaPlan) -> str:
    """Return what this machine lacks to serve; empty if nothing."""
    try:
        natural_kind(plan.model)
        require_store(plan.store)
    except LoralabError as error:
        return str(error)
    return ""
