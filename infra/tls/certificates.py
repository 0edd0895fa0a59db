"""Making and reading X.509 certificates: an authority of one's own, and what it signs. No files, no clock.

Keys are EC P-256 (PKCS #8): every client of the last ten years takes them, and one is made in a millisecond.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# A new authority means a new file on every client; servers' certificates are made anew where they lie.
AUTHORITY_DAYS = 3650

# Apple's clients refuse a server certificate that is good for longer: https://support.apple.com/en-us/103769
SERVER_DAYS = 825

# Clocks differ: one that is an hour behind shall not find a certificate from the future.
_SKEW = timedelta(hours=1)


class Pair(NamedTuple):
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes


class Certificate(NamedTuple):
    """What stands in a certificate."""

    name: str
    """Its common name."""
    issuer: str
    hosts: tuple[str, ...]
    """The names and addresses that it is for; none in an authority's or a client's."""
    begins: datetime
    ends: datetime

    def days_left(self, now: datetime) -> int:
        """Whole days until it ends; negative behind it."""
        return (self.ends - now) // timedelta(days=1)


def authority(name: str, now: datetime) -> Pair:
    """A new authority: it signs, and signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(name, name, key, now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return _pair(builder, key, signer=key)


def issue(signer: Pair, name: str, hosts: Sequence[str], now: datetime) -> Pair:
    """A new certificate, signed by an authority.

    Args:
        signer: the authority.
        name: the common name.
        hosts: host names and IP addresses that a server is asked for by; none makes a certificate for a client.
        now: the time.

    Raises:
        ValueError: a host is neither a name nor an address, or the signer is no authority.
    """
    parent = x509.load_pem_x509_certificate(signer.certificate)
    parent_key = serialization.load_pem_private_key(signer.key, None)
    if not isinstance(parent_key, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is none of ours (EC)")  # noqa: TRY004 (what a file holds)
    key = ec.generate_private_key(ec.SECP256R1())
    use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(name, _name_of(parent.subject), key, now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(_issued_by(parent), critical=False)
    )
    if hosts:
        builder = builder.add_extension(_alternatives(hosts), critical=False)
    return _pair(builder, key, signer=parent_key)


def lone(name: str, hosts: Sequence[str], now: datetime) -> Pair:
    """A new certificate that signs itself alone, for a program's talk with itself: both sides know it beforehand."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(name, name, key, now, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(_alternatives(hosts), critical=False)
    )
    return _pair(builder, key, signer=key)


def read(pem: bytes) -> Certificate:
    """What stands in the first certificate of a PEM file.

    Raises:
        ValueError: there is none.
    """
    found = x509.load_pem_x509_certificate(pem)
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    except x509.ExtensionNotFound:
        hosts = []
    return Certificate(
        _name_of(found.subject),
        _name_of(found.issuer),
        tuple(hosts),
        found.not_valid_before_utc,
        found.not_valid_after_utc,
    )


def signed_by(pem: bytes, authority_pem: bytes) -> bool:
    """Whether the authority signed the certificate."""
    child, parent = x509.load_pem_x509_certificate(pem), x509.load_pem_x509_certificate(authority_pem)
    try:
        child.verify_directly_issued_by(parent)
    except Exception:  # noqa: BLE001 (a wrong name, key type or signature: three classes, one answer)
        return False
    return True


def matches(pair: Pair) -> bool:
    """Whether the key is the certificate's."""
    der = serialization.Encoding.DER
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        key = serialization.load_pem_private_key(pair.key, None).public_key()
        of_certificate = x509.load_pem_x509_certificate(pair.certificate).public_key()
    except (ValueError, TypeError):  # torn, or a key under a password
        return False
    return of_certificate.public_bytes(der, spki) == key.public_bytes(der, spki)


def _builder(
    name: str, issuer: str, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _pair(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, *, signer: ec.EllipticCurvePrivateKey
) -> Pair:
    pem = serialization.Encoding.PEM
    return Pair(
        builder.sign(signer, hashes.SHA256()).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issued_by(parent: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = parent.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _alternatives(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([host_in_certificate(host) for host in hosts])


def host_in_certificate(host: str) -> x509.GeneralName:
    """A host as a certificate names it.

    Raises:
        ValueError: it is neither a name nor an address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not host or not host.isascii() or any(not (c.isalnum() or c in "-_.*") for c in host):
            raise ValueError(f"{host!r} is neither a host name nor an IP address") from None
        return x509.DNSName(host)


def _name_of(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()
