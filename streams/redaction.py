"""What stands in for a secret where text is shown, and addresses without their passwords."""

import re
from collections.abc import Iterator
from urllib.parse import unquote

MASK = "(set, not shown)"

# What stands between the scheme and the host of an address: user and password, to the last @ before the path, since
# a password that was written as it is may hold one.
_CREDENTIALS = re.compile(r"(\w://)([^/?#\s]+)@")


def passwords(text: str) -> Iterator[str]:
    """The passwords in the addresses of a text, as they are written and as they are meant."""
    for found in _CREDENTIALS.finditer(text):
        written = found[2].partition(":")[2]
        yield from {written, unquote(written)} - {""}


def credentials(text: str) -> str:
    """The text without users and passwords of addresses."""
    return _CREDENTIALS.sub(rf"\g<1>{MASK}@", text)
