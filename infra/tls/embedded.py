"""The embedded broker's certificate and password: made once, below the data directory, before the broker starts.

Clients of this machine are told where they lie (`infra.tls.places`), and read them when they connect.
"""

import secrets
from datetime import datetime
from pathlib import Path

from infra.private import make_private
from infra.tls import certificates, folder
from infra.tls.certificates import Pair
from infra.tls.places import Files, files

HOSTS = ("127.0.0.1", "localhost")
"""It listens on this machine alone."""


def prepare(data_dir: Path, now: datetime) -> Files:
    """Make what is missing; a certificate that ends within a month is made anew.

    Raises:
        FolderError: the authority is there without its key.
    """
    parts = files(data_dir)
    if not parts.password.exists():
        make_private(data_dir)
        make_private(parts.password.parent)
        folder.write_private(parts.password, secrets.token_urlsafe(32).encode())
    authority = folder.authority_in(parts.authority.parent, now)
    if not _is_good(parts, authority.certificate, now):
        pair = certificates.issue(authority, "rewatch embedded broker", HOSTS, now)
        folder.put(parts.certificate.parent, parts.certificate.stem, pair)
    return parts


def _is_good(parts: Files, authority: bytes, now: datetime) -> bool:
    """Whether the broker can be started with what is there: a kill can have come between the key and the rest."""
    try:
        pair = Pair(parts.certificate.read_bytes(), parts.key.read_bytes())
        lasts = certificates.read(pair.certificate).days_left(now) >= folder.WARN_DAYS
    except (FileNotFoundError, ValueError):
        return False
    return lasts and certificates.matches(pair) and certificates.signed_by(pair.certificate, authority)
