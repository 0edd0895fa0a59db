"""The web door put together: the API, the pages, the login, and one way to say what went wrong."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from processors.gateway import api, rights
from processors.gateway.door import Door
from processors.gateway.login import Login
from processors.gateway.pages import build_pages, error_page, wants_page
from processors.gateway.ports import InvalidError, NotFoundError, Source
from processors.gateway.sessions import Sessions
from processors.gateway.settings import GatewaySettings
from processors.gateway.throttle import Throttle
from processors.gateway.upload import Uploads
from streams.admission import Guard
from streams.errors import UnavailableError

# An embedded service is back in about five seconds.
_RETRY_AWAY = "5"


def build_app(source: Source, settings: GatewaySettings, uploads: Uploads) -> ASGIApp:
    """The ASGI app.

    Args:
        source: everything that is shown.
        settings: the section `gateway`.
        uploads: the way to ingest.
    """
    app = FastAPI(
        title="rewatch",
        version=version("rewatch"),
        description='What cameras saw, how it was judged, and why. Every error is `{"error": "..."}`.',
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(api.routes(source, uploads))
    throttle = Throttle()
    guard, sessions = Guard(settings), Sessions(settings)
    login = Login(guard, sessions, refuse, throttle)
    app.router.routes += [
        Route("/login", login.sign_in, methods=["POST"]),
        Route("/logout", login.sign_out, methods=["POST"]),
        *build_pages(source),
    ]
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    if guard.asks:
        _name_the_key(app)
    return Door(app, settings, guard=guard, sessions=sessions, refuse=refuse, throttle=throttle)


def refuse(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as whoever asks reads it: a page for a person's browser, else JSON."""
    if wants_page(request):
        return error_page(request, status, message, headers)
    return JSONResponse({"error": message}, status, headers=dict(headers or {}))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = f"there is nothing at {request.url.path}"
    return refuse(request, error.status_code, detail, error.headers)


async def _unusable(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = (
        f"{'.'.join(map(str, problem['loc'][1:])) or problem['loc'][0]}: {problem['msg']}" for problem in error.errors()
    )
    return refuse(request, 422, "; ".join(problems))


async def _invalid(request: Request, error: Exception) -> Response:
    return refuse(request, 422, str(error))


async def _missing(request: Request, error: Exception) -> Response:
    return refuse(request, 404, str(error))


async def _away(request: Request, error: Exception) -> Response:
    return refuse(request, 503, str(error), {"Retry-After": _RETRY_AWAY})


async def _fault(request: Request, _error: Exception) -> Response:
    # Starlette raises it again behind this answer, so the server logs it.
    return refuse(request, 500, "the gateway failed on this request; its log says why")


_HANDLERS: Mapping[type[Exception], Any] = {
    HTTPException: _http,
    RequestValidationError: _unusable,
    InvalidError: _invalid,
    NotFoundError: _missing,
    UnavailableError: _away,
    Exception: _fault,
}


def _name_the_key(app: FastAPI) -> None:
    """Say in the description that a key or a token is asked for, how it is given, and which scope a token needs."""
    described = app.openapi()
    described.setdefault("components", {})["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            scope = rights.needed(method.upper(), path)
            operation["security"] = [] if scope is None else [{"bearer": [scope]}, {"header": []}]
