"""CORS: pages of other sites may use this server only if they are listed.

A browser asks before it lets a page send JSON to another site, and shows the page an answer only
where that names the page's origin. So a page that is not listed gets no header of these at all.
"""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loralab.errors import ConfigError
from loralab.serving.http.gate import ANY

ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s\[\]:/?#@,*]+)(?::([0-9]{1,5}))?")
USUAL_PORTS = {"http": "80", "https": "443"}  # which browsers leave out
READ, METHODS = "X-Loralab-Digest, X-Loralab-Warning, Retry-After", "GET, HEAD, POST"
FIELD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
SECONDS = "600"  # that a browser may remember what it was told


def origins_of(allowed: Sequence[str], *, with_keys: bool) -> frozenset[str]:
    """Return the origins as browsers write them.

    Args:
        allowed: such as https://chat.example.org; "*" is any.
        with_keys: whether the server asks for keys, without which "*" is refused: every page that
            somebody on this machine looks at could ask and load.

    Raises:
        ConfigError: one is not an origin, or is "*" without keys.
    """
    return frozenset(_origin(text, with_keys) for text in allowed)


def _origin(text: str, with_keys: bool) -> str:
    if text == ANY and with_keys:
        return text
    if text == ANY:
        raise ConfigError(
            "--allow-origin '*' without --keys would let every web page ask and load; list the origins, or give --keys",
            code="any_origin_without_keys",
            field="allow_origin",
        )
    found = ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if found is None:
        raise ConfigError(
            "--allow-origin expects an origin such as https://chat.example.org or "
            f"http://localhost:3000, no path, got {text!r}",
            code="invalid_origin",
            field="allow_origin",
        )
    scheme, host, port = found.groups()
    usual = port is None or port == USUAL_PORTS.get(scheme)
    return f"{scheme}://{host}" if usual else f"{scheme}://{host}:{port}"


class Origins:
    """Answers what browsers ask beforehand, and tells them which answers a page may read."""

    def __init__(self, app: ASGIApp, allowed: frozenset[str]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http" or not self._allowed:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        known = bool(origin) and (origin in self._allowed or ANY in self._allowed)
        if known and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight_answer(headers, origin)(scope, receive, send)
            return

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")  # a cache must not give it to another page
                if known:
                    answer["Access-Control-Allow-Origin"] = origin
                    answer["Access-Control-Expose-Headers"] = READ
            await send(message)

        await self._app(scope, receive, told)


def _preflight_answer(headers: Headers, origin: str) -> Response:
    """Answer a preflight request: any header may be sent, as keys are sent in one."""
    fields = [field.strip() for field in headers.get("access-control-request-headers", "").split(",")]
    allowed = ", ".join(field for field in fields if FIELD.fullmatch(field))
    answer = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Max-Age": SECONDS,
        "Vary": "Origin, Access-Control-Request-Headers",
    }
    return Response(status_code=204, headers=answer | ({"Access-Control-Allow-Headers": allowed} if allowed else {}))
