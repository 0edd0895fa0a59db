"""Who may come in, from where, and what every answer forbids browsers to do with it.

With `gateway.api_key` set: programs send the key; browsers sign in with it and get a cookie that is a signature over
its own end, so nothing is stored, and a new key signs everybody out. Wrong keys, by either way, are counted together,
and after a few no key is tried for a while: see `Throttle`. Without a key set only this machine reaches the gateway,
and requests must call it by a name of this machine: otherwise a page elsewhere could make its own name point here and
read what is shown. What changes something must come from a page of ours, or from no page at all.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from processors.gateway.settings import GatewaySettings
from streams.serving import key_in

Refuse = Callable[[Request, int, str, Mapping[str, str] | None], Response]
"""Makes an answer of a status and words, as whoever asks reads it: JSON for programs, a page for people."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not `no-referrer`: browsers would then send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

# Probes know no key and no name; it says nothing but that the process serves.
_OPEN = ("/health",)
# What the login page itself is made of.
_SIGN_IN = ("/login", "/static/")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

NEEDS_KEY = "an API key is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY` (gateway.api_key)"

# A person mistypes twice or thrice; at five a minute a key of eight random letters takes 40,000 years.
_TRIES = 5
_TRIES_TOGETHER = 60
_TRIES_IN_S = 60.0
_ADDRESSES = 10_000
# Programs come every few seconds, or once a night: a proof holds for a day.
_PROOF_S = 86_400.0

# Forms and labels have a few hundred bytes; uploads are bounded where they are passed on.
_BODY_BYTES = 64 * 1024
_BODY_S = 15.0

_Clock = Callable[[], float]


class Sessions:
    """Signed cookies: `<end, Unix seconds>.<HMAC>`, keyed from the API key."""

    def __init__(self, settings: GatewaySettings, clock: _Clock = time.time) -> None:
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


class Throttle:
    """Wrong keys, at the login and with requests: five a minute from one address, and sixty in all.

    Then no key is looked at, so a guess that is right tells nothing either. From an address whose programs sent the
    right one within a day right ones go on to be taken: strangers, or one camera with an old key behind the same proxy,
    must not shut the others out.
    """

    def __init__(self, clock: _Clock = time.monotonic) -> None:
        self._clock = clock
        self._all: deque[float] = deque()
        self._of: OrderedDict[str, deque[float]] = OrderedDict()
        self._proven: OrderedDict[str, float] = OrderedDict()

    def wait(self, address: str) -> float:
        """How long this address must wait before it may try, seconds; 0 is not at all."""
        now = self._clock()
        return max(
            _wait(self._all, now, _TRIES_TOGETHER),
            _wait(self._of[address], now, _TRIES) if address in self._of else 0.0,
        )

    def failed(self, address: str) -> None:
        """It tried a wrong key."""
        now = self._clock()
        self._all.append(now)
        self._of.setdefault(address, deque()).append(now)
        self._of.move_to_end(address)
        while len(self._of) > _ADDRESSES:
            self._of.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """A program there sent the right key."""
        self._proven[address] = self._clock()
        self._proven.move_to_end(address)
        while len(self._proven) > _ADDRESSES:
            self._proven.popitem(last=False)

    def is_proven(self, address: str) -> bool:
        """Whether a program there sent the right key within a day."""
        return address in self._proven and self._clock() - self._proven[address] < _PROOF_S


class Login:
    """`POST /login` and `POST /logout`; the form itself is a page."""

    def __init__(self, settings: GatewaySettings, refuse: Refuse, throttle: Throttle) -> None:
        self._settings = settings
        self._refuse = refuse
        self._sessions = Sessions(settings)
        self._throttle = throttle

    async def sign_in(self, request: Request) -> Response:
        """Take the key of a form and give a cookie for it; `next` says where to go on."""
        form = await _form(request)
        target = local(form.get("next", "/"))
        address = _address(request)
        if (wait := self._throttle.wait(address)) > 0:
            return _slowed(self._refuse, request, wait)
        if not self._settings.lets_in({"x-api-key": form.get("key", "")}):
            self._throttle.failed(address)
            return RedirectResponse(f"/login?{urlencode({'wrong': '', 'next': target})}", 303)
        response = RedirectResponse(target, 303)
        if self._settings.api_key is not None:
            self._sessions.put(response, request.scope)
        return response

    async def sign_out(self, request: Request) -> Response:
        """Take the cookie back."""
        response = RedirectResponse("/login" if self._settings.api_key is not None else "/", 303)
        self._sessions.drop(response, request.scope)
        return response


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

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        request = Request(scope)
        refusal = None if scope["path"] in _OPEN else self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        bounded = receive if scope["path"] == "/api/upload" else _bounded(receive)
        await self._app(scope, bounded, guarded)

    def _refusal(self, request: Request) -> Response | None:
        """Why not, if not."""
        settings, headers, path = self._settings, request.headers, request.scope["path"]
        by_key = settings.api_key is not None and settings.lets_in(headers)
        by_cookie = settings.api_key is not None and self._sessions.holds(request.scope)
        # Who is signed in has nothing to guess.
        if settings.api_key is not None and not by_cookie and key_in(headers):
            wait = self._tried(_address(request), right=by_key)
            if wait > 0:
                return _slowed(self._refuse, request, wait)
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


def local(target: str) -> str:
    """A path of ours, or the first page: a sign-in must not lead elsewhere."""
    ours = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if ours else "/"


def _address(request: Request) -> str:
    """Where a request comes from."""
    return request.client.host if request.client else ""


def _slowed(refuse: Refuse, request: Request, wait: float) -> Response:
    seconds = str(int(wait) + 1)
    return refuse(request, 429, f"too many wrong keys; try again in {seconds} s", {"Retry-After": seconds})


def _name(host: str) -> str:
    """The name in a Host header, without its port; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _with_tls(scope: Scope) -> bool:
    return bool(scope.get("scheme") == "https")


def _cookie(scope: Scope) -> str:
    """The cookie's name: browsers take one that begins with `__Host-` by TLS and for this very host alone."""
    return "__Host-rewatch" if _with_tls(scope) else "rewatch"


def _set(response: Response, scope: Scope, value: str, max_age: int) -> None:
    response.set_cookie(
        _cookie(scope), value, max_age=max_age, path="/", secure=_with_tls(scope), httponly=True, samesite="strict"
    )


def _wait(failures: deque[float], now: float, most: int) -> float:
    while failures and failures[0] <= now - _TRIES_IN_S:
        failures.popleft()
    return failures[-most] + _TRIES_IN_S - now if len(failures) >= most else 0.0


async def _form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form."""
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=16)
    except ValueError as error:
        raise HTTPException(400, f"not a form: {error}") from error
    return {name: values[-1] for name, values in fields.items()}


def _bounded(receive: Receive) -> Receive:
    """The body of a request, refused where it is too long or too slow."""
    size = 0
    deadline = asyncio.get_running_loop().time() + _BODY_S
    ended = False

    async def bounded() -> Message:
        nonlocal size, ended
        if ended:
            return await receive()  # the disconnect, whenever it comes
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {_BODY_S:g} s") from None
        size += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if size > _BODY_BYTES:
            raise HTTPException(413, f"more than {_BODY_BYTES:,} bytes")
        return message

    return bounded
