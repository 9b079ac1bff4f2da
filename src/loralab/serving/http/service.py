"""Steps that every request passes: key, body, model, quota, tokens."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request

from loralab.errors import AdapterNotFoundError, LoralabError, nearest
from loralab.serving.adapters.names import base_id
from loralab.serving.adapters.sums import describe_sum, is_sum, parse_sum
from loralab.serving.http.body import Body, parsed
from loralab.serving.http.errors import MAX_ECHOED_CHARACTERS, RETRY_SECONDS, ApiError, to_api_error, wrong_value
from loralab.serving.http.keys import Grant, Key, Keys
from loralab.serving.http.metrics import Metrics
from loralab.serving.settings import Limits

if TYPE_CHECKING:
    from loralab.serving.adapters.store import AdapterInfo
    from loralab.serving.opening import AnyEngine

Kind = TypeVar("Kind", bound=Body)
Result = TypeVar("Result")
JSON = "application/json"
TOO_LARGE = "request_too_large"
ALWAYS_ADMITTED_BYTES = 64 * 1024  # bytes of a body that is let in however many others arrive
MAX_CHARACTERS_PER_TOKEN = 64  # of a text for each token that a model takes: a longer one cannot fit
DIGEST_HEADER = "X-Loralab-Digest"


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Base and adapters of a running server, for its operator.

    `refused` are the adapters that it left out, `slower` the quicker ways of computing a step that
    it does not take; both with the reasons. `capabilities` are those of the first adapter, or of the
    base where there is none.
    """

    base: str
    kind: str
    adapters: tuple[str, ...]
    capabilities: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    slower: Mapping[str, str] = field(default_factory=dict)


class Service:
    """One engine as it is seen from outside. `stopping` refuses whatever is new."""

    def __init__(self, engine: "AnyEngine", keys: Keys | None, limits: Limits) -> None:
        self.engine, self.keys, self.limits = engine, keys, limits
        self.metrics = Metrics(engine)
        engine.observe = self.metrics.observe
        self.started = int(time.time())
        self.stopping = False
        self._arriving = 0  # bytes of bodies that are not whole yet
        self._worded = set[str]()  # digests of the adapters whose wording is known
        self._tokenizer_thread: ThreadPoolExecutor = ThreadPoolExecutor(1, "tokenizer")

    @property
    def base_id(self) -> str:
        """Return the name that clients use for the base."""
        return base_id(self.engine.base.name)

    def key(self, request: Request) -> Key | None:
        """Return the key of a request; None where everything is open.

        Raises:
            ApiError: 401 without a valid key.
        """
        if self.keys is None:
            return None
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        found = self.keys.find(secret.strip() if scheme.lower() == "bearer" else None)
        if found is None:
            raise ApiError(401, "this server needs a valid key: Authorization: Bearer ...", code="invalid_api_key")
        return found

    def authorise(self, request: Request) -> Key | None:
        """Return the key of a request to an engine that works.

        Raises:
            ApiError: 401, 503.
        """
        key = self.key(request)
        self.require_working()
        return key

    def require_admin(self, key: Key | None) -> None:
        """Refuse keys that may not load or unload, which changes the answers of others.

        Raises:
            ApiError: 403.
        """
        if key is not None and not key.admin:
            raise ApiError(403, f"key {key.name} may not load or unload adapters")

    def require_working(self) -> None:
        """Refuse new requests once the server stops, or the engine has died.

        Raises:
            ApiError: 503.
        """
        if self.stopping:
            raise ApiError(503, "the server stops", code="stopping", retry_after=5)
        if not self.engine.healthy:
            raise ApiError(503, "the engine has stopped; see the server's log", code="engine_dead")

    async def body(self, request: Request, kind: type[Kind]) -> Kind:
        """Return the checked body of a request.

        Raises:
            ApiError: it is too large, too slow, or wrong.
        """
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != JSON:  # what a page of another site may send unasked is never JSON
            raise ApiError(415, f"Content-Type must be {JSON}, got {given or 'none'}")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                content = await self._content(request)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive", code="timeout") from None
        return parsed(kind, content)

    async def _content(self, request: Request) -> bytes:
        """Return the body; no more than so many bytes of it, and of all together, are ever kept."""
        received = 0

        def arrive(size: int) -> None:
            nonlocal received
            received += size
            self._arriving += size
            if self._arriving > self.limits.bodies_bytes and received > ALWAYS_ADMITTED_BYTES:
                raise ApiError(
                    429,
                    "too many long requests arrive at once; ask again later",
                    code="busy",
                    retry_after=RETRY_SECONDS,
                )

        try:
            return await read_content(request, self.limits.body_bytes, arrive)
        finally:
            self._arriving -= received

    async def visible(self, key: Key | None) -> list["AdapterInfo"]:
        """Return the adapters of the store that a key may use."""
        entries = await self._looked_up("", self.engine.store.entries)
        return [entry for entry in entries if key is None or key.may_use(entry.name)]

    async def model(self, name: str, key: Key | None) -> "AdapterInfo | None":
        """Return the adapter of this name or digest; None is the base.

        Raises:
            ApiError: 404 with near names that the key may use; the same where there is a model
                that it may not use; 400, it is a sum that cannot be made.
        """
        if name in (self.base_id, self.engine.base.name):
            if key is None or key.base:
                return None
        elif is_sum(name):
            return await self._sum(name, key)
        elif (entry := await self._entry(name, key)) is not None:
            return entry
        names = [entry.name for entry in await self.visible(key)]
        hint = nearest(name, [self.base_id, *names] if key is None or key.base else names)
        raise ApiError(
            404, f"there is no model {name[:MAX_ECHOED_CHARACTERS]!r}{hint}", param="model", code="model_not_found"
        )

    async def _sum(self, name: str, key: Key | None) -> "AdapterInfo":
        """Return a weighted sum of adapters, each of which the key may use."""
        try:
            parts = parse_sum(name)
        except LoralabError as error:
            raise to_api_error(error, "model") from None
        entries = []
        for own, _ in parts:
            entry = await self.model(own, key)
            if entry is None:
                raise ApiError(
                    400, f"{own} is the base, which every sum has already", param="model", code="base_in_sum"
                )
            await self.have_tokenizer(entry)
            entries.append(entry)
        try:
            return describe_sum(name, entries, [scale for _, scale in parts])
        except LoralabError as error:
            raise to_api_error(error, "model") from None

    async def have_tokenizer(self, entry: "AdapterInfo | None") -> None:
        """Have an adapter's tokenizer ready before the event loop needs it.

        Raises:
            ApiError: 400, its chat template cannot be used.
        """
        if entry is None or entry.digest in self._worded or entry.parts:  # those of a sum have theirs
            return
        try:
            await self.run_in_tokenizer_thread(lambda: self.engine.tokenizer(entry))
        except LoralabError as error:
            raise to_api_error(error, "model") from None
        self._worded.add(entry.digest)

    async def _entry(self, name: str, key: Key | None) -> "AdapterInfo | None":
        """Return the adapter that a key may use; what it may not use is not even looked at."""
        if key is None or key.may_use(name):
            try:
                entry = await self._looked_up(name, lambda: self.engine.store.entry(name))
            except AdapterNotFoundError:
                return None
            except LoralabError as error:  # it is there, and damaged
                raise to_api_error(error, "model") from None
            if key is None or key.may_use(entry.name):
                return entry
        # by its digest: a name of the same adapter may be allowed
        return next((e for e in await self.visible(key) if name and e.digest == name), None)

    async def _looked_up(self, name: str, work: Callable[[], Result]) -> Result:
        """Ask the store; in a thread where a file has to be read, as answers go on meanwhile."""
        if self.engine.store.settled(name):
            return work()
        return await asyncio.to_thread(work)

    def admit(self, key: Key | None, tokens: int) -> Grant | None:
        """Count a request that takes at most so many tokens.

        Raises:
            ApiError: 429, the quota of the key is used up.
        """
        if key is None or self.keys is None:
            return None
        found = self.keys.admit(key, tokens)
        if isinstance(found, Grant):
            return found
        raise ApiError(429, found.reason, code="quota_exceeded", retry_after=found.seconds)

    def settle(self, grant: Grant | None, tokens: int) -> None:
        """Record the tokens that an admitted request used."""
        if grant is not None and self.keys is not None:
            self.keys.settle(grant, tokens)

    def require_capable(self, what: str, name: str, entry: "AdapterInfo | None") -> None:
        """Refuse what a model cannot do.

        Raises:
            ApiError: 400.
        """
        if reason := self.engine.refusal(what, entry):
            text = f"{name[:MAX_ECHOED_CHARACTERS]} cannot be asked for {what}: {reason}"
            raise ApiError(400, text, param="model", code="not_capable")

    def require_some(self, count: int, param: str, most: int) -> None:
        """Refuse no inputs, and too many.

        Raises:
            ApiError: 400.
        """
        if not 1 <= count <= most:
            text = f"{param}: from 1 to {most} in one request, got {count}"
            raise ApiError(400, text, param=param, code="invalid_value")

    def require_fitting(self, characters: int, param: str) -> None:
        """Refuse a text that is too long for the model, before its tokens are counted.

        Raises:
            ApiError: 400.
        """
        most = MAX_CHARACTERS_PER_TOKEN * self.engine.context
        if characters > most:
            limit = f"at most {most} are read here, as the model takes {self.engine.context} tokens"
            raise wrong_value(param, f"has {characters} characters; {limit}")

    async def run_in_tokenizer_thread(self, work: Callable[[], Result]) -> Result:
        """Run work that uses the tokenizer in one separate thread, so that a long text blocks nobody."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_thread, work)


def server_info(engine: "AnyEngine") -> ServerInfo:
    """Return the base and the adapters of an engine."""
    entries = engine.store.entries()
    return ServerInfo(
        base=base_id(engine.base.name),
        kind=engine.base.kind,
        adapters=tuple(entry.name for entry in entries),
        capabilities=tuple(engine.capabilities(entries[0] if entries else None)),
        refused=dict(engine.store.refused),
        slower=engine.slower,
    )


def digest_header(digest: str | None) -> dict[str, str]:
    """Return the header that names the adapter that answered; the base has none."""
    return {} if digest is None else {DIGEST_HEADER: digest}


async def read_content(request: Request, most: int, arrive: Callable[[int], None] = lambda size: None) -> bytes:
    """Return the body; no more than so many bytes of it are ever kept.

    Args:
        arrive: told of the bytes of each part; may raise.

    Raises:
        ApiError: 413, it is larger.
    """
    found = bytearray()
    too_large = ApiError(413, f"the body is larger than {most} bytes", code=TOO_LARGE)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    async for part in request.stream():
        found += part
        arrive(len(part))
        if len(found) > most:
            raise too_large
    return bytes(found)
