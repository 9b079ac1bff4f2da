"""Middleware that rejects bad Host headers, oversized heads and ambiguous lengths.

A page on another site can let a name of its own point at this machine and then ask in the place of
whoever looks at it (DNS rebinding). Such a request names a host that this server is not, so every
request must name one that it is. Starlette's TrustedHostMiddleware was not enough: it knows names
alone, not "any bare address", answers in plain text, and looks at neither lengths nor size of a head.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loralab.errors import ConfigError, join_limited
from loralab.serving.http.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::", "")  # what is bound to all addresses of a machine
ANY = "*"
MAX_HEAD_BYTES = 16 * 1024  # bytes; a head that comes in pieces is given up by h11 at the same size
MAX_ECHOED_HOST = 80  # characters of a foreign host that are repeated
NAME = r"[^\s\[\]:/?#@]+"
HOST = re.compile(rf"(\[[0-9A-Fa-f:.]+\]|{NAME})(:[0-9]{{0,5}})?")


@dataclass(frozen=True)
class Hosts:
    """Names and addresses of the server, without ports.

    Attributes:
        addresses: whether every bare address is right; an address cannot be pointed elsewhere.
    """

    names: frozenset[str] = frozenset(LOOPBACK)
    addresses: bool = False

    def knows(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        found = HOST.fullmatch(header)
        if found is None:
            return False
        name = plain(found[1])
        bare = self.addresses and _is_address(name) is not None
        return bare or ANY in self.names or name in self.names


def hosts_of(bound: str, allowed: Sequence[str] = ()) -> Hosts:
    """Return the host names of a server that listens on an address.

    Args:
        bound: the address, as it was given; one that stands for all lets every bare address in.
        allowed: further names; "*" is any.

    Raises:
        ConfigError: a name is none, or has a scheme or a port.
    """
    for name in allowed:
        if _is_address(name.strip("[]")) is None and not re.fullmatch(NAME, name):
            raise ConfigError(
                f"--allow-host expects a name such as lab.example.org, no port, got {name!r}",
                code="invalid_host",
                field="allow_host",
            )
    names = {*LOOPBACK, *map(plain, allowed)}
    if bound not in ALL_ADDRESSES:
        names.add(plain(bound))
    return Hosts(frozenset(names), addresses=bound in ALL_ADDRESSES)


def plain(name: str) -> str:
    """Return a name in the one form in which names are compared."""
    address = _is_address(name.strip("[]"))
    return address or name.lower().removesuffix(".")


class Gate:
    """Refuses heads that are too large, name another host, or tell a length in two ways."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        error = self._wrong(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        response = error.response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size + sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEAD_BYTES:
            return ApiError(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes")
        host = headers.get("host", "")
        if not self._hosts.knows(host):
            return ApiError(
                421,
                f"this server is not {host[:MAX_ECHOED_HOST]!r}; it is {join_limited(sorted(self._hosts.names))}"
                "; start it with --allow-host to give it another name",
                code="unknown_host",
            )
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy in front may read it the other way, and take the rest for a new request
            return ApiError(400, "give Content-Length or Transfer-Encoding, not both")
        return None


class HeadAsGet:
    """Answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and leave the body out."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        await self._app({**scope, "method": "GET"}, receive, bare)


def _is_address(name: str) -> str | None:
    """Return the usual form of an address; None if it is a name."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return None
