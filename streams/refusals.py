"""Why a broker that is there does not take us, or we do not take it: from the error to what people can change."""

import ssl
from collections.abc import Iterator
from typing import NamedTuple

from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaConnectionError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedSaslMechanismError,
)

_NOT_GRANTED = (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)

# X509_V_ERR_*: https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/
_NOT_YET_VALID, _HAS_EXPIRED = 9, 10
_OTHER_NAME = (62, 64)


class Refusal(NamedTuple):
    """What is wrong between a broker and us."""

    what: str
    """What the broker does, in a few words; no comma, which would end what a stage says that it waits on."""
    fix: str
    """Which setting to change, or what else to do."""


class CredentialsError(KafkaConnectionError):  # type: ignore[misc]
    """A file that the connection needs cannot be used. It is tried again: another process may be about to write it."""

    def __init__(self, setting: str, error: Exception, path: object) -> None:
        super().__init__(f"{setting}: {path}: {getattr(error, 'strerror', None) or error}")
        self.refusal = Refusal(
            f"waits for {setting}",
            f"{path} cannot be used ({getattr(error, 'strerror', None) or error}): correct {setting}; "
            "an embedded broker makes its own at its first start (`rewatch up`)",
        )


def refusal_in(error: BaseException) -> Refusal | None:
    """What is to be changed for this error of a connection, or of a request, to go away; None: nothing is refused."""
    for cause in causes(error):
        if isinstance(cause, CredentialsError):
            return cause.refusal
        found = _of_password(cause) or _of_their_certificate(cause) or _of_tls(cause)
        if found is not None:
            return found
    return next((_HANGS_UP for cause in causes(error) if _is_cut(cause)), None)


_HANGS_UP = Refusal(
    "hangs up at once",
    "it is about to stop; or set kafka.security_protocol, kafka.ssl_* and kafka.sasl_* to what this port asks for",
)


def _of_password(error: BaseException) -> Refusal | None:
    if isinstance(error, SaslAuthenticationFailed):
        return Refusal(
            "refuses the password",
            "correct kafka.sasl_username and kafka.sasl_password (REWATCH_KAFKA__SASL_PASSWORD), "
            "or make that user on the broker",
        )
    if isinstance(error, UnsupportedSaslMechanismError):
        return Refusal("does not take this SASL mechanism", "set kafka.sasl_mechanism to one that the broker has")
    if isinstance(error, IllegalSaslStateError):
        return Refusal(
            "asks for no password here",
            "set kafka.security_protocol to PLAINTEXT or SSL, or kafka.bootstrap_servers to its port with SASL",
        )
    if isinstance(error, ValueError) and "signature" in str(error):  # what aiokafka's SCRAM says of the server
        return Refusal("cannot prove that it knows our password", "look who answers at kafka.bootstrap_servers")
    if isinstance(error, _NOT_GRANTED):
        return Refusal(
            "does not let this user do that", f"grant it to kafka.sasl_username on the broker ({type(error).__name__})"
        )
    return None


def _of_their_certificate(error: BaseException) -> Refusal | None:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return None
    if error.verify_code in {_HAS_EXPIRED, _NOT_YET_VALID}:
        state = "has expired" if error.verify_code == _HAS_EXPIRED else "is not valid yet"
        return Refusal(
            f"shows a certificate that {state}",
            "give the broker a new one (`rewatch tls renew` where `tls make` made it), or set this machine's clock",
        )
    if error.verify_code in _OTHER_NAME:
        return Refusal(
            "shows a certificate for another name",
            f"ask for it in kafka.bootstrap_servers by a name that is in it ({error.verify_message}), "
            "or give it a certificate with this one (`rewatch tls make --host NAME`)",
        )
    return Refusal(
        "shows a certificate of nobody we trust",
        f"set kafka.ssl_cafile to the authority that signed it ({error.verify_message})",
    )


def _of_tls(error: BaseException) -> Refusal | None:
    if not isinstance(error, ssl.SSLError) or _is_cut(error):
        return None
    said = f"{error.reason or error}"
    if "CERTIFICATE_REQUIRED" in said:
        return Refusal("wants a certificate of ours", "set kafka.ssl_certfile and kafka.ssl_keyfile")
    if "ALERT" in said and ("CERTIFICATE" in said or "UNKNOWN_CA" in said):
        return Refusal("refuses our certificate", f"set kafka.ssl_certfile to one that it trusts ({said.lower()})")
    if "ALERT" in said:
        return Refusal("takes none of our TLS", f"look at the broker's TLS settings ({said.lower()})")
    return Refusal("speaks no TLS here", "set kafka.security_protocol, or kafka.bootstrap_servers to its port with TLS")


def _is_cut(error: BaseException) -> bool:
    """Whether the other side ended the connection, which it had taken."""
    return isinstance(
        error,
        ConnectionResetError | BrokenPipeError | EOFError | ssl.SSLEOFError | ssl.SSLZeroReturnError,
    )  # a read that ends too early is an EOFError


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from, outwards in."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        yield at
        at = at.__cause__ or at.__context__
