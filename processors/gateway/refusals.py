"""The words of a refusal, and where a request comes from: for whoever lets in or refuses."""

from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response

Refuse = Callable[[Request, int, str, Mapping[str, str] | None], Response]
"""Makes an answer of a status and words, as whoever asks reads it: JSON for programs, a page for people."""


def address_of(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else ""


def slowed(refuse: Refuse, request: Request, wait: float) -> Response:
    """No key is looked at from there for so long, seconds."""
    seconds = str(int(wait) + 1)
    return refuse(request, 429, f"too many wrong keys; try again in {seconds} s", {"Retry-After": seconds})
