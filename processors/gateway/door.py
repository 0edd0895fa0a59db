"""Who may come in, and from where: looked at before anything of a request is read.

With `gateway.api_key` or `gateway.jwt` set: programs send the key, or a token, which is good for its scopes alone
(`rights`); browsers sign in with one of them and get a cookie that is a signature over its own end and scopes, so
nothing is stored. Wrong keys, by either way, are counted together, and after a few no key is tried for a while: see
`Throttle`; tokens cannot be guessed and are not counted. With neither only this machine reaches the gateway, and
requests must call it by a name of this machine: otherwise a page elsewhere could make its own name point here and read
what is shown. What changes something must come from a page of ours, or from no page at all.
"""

import ipaddress
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from processors.gateway import rights
from processors.gateway.bodies import bounded
from processors.gateway.headers import guarding
from processors.gateway.refusals import Refuse, address_of, slowed
from processors.gateway.sessions import Sessions
from processors.gateway.settings import GatewaySettings
from processors.gateway.throttle import Throttle
from streams.admission import Guard, NotAdmittedError, credential_in, require
from streams.grants import Pass, Scope


class _SlowedError(Exception):
    """No key is looked at for `wait` seconds."""

    def __init__(self, wait: float) -> None:
        super().__init__(wait)
        self.wait = wait


class Door:
    """The outermost part of the app: lets requests in or refuses them, before anything of a body is read."""

    def __init__(
        self,
        app: ASGIApp,
        settings: GatewaySettings,
        *,
        guard: Guard,
        sessions: Sessions,
        refuse: Refuse,
        throttle: Throttle,
    ) -> None:
        self._app = app
        self._settings = settings
        self._guard = guard
        self._sessions = sessions
        self._refuse = refuse
        self._throttle = throttle

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return

        guarded = guarding(send)
        request = Request(scope)
        refusal = None if scope["path"] in rights.OPEN else self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        inner = receive if scope["path"] == "/api/upload" else bounded(receive)
        await self._app(scope, inner, guarded)

    def _refusal(self, request: Request) -> Response | None:
        """Why not, if not."""
        if not self._guard.asks:
            return self._by_name(request) or self._by_origin(request, proven=False)
        scope = rights.needed(request.method, request.scope["path"])
        session = self._sessions.pass_of(request.scope)
        request.scope.setdefault("state", {})["session"] = session is not None
        try:
            found = self._carried(request, session, scope)
            if scope is not None:
                holder = found or session or self._guard.pass_of("")
                require(holder, scope)
                request.scope["state"]["until"] = holder.until
        except _SlowedError as error:
            return slowed(self._refuse, request, error.wait)
        except NotAdmittedError as error:
            return self._not_admitted(request, error)
        return self._by_origin(request, proven=session is not None) if found is None else None

    def _carried(self, request: Request, session: Pass | None, scope: Scope | None) -> Pass | None:
        """What the request may do by the key or token in its head; None where it has none, or its session counts.

        Raises:
            NotAdmittedError: it is none that is taken.
            _SlowedError: no key is looked at now.
        """
        credential = credential_in(request.headers)
        if not credential:
            return None
        try:
            found: Pass | None = self._guard.pass_of(credential)
            refused = None
        except NotAdmittedError as error:
            found, refused = None, error
        # Who is signed in has nothing to guess, and tokens cannot be guessed.
        if session is None and not self._guard.is_token(credential):
            wait = self._tried(address_of(request), right=found is not None)
            if wait > 0:
                raise _SlowedError(wait)
        if refused is not None and session is None and scope is not None:
            raise refused
        return found

    def _not_admitted(self, request: Request, error: NotAdmittedError) -> Response:
        path = request.scope["path"]
        if error.status == 401 and request.method in {"GET", "HEAD"} and not path.startswith("/api/"):
            target = path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?{urlencode({'next': target})}", 303)
        return self._refuse(request, error.status, str(error), error.headers)

    def _by_name(self, request: Request) -> Response | None:
        """Where nothing is asked for, only this machine may ask, by a name of its own."""
        host = request.headers.get("host", "localhost")
        if self._is_ours(_name(host)):
            return None
        message = f"this gateway is not known as {host[:255]}: call it localhost, or add the name to gateway.hosts"
        return self._refuse(request, 403, message, None)

    def _by_origin(self, request: Request, *, proven: bool) -> Response | None:
        """What changes something comes from a page of ours."""
        if rights.is_safe(request.method) or self._from_here(request.headers, proven=proven):
            return None
        return self._refuse(request, 403, "this was sent by a page of another site; nothing was changed", None)

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
