"""Requests to an application, and what every answer must look like."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
from serving.fakes import FakeEngine

from loralab.serving.http.app import build_app
from loralab.serving.http.keys import Keys
from loralab.serving.settings import Limits

CHAT = {"model": "sst", "messages": [{"role": "user", "content": "good film"}], "max_tokens": 4}
TEXT = {"model": "sst", "prompt": "good film", "max_tokens": 4}


def talk(app: Any, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], key: str | None = None) -> Any:
    """Run some requests against an application."""

    async def run() -> Any:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            return await work(client)

    return asyncio.run(run())


def post(
    engine: FakeEngine,
    path: str,
    body: Any,
    *,
    keys: Keys | None = None,
    key: str | None = None,
    limits: Limits | None = None,
    **more: Any,
) -> httpx.Response:
    """One request."""
    app = build_app(engine, keys=keys, limits=limits)  # type: ignore[arg-type]
    given = {"json": body, **more} if body is not None else more
    response: httpx.Response = talk(app, lambda client: client.post(path, **given), key)
    return response


def get(engine: FakeEngine, path: str, **keys: Any) -> httpx.Response:
    app = build_app(engine, keys=keys.get("keys"))  # type: ignore[arg-type]
    response: httpx.Response = talk(app, lambda client: client.get(path), keys.get("key"))
    return response


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    found: dict[str, Any] = error
    return found


def events(response: httpx.Response) -> list[Any]:
    """Return the data of a stream, which must end as OpenAI's does."""
    lines = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something that happens in another thread, on any machine."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
