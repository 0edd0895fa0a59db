"""Addresses of cameras: what may be shown of them, and what in them is secret."""

import re
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit

# Names of query parameters that cameras take credentials by: Reolink user and password, Foscam usr and pwd, others
# loginuse and loginpas, or a token.
_SECRET_NAME = re.compile(r"us(e)?r|login|pass|pwd|psw|token|key|auth|secret|sess|sig", re.IGNORECASE)

# What a secret is replaced by.
_HIDDEN = "***"


class AddressError(ValueError):
    """This is no address of a picture; the message never repeats it, because parts of it may be secret."""


class Address(NamedTuple):
    """Where a camera's picture is, taken apart."""

    url: str
    """What is asked for: without user and password, with the query."""
    user: str
    password: str
    shown: str
    """What may be shown and logged: without user, password and query."""
    name: str
    """Host, port and path, as records carry it."""
    secrets: tuple[str, ...]
    """What must never be shown, longest first."""

    @property
    def host(self) -> str:
        """The host alone, lower case."""
        return urlsplit(self.url).hostname or ""

    def scrub(self, text: str) -> str:
        """The text without this address' secrets: a library's or a camera's words may repeat them."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return text

    def scrub_bytes(self, data: bytes) -> bytes:
        """The same for what a camera sent. Very short secrets are left: they are in any data by chance."""
        for secret in self.secrets:
            if len(secret) >= 4:
                data = data.replace(secret.encode(), _HIDDEN.encode())
        return data


def parse(text: str, user: str = "", password: str = "") -> Address:
    """Take an address apart.

    Args:
        text: http or https, with or without user and password.
        user: replaces the user in the address.
        password: replaces the password in the address.

    Raises:
        AddressError: it is none.
    """
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _no_address() from None
    netloc = parts.netloc.rpartition("@")[2]
    # A user or password with / ? or # in it ends the host early, and the rest would be taken for the path.
    spilled = re.search(":.*@", netloc + parts.path + parts.query + parts.fragment)
    if parts.scheme.lower() not in {"http", "https"} or not host or spilled or not text.isprintable():
        raise _no_address()
    user = user or unquote(parts.username or "")
    password = password or unquote(parts.password or "")
    shown_host = f"[{host}]" if ":" in host else host
    where = f"{shown_host}:{port}" if port is not None else shown_host
    path = parts.path or "/"
    query = f"?{parts.query}" if parts.query else ""
    scheme = parts.scheme.lower()
    hidden = {password, quote(password, safe=""), parts.password or "", parts.query}
    for name, value in parse_qsl(parts.query, keep_blank_values=False):
        if _SECRET_NAME.search(name):
            hidden |= {value, quote(value, safe="")}
    return Address(
        url=f"{scheme}://{where}{path}{query}",
        user=user,
        password=password,
        shown=f"{scheme}://{where}{path}{'?...' if query else ''}",
        name=f"{where}{path}",
        secrets=tuple(sorted(hidden - {""}, key=len, reverse=True)),
    )


def _no_address() -> AddressError:
    return AddressError(
        "this is no http:// or https:// address with a host (it is not repeated here, since it may hold a password). "
        "In user and password write / ? # @ : % as %2F %3F %23 %40 %3A %25, or give them apart from the address; "
        "write an @ in path or query as %40"
    )
