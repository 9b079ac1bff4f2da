"""From the engine's thread to a client: answers gathered, awaited, streamed, given up.

The engine only ever puts an event into a queue of the event loop; how fast a client reads is
nothing that it waits for. Whoever goes away or takes too long has his answers cancelled.
"""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from loralab.serving.http.errors import ApiError
from loralab.serving.http.responses import Schema
from loralab.serving.http.shapes import Shape
from loralab.serving.request import CANCELLED, FAILED, Answer, Completed, Delta, Event, Finished

Result = TypeVar("Result")
GRACE = 5.0  # seconds for a client to read the end of a stream that took too long


class ClientGoneError(Exception):
    """Nobody reads the answer any more."""


class Gathered:
    """The answers to one request, as events of the event loop that it was made in.

    Args:
        ended: called, in the engine's thread, with the tokens of all answers when the last is over.
    """

    def __init__(self, answers: Sequence[Answer], ended: Callable[[int], None]) -> None:
        self.answers = answers
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._ends: dict[int, Finished] = {}
        self._ended = ended
        self._lock = threading.Lock()
        for index, answer in enumerate(answers):
            answer.listen(self._listener(index))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events with the number of their answer, until all are over.

        Raises:
            ApiError: an answer failed; the others are cancelled.
        """
        left = len(self.answers)
        while left:
            index, event = await self._queue.get()
            if isinstance(event, Finished):
                left -= 1
                _require_good(event)
            yield index, event

    async def completed(self) -> list[Completed]:
        """Return all answers, whole."""
        pieces: list[list[Delta]] = [[] for _ in self.answers]
        async for index, event in self.events():
            if isinstance(event, Delta):
                pieces[index].append(event)
        whole = zip(self.answers, pieces, self.ends(), strict=True)
        return [Completed.of(answer, own, end) for answer, own, end in whole]

    def ends(self) -> list[Finished]:
        """Wait for all answers and return their ends."""
        return [self._ends[index] for index in range(len(self.answers))]

    def cancel(self) -> None:
        """Give up what is not over yet."""
        for index, answer in enumerate(self.answers):
            if index not in self._ends:
                answer.cancel()

    def _listener(self, index: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Finished):
                self._end(index, event)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return listen

    def _end(self, index: int, end: Finished) -> None:
        with self._lock:  # what ended before anyone listened is told in the loop's thread
            self._ends[index] = end
            over = len(self._ends) == len(self.answers)
        if over:
            ends = self._ends.values()
            self._ended(sum(e.prompt_tokens + e.completion_tokens for e in ends))


class EventStream(Response):
    """Answers as server-sent events, in the shape of their API."""

    media_type = "text/event-stream"

    def __init__(self, gathered: Gathered, shape: Shape, seconds: float, headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._gathered, self._shape, self._seconds = gathered, shape, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        with contextlib.suppress(ClientGoneError, ApiError):
            await guarded(receive, self._write(send), self._seconds + GRACE, cancel=self._gathered.cancel)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in self._chunks():
                    await _send_event(send, chunk.as_text())
        except TimeoutError:
            await _send_event(send, json.dumps(_late(self._seconds).body(), ensure_ascii=False))
        except ApiError as error:
            await _send_event(send, json.dumps(error.body(), ensure_ascii=False))
        await _send(send, b"data: [DONE]\n\n", more=False)

    async def _chunks(self) -> AsyncIterator[Schema]:
        for index in range(len(self._gathered.answers)):
            if (opening := self._shape.opening(index)) is not None:
                yield opening
        async for index, event in self._gathered.events():
            shape = self._shape
            for chunk in shape.endings(index, event) if isinstance(event, Finished) else shape.pieces(index, event):
                yield chunk
        if (final := self._shape.final(self._gathered.ends())) is not None:
            yield final


async def guarded(
    receive: Receive, work: Coroutine[Any, Any, Result], seconds: float, *, cancel: Callable[[], Any]
) -> Result:
    """Return the result of some work, unless it takes too long or the client leaves.

    Whatever ends it early, `cancel` is called.

    Raises:
        ClientGoneError: the client left.
        ApiError: of the work itself; 504 after so many seconds.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientGoneError if gone in done else _late(seconds)
    finally:
        for each in (task, gone):
            each.cancel()
        cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, text: str) -> None:
    await _send(send, b"data: " + text.encode() + b"\n\n")


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _require_good(end: Finished) -> None:
    if end.reason == FAILED:
        raise ApiError(500, end.error or "the answer failed", code="engine_error")
    if end.reason == CANCELLED:
        raise ApiError(503, "the server stops; ask again later", code="stopping")


def _late(seconds: float) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds:g} seconds", code="timeout")
