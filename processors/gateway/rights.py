"""Which scope a request needs: looking needs `read`; whatever changes something and is not named here needs `admin`."""

import re

from streams.grants import Scope

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

# Probes know no key and no name; it says nothing but that the process serves.
OPEN = ("/health",)
# What the login page itself is made of, and what it posts to.
SIGN_IN = ("/login", "/logout", "/static/")

_CHANGING: tuple[tuple[re.Pattern[str], Scope], ...] = (
    (re.compile(r"/api/labels|/events/[^/]+/labels|/cameras/[^/]+/missed"), "label"),
    (re.compile(r"/api/upload"), "upload"),
)


def is_safe(method: str) -> bool:
    """Whether the method changes nothing."""
    return method in _SAFE


def needed(method: str, path: str) -> Scope | None:
    """The scope; None for what nobody needs one for."""
    if path in OPEN or path.startswith(SIGN_IN):
        return None
    if is_safe(method):
        return "read"
    return next((scope for pattern, scope in _CHANGING if pattern.fullmatch(path)), "admin")
