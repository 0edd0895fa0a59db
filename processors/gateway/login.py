"""Signing in and out with the key or a token, by the form of a page."""

from urllib.parse import parse_qs, urlencode

from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from processors.gateway.refusals import Refuse, address_of, slowed
from processors.gateway.sessions import Sessions
from processors.gateway.throttle import Throttle
from streams.admission import Guard, NotAdmittedError


class Login:
    """`POST /login` and `POST /logout`; the form itself is a page."""

    def __init__(self, guard: Guard, sessions: Sessions, refuse: Refuse, throttle: Throttle) -> None:
        self._guard = guard
        self._sessions = sessions
        self._refuse = refuse
        self._throttle = throttle

    async def sign_in(self, request: Request) -> Response:
        """Take the key, or the token, of a form and give a cookie for it; `next` says where to go on."""
        form = await _form(request)
        target = local(form.get("next", "/"))
        credential = form.get("key", "").strip() if self._guard.asks else ""
        address = address_of(request)
        if not self._guard.is_token(credential) and (wait := self._throttle.wait(address)) > 0:
            return slowed(self._refuse, request, wait)
        try:
            found = self._guard.pass_of(credential)
        except NotAdmittedError as error:
            if error.guess:
                self._throttle.failed(address)
            return RedirectResponse(f"/login?{urlencode({'wrong': '', 'next': target})}", 303)
        response = RedirectResponse(target, 303)
        if self._guard.asks:
            self._sessions.put(response, request.scope, found)
        return response

    async def sign_out(self, request: Request) -> Response:
        """Take the cookie back."""
        response = RedirectResponse("/login" if self._guard.asks else "/", 303)
        self._sessions.drop(response, request.scope)
        return response


def local(target: str) -> str:
    """A path of ours, or the first page: a sign-in must not lead elsewhere."""
    ours = target.startswith("/") and not target.startswith("//") and "\\" not in target and target.isprintable()
    return target if ours else "/"


async def _form(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form."""
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=16)
    except ValueError as error:
        raise HTTPException(400, f"not a form: {error}") from error
    return {name: values[-1] for name, values in fields.items()}
