"""Routes that read a body: once its sender may ask, and strictly (body.py); FastAPI draws it from its type."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from loralab.serving.http.service import Service


class Route(APIRoute):
    """A route whose handler gets the request, and the body that its `body` is declared as."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request; FastAPI itself would read bodies of any size and form."""
        if self.body_field is None:
            return super().get_route_handler()
        kind: Any = self.body_field.field_info.annotation
        handler, admit = self.endpoint, self.admit

        async def answer(request: Request) -> Response:
            service: Service = request.app.state.service
            admit(service, request)
            found: Response = await handler(request, await service.body(request, kind))
            return found

        return answer

    @staticmethod
    def admit(service: Service, request: Request) -> None:
        """Refuse those without a key."""
        service.authorise(request)


class AdminRoute(Route):
    """A route that changes the answers of others."""

    @staticmethod
    def admit(service: Service, request: Request) -> None:
        """Refuse those without a key for it."""
        service.require_admin(service.key(request))
        service.require_working()
