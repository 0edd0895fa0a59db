"""Who may come in, and from where: looked at before anything of a request is read.

With `gateway.api_key` set: programs send the key; browsers sign in with it and get a cookie that is a signature over
its own end, so nothing is stored, and a new key signs everybody out. Wrong keys, by either way, are counted together,
and after a few no key is tried for a while: see `Throttle`. Without a key set only this machine reaches the gateway,
and requests must call it by a name of this machine: otherwise a page elsewhere could make its own name point here and
read what is shown. What changes something must come from a page of ours, or from no page at all.
"""

import ipaddress
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from processors.gateway.bodies import bounded
from processors.gateway.headers import guarding
from processors.gateway.refusals import Refuse, address_of, slowed
from processors.gateway.sessions import Sessions
from processors.gateway.settings import GatewaySettings
from processors.gateway.throttle import Throttle
from streams.serving import key_in

# Probes know no key and no name; it says nothing but that the process serves.
_OPEN = ("/health",)
# What the login page itself is made of.
_SIGN_IN = ("/login", "/static/")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

NEEDS_KEY = "an API key is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY` (gateway.api_key)"


class Door:
    """The outermost part of the app: lets requests in or refuses them, before anything of a body is read."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, refuse: Refuse, throttle: Throttle) -> None:
        self._app = app
        self._settings = settings
        self._refuse = refuse
        self._throttle = throttle
        self._sessions = Sessions(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return

        guarded = guarding(send)
        request = Request(scope)
        refusal = None if scope["path"] in _OPEN else self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        inner = receive if scope["path"] == "/api/upload" else bounded(receive)
        await self._app(scope, inner, guarded)

    def _refusal(self, request: Request) -> Response | None:
        """Why not, if not."""
        settings, headers, path = self._settings, request.headers, request.scope["path"]
        by_key = settings.api_key is not None and settings.lets_in(headers)
        by_cookie = settings.api_key is not None and self._sessions.holds(request.scope)
        # Who is signed in has nothing to guess.
        if settings.api_key is not None and not by_cookie and key_in(headers):
            wait = self._tried(address_of(request), right=by_key)
            if wait > 0:
                return slowed(self._refuse, request, wait)
        request.scope.setdefault("state", {})["session"] = by_cookie
        if settings.api_key is None:
            if not self._is_ours(_name(headers.get("host", "localhost"))):
                return self._refuse(
                    request,
                    403,
                    f"this gateway is not known as {headers['host'][:255]}: call it localhost, or add the name to "
                    "gateway.hosts",
                    None,
                )
        elif not by_key and not by_cookie and not path.startswith(_SIGN_IN):
            if path.startswith("/api/") or request.method not in {"GET", "HEAD"}:
                return self._refuse(request, 401, NEEDS_KEY, {"WWW-Authenticate": "Bearer"})
            target = path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?{urlencode({'next': target})}", 303)
        if request.method not in _SAFE and not by_key and not self._from_here(headers, proven=by_cookie):
            return self._refuse(request, 403, "this was sent by a page of another site; nothing was changed", None)
        return None

    def _tried(self, address: str, *, right: bool) -> float:
        """A key came with a request: how long none is looked at, seconds; 0 where this one counts."""
        throttle = self._throttle
        wait = throttle.wait(address)
        if right and (wait <= 0 or throttle.is_proven(address)):
            throttle.succeeded(address)
            return 0.0
        if wait <= 0:
            throttle.failed(address)
        return wait

    def _from_here(self, headers: Headers, *, proven: bool) -> bool:
        """Whether a request comes from a page of ours; where nothing must be `proven`, from no page will do."""
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site in {"same-origin", "none"}
        origin = headers.get("origin")
        if origin is None:
            return not proven
        try:
            place = urlsplit(origin)
            # A proxy in front may call us by another name than browsers do: those are in gateway.hosts.
            return place.netloc == headers.get("host") or (place.hostname or "") in self._settings.hosts
        except ValueError:
            return False

    def _is_ours(self, name: str) -> bool:
        if name in {"localhost", self._settings.host.strip("[]")} or {name, "*"} & set(self._settings.hosts):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""
