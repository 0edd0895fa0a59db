"""Who is signed in: a cookie that is a signature over its own end and rights, so nothing is stored.

A new key, or a new secret of tokens, signs everybody out. Where there is neither, because tokens are signed with a key
pair, what signs is made at each start.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import cast

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope as ASGIScope

from processors.gateway.settings import GatewaySettings
from streams.grants import Pass, Scope


class Sessions:
    """Signed cookies: `<end, Unix seconds>.<scopes, a - between>.<HMAC>`."""

    def __init__(self, settings: GatewaySettings, clock: Callable[[], float] = time.time) -> None:
        given = [secret.get_secret_value() for secret in (settings.api_key, settings.jwt.secret) if secret is not None]
        key = "\0".join(given).encode() or secrets.token_bytes()
        self._key = hmac.digest(key, b"rewatch gateway session", "sha256")
        self._lasts_s = round(settings.session_h * 3600)
        self._clock = clock

    def put(self, response: Response, scope: ASGIScope, found: Pass) -> None:
        """Sign the browser in that gets this response, for as long as sessions last and its pass does."""
        now = int(self._clock())
        end = int(min(now + self._lasts_s, found.until))
        said = f"{end}.{'-'.join(sorted(found.scopes))}"
        _set(response, scope, f"{said}.{self._sign(said)}", end - now)

    @staticmethod
    def drop(response: Response, scope: ASGIScope) -> None:
        """Sign the browser out that gets this response."""
        _set(response, scope, "", 0)

    def pass_of(self, scope: ASGIScope) -> Pass | None:
        """What a request may do by a cookie of ours that has not ended; None where it carries none."""
        cookie: SimpleCookie = SimpleCookie()
        try:
            cookie.load(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            return None
        name = _cookie(scope)
        said, _, signature = cookie[name].value.rpartition(".") if name in cookie else ("", "", "")
        if not hmac.compare_digest(self._sign(said).encode(), signature.encode()):
            return None
        end, _, scopes = said.partition(".")  # ours, so they are what `put` wrote
        found = Pass(frozenset(cast("list[Scope]", scopes.split("-"))), float(end))
        return found if found.until > self._clock() else None

    def _sign(self, end: str) -> str:
        return hmac.new(self._key, end.encode(), hashlib.sha256).hexdigest()


def _with_tls(scope: ASGIScope) -> bool:
    return bool(scope.get("scheme") == "https")


def _cookie(scope: ASGIScope) -> str:
    """The cookie's name: browsers take one that begins with `__Host-` by TLS and for this very host alone."""
    return "__Host-rewatch" if _with_tls(scope) else "rewatch"


def _set(response: Response, scope: ASGIScope, value: str, max_age: int) -> None:
    response.set_cookie(
        _cookie(scope), value, max_age=max_age, path="/", secure=_with_tls(scope), httponly=True, samesite="strict"
    )
