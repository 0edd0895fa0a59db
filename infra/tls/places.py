"""Where the embedded broker's certificate and password lie, and what its clients are told of them.

Apart from what makes them: every process reads the settings, and none but the broker's needs the cryptography.
"""

from pathlib import Path
from typing import Any, NamedTuple

USER = "rewatch"


class Files(NamedTuple):
    """Where the parts lie."""

    authority: Path
    certificate: Path
    key: Path
    password: Path


def files(data_dir: Path) -> Files:
    """Where the parts of an installation lie, there or not."""
    at = data_dir / "tls"
    return Files(at / "ca.pem", at / "embedded-broker.pem", at / "embedded-broker.key", at / "kafka.password")


def client_settings(data_dir: Path) -> dict[str, Any]:
    """The `kafka:` settings of every client of this installation."""
    parts = files(data_dir)
    return {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_username": USER,
        "sasl_password_file": parts.password,
        "ssl_cafile": parts.authority,
    }
