"""h11 connection with read and write timeouts.

uvicorn alone waits for ever for the rest of a head, and for a client that reads nothing. Here each
wait has an end, so that clients who mean ill cannot take up all connections. Kept beside uvicorn, as
it has no option for either, nor for closing the connection that has been idle the longest.

Needs the extra `serve`.
"""

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from loralab.serving.http.errors import ApiError
from loralab.serving.http.gate import MAX_HEAD_BYTES

MIN_READ_BYTES = 4096  # bytes that a client must take in each `stall_seconds` once it is behind
MESSAGES = {
    408: "the head of the request took too long to arrive",
    431: f"the head of the request is larger than {MAX_HEAD_BYTES} bytes",
    501: "this Transfer-Encoding is not known here; use chunked",
}


class Connection(H11Protocol):
    """A connection with limits: those of the application, `app.state.service.limits`.

    h11 is taken whatever else is installed: what it refuses is known and tested.
    """

    def __init__(self, config: Config, *others: Any, **more: Any) -> None:
        super().__init__(config, *others, **more)
        self._limits = config.app.state.service.limits  # type: ignore[union-attr]
        self._silent: asyncio.TimerHandle | None = None  # runs while a head is awaited
        self._behind: asyncio.TimerHandle | None = None  # runs while the client does not read
        self._unread = 0
        self.since = self.loop.time()

    @property
    def idle(self) -> bool:
        """Return whether no request is under way."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; where there are too many, the one that has been idle the longest goes."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > self._limits.connections:
            self._longest_idle().transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take more of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Note that the server has written the whole answer."""
        super().on_response_complete()
        self.since = self.loop.time()
        if self._behind is None and self.transport.get_write_buffer_size():
            self._wait_for_reader()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is closed."""
        self._silent, self._behind = _cancel(self._silent), _cancel(self._behind)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Note that the client reads too slowly."""
        super().pause_writing()
        if self._behind is None:
            self._wait_for_reader()

    def resume_writing(self) -> None:
        """Note that the client has caught up."""
        super().resume_writing()
        self._behind = _cancel(self._behind)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not a request, in the shape of all errors; called while h11's is handled."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status, MESSAGES.get(status, f"this is not an HTTP request: {error}"))

    # -- waiting for a head ---------------------------------------------------------------------

    def _watch(self) -> None:
        """Start the clock of a head that is awaited; uvicorn's own runs between two requests."""
        resting = self.timeout_keep_alive_task is not None
        if not self.idle or resting or self.transport.is_closing():
            self._silent = _cancel(self._silent)
        elif self._silent is None:
            seconds = self._limits.head_seconds
            self._silent = self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        self._silent = None
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, MESSAGES[408])
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without an application, if no other answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(ApiError(status, message).body()).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json"
                f"\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    # -- waiting for a reader -------------------------------------------------------------------

    def _wait_for_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._behind = self.loop.call_later(self._limits.stall_seconds, self._look_at_reader)

    def _look_at_reader(self) -> None:
        self._behind = None
        left = self.transport.get_write_buffer_size()
        if left and self._unread - left < MIN_READ_BYTES:
            self.transport.abort()
        elif left:
            self._wait_for_reader()

    def _longest_idle(self) -> "Connection":
        """Return the connection that was idle longest; those without any request first."""
        others: list[Any] = [c for c in self.connections if c is not self]
        free = [c for c in others if c.idle and not c.transport.is_closing()]
        return min(free, key=lambda c: (c.cycle is not None, c.since), default=self)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return None in its place."""
    if timer is not None:
        timer.cancel()
    return None
