"""Signing in and out with the key, by the form of a page."""

from urllib.parse import parse_qs, urlencode

from fastapi import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from processors.gateway.refusals import Refuse, address_of, slowed
from processors.gateway.sessions import Sessions
from processors.gateway.settings import GatewaySettings
from processors.gateway.throttle import Throttle


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
        address = address_of(request)
        if (wait := self._throttle.wait(address)) > 0:
            return slowed(self._refuse, request, wait)
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
