"""Who is let in at a door: whoever has its API key, or a token that allows what is asked for.

Where neither is set anybody is: such a door listens to this machine alone.
"""

import hmac
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from streams.grants import ALL, Pass, Scope
from streams.serving import EndpointSettings

if TYPE_CHECKING:
    from streams.tokens import Tokens

# Three parts of base64url. A key that looks so is compared first.
_TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]*", re.ASCII)


class NotAdmittedError(Exception):
    """Not let in; the message says why and what would help, and holds nothing that was sent."""

    def __init__(self, message: str, *, status: int, challenge: str, guess: bool = False) -> None:
        super().__init__(message)
        self.status = status
        """401, or 403 where it is known who asks."""
        self.headers = {"WWW-Authenticate": challenge}
        self.guess = guess
        """Whether a wrong API key was sent: tokens cannot be guessed, so theirs are none."""


class Guard:
    """Looks at what requests carry.

    Args:
        settings: the door's section.
        clock: wall time, seconds since the Unix epoch.

    Raises:
        SettingsError: the keys of its tokens cannot be used.
    """

    def __init__(self, settings: EndpointSettings, clock: Callable[[], float] = time.time) -> None:
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key is not None else b""
        self._tokens = tokens_of(settings, clock)
        self._section = settings.section
        # Then what looks like a token may be a guess at the key.
        self._alike = bool(_TOKEN.fullmatch(self._key.decode()))

    @property
    def asks(self) -> bool:
        """Whether it asks for anything at all."""
        return bool(self._key) or self._tokens is not None

    def is_token(self, credential: str) -> bool:
        """Whether that can be a token alone, and no guess at the key."""
        return self._tokens is not None and not self._alike and bool(_TOKEN.fullmatch(credential))

    def pass_of(self, credential: str) -> Pass:
        """What a key or a token is good for; of an empty one, what somebody is who brings none.

        Raises:
            NotAdmittedError: nothing, 401.
        """
        if not self.asks or self._is_key(credential):
            return Pass(ALL)
        if self._tokens is not None and _TOKEN.fullmatch(credential):
            from streams.tokens import TokenError  # noqa: PLC0415 (as in tokens_of)

            try:
                return self._tokens.look(credential)
            except TokenError as error:
                challenge = f'Bearer error="invalid_token", error_description="{error}"'
                message = f"this token is not taken: {error} ({self._section}.jwt)"
                raise NotAdmittedError(message, status=401, challenge=challenge, guess=self._alike) from None
        raise NotAdmittedError(self._needed(), status=401, challenge="Bearer", guess=bool(credential and self._key))

    def admit(self, headers: Mapping[str, str], scope: Scope) -> Pass:
        """Let a request with these headers in, if what it carries is good for the scope.

        Raises:
            NotAdmittedError: it is not.
        """
        found = self.pass_of(credential_in(headers))
        require(found, scope)
        return found

    def _is_key(self, credential: str) -> bool:
        return bool(self._key) and hmac.compare_digest(credential.encode(), self._key)

    def _needed(self) -> str:
        name = self._section
        if self._tokens is None:
            return f"an API key is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY` ({name}.api_key)"
        if not self._key:
            return f"a token is needed: `Authorization: Bearer TOKEN` ({name}.jwt)"
        return (
            "an API key or a token is needed: `Authorization: Bearer KEY` or `X-API-Key: KEY` "
            f"({name}.api_key, {name}.jwt)"
        )


def require(found: Pass, scope: Scope) -> None:
    """Refuse whoever may not do that.

    Raises:
        NotAdmittedError: 403, and the message names the scope.
    """
    if not found.allows(scope):
        has = ", ".join(sorted(found.scopes)) or "none"
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        raise NotAdmittedError(f"this needs the scope {scope}; the token has {has}", status=403, challenge=challenge)


def credential_in(headers: Mapping[str, str]) -> str:
    """The key or token that a request with these headers carries, right or wrong; empty where it carries none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return headers.get("x-api-key") or (token.strip() if scheme.lower() == "bearer" else "")


def tokens_of(settings: EndpointSettings, clock: Callable[[], float] = time.time) -> "Tokens | None":
    """The tokens that a door takes; None where it takes none.

    Raises:
        SettingsError: their keys cannot be used.
    """
    if not settings.jwt.enabled:
        return None
    from streams.tokens import Tokens  # noqa: PLC0415 (cryptography takes 0.15 s, and few doors take tokens)

    return Tokens(settings.jwt, f"{settings.section}.jwt", clock)
