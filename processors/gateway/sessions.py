"""Who is signed in: a cookie that is a signature over its own end, so nothing is stored; a new key signs all out."""

import hashlib
import hmac
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from processors.gateway.settings import GatewaySettings


class Sessions:
    """Signed cookies: `<end, Unix seconds>.<HMAC>`, keyed from the API key."""

    def __init__(self, settings: GatewaySettings, clock: Callable[[], float] = time.time) -> None:
        key = settings.api_key.get_secret_value() if settings.api_key is not None else ""
        self._key = hmac.digest(key.encode(), b"rewatch gateway session", "sha256")
        self._lasts_s = round(settings.session_h * 3600)
        self._clock = clock

    def put(self, response: Response, scope: Scope) -> None:
        """Sign the browser in that gets this response."""
        end = str(int(self._clock()) + self._lasts_s)
        _set(response, scope, f"{end}.{self._sign(end)}", self._lasts_s)

    @staticmethod
    def drop(response: Response, scope: Scope) -> None:
        """Sign the browser out that gets this response."""
        _set(response, scope, "", 0)

    def holds(self, scope: Scope) -> bool:
        """Whether a request carries a cookie of ours that has not ended."""
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            return False
        name = _cookie(scope)
        end, _, signature = cookie[name].value.partition(".") if name in cookie else ("", "", "")
        if not hmac.compare_digest(self._sign(end).encode(), signature.encode()):
            return False
        return int(end) > self._clock()  # ours, so it is a number

    def _sign(self, end: str) -> str:
        return hmac.new(self._key, end.encode(), hashlib.sha256).hexdigest()


def _with_tls(scope: Scope) -> bool:
    return bool(scope.get("scheme") == "https")


def _cookie(scope: Scope) -> str:
    """The cookie's name: browsers take one that begins with `__Host-` by TLS and for this very host alone."""
    return "__Host-rewatch" if _with_tls(scope) else "rewatch"


def _set(response: Response, scope: Scope, value: str, max_age: int) -> None:
    response.set_cookie(
        _cookie(scope), value, max_age=max_age, path="/", secure=_with_tls(scope), httponly=True, samesite="strict"
    )
