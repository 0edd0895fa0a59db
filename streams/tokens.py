"""Tokens of an identity provider: is this one good here, what does it allow, and until when.

Signatures are checked by joserfc, against keys that a person named: nothing that a token says (`jku`, `x5u`, `jwk`) is
fetched or believed. Why a token is refused is told only of one whose signature is right.
"""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from joserfc import jwk, jwt
from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError, MissingClaimError

from streams.grants import JwtSettings, Pass, Scope
from streams.serving import SettingsError

log = structlog.get_logger(__name__)

# Providers' tokens have one or two KB.
_LONGEST = 8 * 1024

_RSA_BITS = 2048

# A time beyond all that are meant, seconds: JSON has integers that no float holds.
_LAST = 2**53


class TokenError(Exception):
    """The token opens nothing here; the message says why, and holds nothing of it."""


class Tokens:
    """The tokens that one door takes.

    Args:
        settings: the door's section `jwt`.
        section: the section's dotted name, for errors.
        clock: wall time, seconds since the Unix epoch.

    Raises:
        SettingsError: the keys cannot be used.
    """

    def __init__(self, settings: JwtSettings, section: str, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._section = section
        self._clock = clock
        self._keys: Any = None
        self._seen: tuple[int, ...] = ()
        if settings.secret is not None:
            self._keys = jwk.OctKey.import_key(settings.secret.get_secret_value())
        elif settings.keys_file is not None:
            self._seen = _stamp(settings.keys_file)
            self._keys = self._read(settings.keys_file)

    def look(self, token: str) -> Pass:
        """What the token allows, and until when.

        Raises:
            TokenError: nothing.
        """
        if len(token) > _LONGEST:
            raise TokenError(f"it has more than {_LONGEST:,} characters")
        self._refresh()
        try:
            claims = jwt.decode(token, self._keys, algorithms=self._settings.taken).claims
        except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise TokenError("it is not signed by a key that is known here, or not in a way that is taken") from None
        self._check(claims)
        return Pass(self._scopes(claims), float(min(claims["exp"], _LAST)) + self._settings.leeway_s)

    def _check(self, claims: dict[str, Any]) -> None:
        settings = self._settings
        registry = jwt.JWTClaimsRegistry(
            now=int(self._clock()),
            leeway=settings.leeway_s,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "value": settings.audience},
            exp={"essential": True},
        )
        try:
            registry.validate(claims)
        except ExpiredTokenError:
            raise TokenError("it has expired") from None
        except MissingClaimError as error:
            raise TokenError(f"it has no {', '.join(sorted(str(error.claim).split(',')))}") from None
        except InvalidClaimError as error:
            why = {
                "iss": f"its iss is not {self._section}.issuer",
                "aud": f"its aud is not {self._section}.audience",
                "nbf": "it is not valid yet (nbf)",
                "iat": "it is made in the future (iat): look at the clocks",
            }
            raise TokenError(why.get(str(error.claim), f"its {error.claim} is none")) from None
        except (JoseError, ValueError, TypeError, OverflowError):
            raise TokenError("its claims cannot be read") from None

    def _scopes(self, claims: dict[str, Any]) -> frozenset[Scope]:
        said = claims.get(self._settings.scope_claim)
        names = said.split() if isinstance(said, str) else said if isinstance(said, list) else []
        ours = {name: name for name in get_args(Scope)} | dict(self._settings.scopes)
        return frozenset(ours[name] for name in names if isinstance(name, str) and name in ours)

    def _refresh(self) -> None:
        """Read the keys again where their file changed; one that cannot be used changes nothing."""
        path = self._settings.keys_file
        if path is None or (now := _stamp(path)) == self._seen:
            return
        self._seen = now
        try:
            self._keys = self._read(path)
        except SettingsError as error:
            log.error("keys of tokens not read again: the old ones stay", why=str(error))  # noqa: TRY400
        else:
            log.info("keys of tokens read again", file=str(path))

    def _read(self, path: Path) -> Any:
        name = f"{self._section}.keys_file"
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():  # of short keys, which are refused here
                warnings.simplefilter("ignore")
                return _key_set(data) if data.lstrip().startswith(b"{") else _pem(data)
        except OSError as error:
            raise SettingsError(f"{name} {path}: {error.strerror or error}") from error
        except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
            why = str(error) if isinstance(error, _UnusableError) else "no JWKS and no public key in PEM"
            raise SettingsError(f"{name} {path}: {why}; give the issuer's JWKS, or its public key in PEM") from error


class _UnusableError(ValueError):
    """A key that must not be used; the message says why."""


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, or another takes its place; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _key_set(data: bytes) -> jwk.KeySet:
    """The keys of a JWKS that verify signatures; a token names its own by `kid`."""
    told = json.loads(data)
    if any(key.get("kty") == "oct" for key in told["keys"]):
        raise _UnusableError("it holds a secret (kty oct), which belongs in `secret`")
    usable = [key for key in told["keys"] if key.get("use", "sig") == "sig"]
    keys = jwk.KeySet.import_key_set({"keys": usable})
    for key in keys:
        _check(key)
    return keys


def _pem(data: bytes) -> Any:
    """The public key of a PEM file, or of a certificate in it: the one key, whatever `kid` a token names."""
    if b"PRIVATE KEY" in data:
        raise _UnusableError("it holds a private key, which is the issuer's alone (`openssl pkey -pubout` gives both)")
    public: Any
    if b"BEGIN CERTIFICATE" in data:
        public = x509.load_pem_x509_certificate(data).public_key()
    else:
        public = serialization.load_pem_public_key(data)
    match public:
        case rsa.RSAPublicKey():
            kind = "RSA"
        case ec.EllipticCurvePublicKey():
            kind = "EC"
        case ed25519.Ed25519PublicKey():
            kind = "OKP"
        case _:
            raise _UnusableError("it is no RSA, EC or Ed25519 key")
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    key = jwk.JWKRegistry.import_key(public.public_bytes(*form), kind)
    _check(key)
    return key


def _check(key: Any) -> None:
    if key.is_private:
        raise _UnusableError("it holds a private key, which is the issuer's alone")
    if key.key_type == "RSA" and key.raw_value.key_size < _RSA_BITS:
        raise _UnusableError(f"its RSA key has {key.raw_value.key_size} bits, and can be broken: use {_RSA_BITS}")
