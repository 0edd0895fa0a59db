"""What must not be shown: the secrets of the settings, and passwords inside addresses."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Secret, SecretStr

MASK = "(set, not shown)"

# What stands between the scheme and the host of an address: user and password, to the last @ before the path, since
# a password that was written as it is may hold one.
_CREDENTIALS = re.compile(r"(\w://)[^/?#\s]+@")

# A shorter secret would be found in ordinary words.
_SHORTEST = 4


def credentials(text: str) -> str:
    """The text without users and passwords of addresses."""
    return _CREDENTIALS.sub(rf"\g<1>{MASK}@", text)


class Masks:
    """Takes known secrets, and credentials of addresses, out of text."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Secrets of fewer than 4 characters are not looked for: they would be found in ordinary words."""
        # The longest first: one can be the beginning of another.
        self._secrets = sorted({secret for secret in secrets if len(secret) >= _SHORTEST}, key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text without them."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, MASK)
        return credentials(text) if "://" in text else text

    def value(self, value: Any) -> Any:
        """The value as it is; as text without them, where its text has some."""
        if value is None or isinstance(value, bool | int | float):
            return value
        said = str(value)
        masked = self.text(said)
        return value if masked == said else masked


def secrets_of(settings: BaseModel) -> Iterator[str]:
    """Every secret that is set, in sections and maps too."""
    for name in type(settings).model_fields:
        yield from _secrets_in(getattr(settings, name))


def _secrets_in(value: Any) -> Iterator[str]:
    if isinstance(value, Secret | SecretStr):
        secret = str(value.get_secret_value())
        if secret != str(value):  # an address without a password is shown as it is
            yield secret
    elif isinstance(value, BaseModel):
        yield from secrets_of(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets_in(item)
