"""Signs an export's manifest with a private key of whoever exports: Ed25519, whose signatures are the same each time.

`openssl genpkey -algorithm ed25519 -out key.pem` makes a key, `openssl pkey -in key.pem -pubout -out public.pem` what
others check with. Checking needs neither this module nor a package: `verify.py` does it.
"""

from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key


class KeyFileError(Exception):
    """The file holds no key that can sign; the message says how one is made."""


class Signed(NamedTuple):
    """A signature, and the key that it can be checked with."""

    public: bytes
    """32 bytes."""
    signature: bytes
    """64 bytes."""


def load(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file without a password.

    Raises:
        KeyFileError: there is none in it.
    """
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise KeyFileError(f"--sign-key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # Never the library's own words: they may repeat what the file holds.
        encrypted = "has a password" if isinstance(error, TypeError) else "holds no private key in PEM"
        raise KeyFileError(f"--sign-key {path}: it {encrypted}; {_FIX}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"--sign-key {path}: it is no Ed25519 key; {_FIX}")
    return key


_FIX = "`openssl genpkey -algorithm ed25519 -out key.pem` makes one that fits"


def sign(key: Ed25519PrivateKey, message: bytes) -> Signed:
    """The signature of a message."""
    return Signed(key.public_key().public_bytes_raw(), key.sign(message))
