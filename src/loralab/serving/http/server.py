"""The socket and its server: open before anything costs time, closed after the last answer.

The server is uvicorn's; what is added is a socket that is open before the model is read, so that a
taken port is known at once, and an end that waits for answers and not for idle connections.

Needs the extra `serve`.
"""

import contextlib
import ipaddress
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from loralab import system
from loralab.errors import ConfigError
from loralab.serving.http.connection import Connection

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Listener(uvicorn.Server):
    """A server on a socket that is open already.

    SIGTERM and SIGINT end it: nothing new is taken, what is under way is answered to its end; a
    second SIGINT gives that up. `run` then returns, and `force_exit` tells which it was.

    Args:
        app: of build_app.
        ready: called once requests are answered.
    """

    def __init__(self, app: FastAPI, opened: socket.socket, ready: Callable[[], None]) -> None:
        self._service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=self._service.limits.keep_alive,
                timeout_graceful_shutdown=math.ceil(2 * self._service.limits.timeout),
            )
        )
        self._opened, self._ready = opened, ready

    def listen(self) -> None:
        """Answer until the end."""
        self.run(sockets=[self._opened])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Announce that it listens."""
        await super().startup(sockets=sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answer 503 to new requests on connections that are still open."""
        self._service.stopping = True
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let a signal end the server and nothing else: the process then exits as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def wait_for_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in SIGNALS}
    try:
        while not told.wait(0.5):  # a wait without end would hold the signals back
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that nobody else can take any more; it does not listen yet.

    Args:
        port: 0 is any that is free.

    Raises:
        ConfigError: the address is none of this machine, or the port is taken.
    """
    opened = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind)
        system.claim_address(opened)
        opened.bind(address)
    except (OSError, OverflowError) as error:
        if opened is not None:
            opened.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; --port 0 takes a free one",
            code="cannot_listen",
            field="port",
        ) from None
    return opened


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address(opened: socket.socket) -> str:
    """Return the address of a socket, such as http://127.0.0.1:8000."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
