"""Routes of the page. Its files ask this server alone, and nothing else may be loaded into it."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from loralab.errors import LoralabError
from loralab.serving.adapters.files import read_metadata
from loralab.serving.http.errors import ApiError
from loralab.serving.http.service import Service
from loralab.serving.page.example import Example, example_of

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {file.name: TYPES[file.suffix] for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES}
START, EXAMPLE = "page.html", "/page/example"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page, its files, and the examples that it begins with."""

    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return _file(START)

    @app.get(EXAMPLE, include_in_schema=False)
    async def example(request: Request, model: str = "") -> Response:
        return JSONResponse({"example": await _example(service, model, request)})

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, "the page has no such file")
        return _file(name)


def _file(name: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=f"{FILES[name]}; charset=utf-8", headers=HEADERS)


async def _example(service: Service, model: str, request: Request) -> Example | None:
    """Return an example for an adapter; None where there is none, or the key may not see training data."""
    key = service.key(request)
    entry = await service.model(model, key)
    if entry is None or entry.parts or (key is not None and not key.admin):
        return None
    engine: Any = service.engine
    try:
        read = await asyncio.to_thread(read_metadata, engine.store.root, entry.path)
        return await service.run_in_tokenizer_thread(
            lambda: example_of(read.record, entry, kind=engine.base.kind, tokenizer=engine.tokenizer(entry))
        )
    except (LoralabError, OSError, ValueError):  # an example is a help, never a reason to fail
        return None
