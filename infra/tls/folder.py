"""The folder of an installation's certificates: an authority, a pair for each server, one for clients.

`NAME.pem` is a certificate, for all to read; `NAME.key` is its key, for its owner alone.
"""

import os
import socket
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from infra.private import make_private
from infra.tls import certificates
from infra.tls.certificates import Certificate, Pair

AUTHORITY = "ca"
SERVERS = ("broker", "gateway", "upload", "detector")
CLIENT = "client"

WARN_DAYS = 30
"""From so many days before a certificate's end people are told."""


class FolderError(Exception):
    """The folder is not as it would have to be; the message says what to do."""


class Kept(NamedTuple):
    """A certificate in the folder."""

    path: Path
    certificate: Certificate | None
    """None where the file holds none."""
    key: Path
    """There or not."""

    @property
    def key_is_private(self) -> bool:
        """Whether nobody but its owner can read the key, or there is none."""
        return not self.key.exists() or not self.key.stat().st_mode & 0o077


def make(folder: Path, hosts: Sequence[str], now: datetime) -> list[Path]:
    """Make a certificate for each server and one for clients, and the authority where there is none.

    Args:
        folder: where they go; made where it is missing.
        hosts: names and addresses that the servers are asked for by, besides this machine's own.
        now: the time.

    Returns the certificates' paths.

    Raises:
        FolderError: some are there already; none was touched.
        ValueError: a host is neither a name nor an address.
    """
    there = [name for name in (*SERVERS, CLIENT) if _certificate(folder, name).exists() or _key(folder, name).exists()]
    if there:
        raise FolderError(
            f"{folder} has {', '.join(f'{name}.pem' for name in there)} already: nothing was overwritten. "
            "`rewatch tls renew` makes them anew for the same hosts; --dir names another folder"
        )
    names = tuple(dict.fromkeys((*hosts, *here())))
    for name in names:  # before anything is written
        certificates.host_in_certificate(name)
    authority = authority_in(folder, now)
    pairs = {name: certificates.issue(authority, f"rewatch {name}", names, now) for name in SERVERS}
    pairs[CLIENT] = certificates.issue(authority, f"rewatch {CLIENT}", (), now)
    for name, pair in pairs.items():
        put(folder, name, pair)
    return [_certificate(folder, name) for name in (AUTHORITY, *pairs)]


def renew(folder: Path, now: datetime) -> list[Path]:
    """Make each certificate that the folder's authority signed anew, with a new key, for the same hosts.

    Returns the certificates' paths.

    Raises:
        FolderError: there is no authority, or nothing that it signed.
    """
    authority = _pair_in(folder, AUTHORITY)
    if authority is None or not certificates.matches(authority):
        raise FolderError(f"{folder} has no {AUTHORITY}.pem with its {AUTHORITY}.key: `rewatch tls make` makes one")
    renewed = []
    for name in (*SERVERS, CLIENT):
        pair = _pair_in(folder, name)
        if pair is not None and certificates.signed_by(pair.certificate, authority.certificate):
            hosts = certificates.read(pair.certificate).hosts
            put(folder, name, certificates.issue(authority, f"rewatch {name}", hosts, now))
            renewed.append(_certificate(folder, name))
    if not renewed:
        raise FolderError(f"{folder} has nothing that its authority signed: `rewatch tls make` makes what is missing")
    return renewed


def show(folder: Path) -> list[Kept]:
    """Every certificate in the folder, the authority first; empty where there is no folder."""
    paths = sorted(folder.glob("*.pem"), key=lambda path: (path.stem != AUTHORITY, path.stem))
    return [Kept(path, read(path), path.with_suffix(".key")) for path in paths]


def read(path: Path) -> Certificate | None:
    """What stands in a certificate's file; None where it cannot be read, or holds none."""
    try:
        return certificates.read(path.read_bytes())
    except (OSError, ValueError):
        return None


def here() -> tuple[str, ...]:
    """What this machine is called by itself."""
    return tuple(dict.fromkeys(("localhost", "127.0.0.1", "::1", socket.gethostname())))


def authority_in(folder: Path, now: datetime) -> Pair:
    """The folder's authority, made where there is none.

    Raises:
        FolderError: its certificate is there without its key: it is another folder's.
    """
    found = _pair_in(folder, AUTHORITY)
    if found is not None and certificates.matches(found):
        return found
    if _certificate(folder, AUTHORITY).exists():
        raise FolderError(
            f"{_certificate(folder, AUTHORITY)} is there without its {AUTHORITY}.key, so nothing can be signed: "
            "put the key back; or move the certificate away for a new authority, which clients have to be given"
        )
    # Clients that trust two installations' authorities find the right one by its name.
    made = certificates.authority(f"rewatch CA {os.urandom(4).hex()}", now)
    put(folder, AUTHORITY, made)
    return made


def put(folder: Path, name: str, pair: Pair) -> None:
    """Write a certificate and its key, whole or not at all each; the key is its owner's alone from its first byte."""
    make_private(folder.parent)
    make_private(folder)
    write_private(_key(folder, name), pair.key)
    _write(_certificate(folder, name), pair.certificate, 0o644)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody but its owner can read, whole or not at all."""
    _write(path, content, 0o600)


def _write(path: Path, content: bytes, mode: int) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _pair_in(folder: Path, name: str) -> Pair | None:
    try:
        return Pair(_certificate(folder, name).read_bytes(), _key(folder, name).read_bytes())
    except FileNotFoundError:
        return None


def _certificate(folder: Path, name: str) -> Path:
    return folder / f"{name}.pem"


def _key(folder: Path, name: str) -> Path:
    return folder / f"{name}.key"
