"""Stands in for ClickHouse's server in a container: the embedded engine on the network.

It asks for user and password as the server does, by the file of users that make-secrets.sh makes; it knows no grants.
Where secure.yaml gives it a certificate it listens with TLS alone.
"""

import base64
import hashlib
import hmac
import signal
from pathlib import Path
from xml.etree import ElementTree as ET

import uvicorn
from starlette.datastructures import Headers, QueryParams
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.local.clickhouse import Server
from streams.serving import bind

DATA = Path("/var/lib/clickhouse")
USERS = Path("/etc/clickhouse-server/users.d/rewatch.xml")
CERTIFICATE = Path("/run/secrets/tls_clickhouse")


class Door:
    """Lets in who shows a user's password, in any of the three ways that ClickHouse takes it."""

    def __init__(self, inside: ASGIApp) -> None:
        users = ET.parse(USERS).find("users")
        assert users is not None
        self._inside = inside
        self._digests = {user.tag: user.findtext("password_sha256_hex", "") for user in users}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["path"] == "/ping" or self._known(scope):
            await self._inside(scope, receive, send)
            return
        refused = PlainTextResponse(
            "Code: 516. DB::Exception: Authentication failed: password is incorrect, or there is no user with such "
            "name. (AUTHENTICATION_FAILED)",
            403,
            {"X-ClickHouse-Exception-Code": "516"},
        )
        await refused(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        headers, query = Headers(scope=scope), QueryParams(scope["query_string"])
        user = headers.get("x-clickhouse-user") or query.get("user") or "default"
        password = headers.get("x-clickhouse-key") or query.get("password") or ""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            user, _, password = base64.b64decode(given).decode().partition(":")
        digest = self._digests.get(user) or "none has this digest"
        return hmac.compare_digest(hashlib.sha256(password.encode()).hexdigest(), digest)


def main() -> None:
    """Serve until SIGTERM."""
    tls = CERTIFICATE.exists()
    config = uvicorn.Config(
        Door(Server(DATA).app),
        log_level="warning",
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=1024 * 1024,
        ssl_certfile=CERTIFICATE if tls else None,
        ssl_keyfile=CERTIFICATE.with_name("tls_clickhouse_key") if tls else None,
    )
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[bind("0.0.0.0", 8443 if tls else 8123)])


if __name__ == "__main__":
    main()
