"""What must not be shown: the secrets of the settings, and passwords inside addresses."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Secret, SecretStr

from streams.redaction import MASK, credentials, passwords

__all__ = ["MASK", "Masks", "credentials", "secrets_of"]

# A shorter secret would be found in ordinary words.
_SHORTEST = 4


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
    """Every secret that is set, in sections and maps too, and every password in an address."""
    for name in type(settings).model_fields:
        yield from _secrets_in(getattr(settings, name))


def _secrets_in(value: Any) -> Iterator[str]:
    if isinstance(value, Secret | SecretStr):
        secret = str(value.get_secret_value())
        if secret != str(value):  # an address without a password is shown as it is
            yield secret
        yield from passwords(secret)
    elif isinstance(value, str):
        yield from passwords(value)
    elif isinstance(value, BaseModel):
        yield from secrets_of(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets_in(item)
