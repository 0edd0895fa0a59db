"""The embedded engine as a server with users: `python -m tests.clickhouse_users --path DIR --port N --users FILE`.

chDB enforces grants and profiles, but a connection to it is always the user `default`. So each user of the file (the
very one that `make-secrets.sh` makes for ClickHouse's own server) becomes a role with the user's grants, and every
request is run in the role, under the profile, of the user whose password came with it: what is allowed is decided by
ClickHouse's own code. Only the password is compared here, and the answer to a wrong one is what the server sends.
Not enforced by this engine: grants of single tables of `system`, and which engines a table may have.
"""

import argparse
import base64
import hashlib
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qsl, urlencode
from xml.etree import ElementTree as ET

import uvicorn
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.local import clickhouse
from processors.store.settings import ClickHouseSettings
from streams.serving import bind

_USER = "rewatch_test_user"
"""Brings a request's user to the engine, among its settings."""

# The engine ends queries of people who went away, for which it needs rights of its own.
_ENGINE = "<engine><grants><query>GRANT ALL ON *.*</query></grants></engine>"


MAKE = Path(__file__).resolve().parents[1] / "infra" / "compose" / "make-secrets.sh"


class Guarded:
    """The server's address, and the folder of its users' passwords."""

    def __init__(self, url: str, secrets: Path) -> None:
        self.url = url
        self.secrets = secrets

    def password(self, role: str) -> str:
        return (self.secrets / f"clickhouse_{role}_password").read_text()

    def settings(self, role: str) -> ClickHouseSettings:
        """The section of a process that is this user."""
        return ClickHouseSettings(
            url=self.url, user=f"rewatch_{role}", password=SecretStr(self.password(role)), database="rewatch"
        )

    def environment(self, role: str) -> dict[str, str]:
        """The same, as the containers have it."""
        return {
            "REWATCH_CLICKHOUSE__URL": self.url,
            "REWATCH_CLICKHOUSE__USER": f"rewatch_{role}",
            "REWATCH_CLICKHOUSE__PASSWORD_FILE": str(self.secrets / f"clickhouse_{role}_password"),
        }

    def change_password(self, role: str, to: str) -> None:
        """As an operator does: the file's new content, and the digest that the server knows."""
        (self.secrets / f"clickhouse_{role}_password").unlink()
        (self.secrets / f"clickhouse_{role}_password").write_text(to)
        make(self.secrets)


def make(folder: Path) -> None:
    """Passwords that are missing, and the file of users."""
    subprocess.run(["sh", str(MAKE), str(folder)], check=True, capture_output=True)


class Users:
    """The file of users, read again at each request, as the server reads it when it changes."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def admits(self, user: str, password: str) -> bool:
        digest = self._read().findtext(f"./users/{user}/password_sha256_hex")
        return digest == hashlib.sha256(password.encode()).hexdigest()

    def profile(self, user: str) -> tuple[str, dict[str, str]]:
        """The name of the user's profile, and its values: here `SET profile` brings only the bounds into force."""
        tree = self._read()
        name = tree.findtext(f"./users/{user}/profile", "default")
        return name, {one.tag: one.text or "" for one in tree.findall(f"./profiles/{name}/*") if not len(one)}

    def config(self) -> str:
        """The file as one that the engine can be started with."""
        tree = self._read()
        users = [user for user in tree.findall("./users/*") if user.get("remove") is None]
        profiles = "".join(ET.tostring(one, "unicode") for one in tree.findall("./profiles/*"))
        roles = "".join(f"<{u.tag}>{ET.tostring(u.find('grants'), 'unicode')}</{u.tag}>" for u in users)
        granted = "".join(f"<query>GRANT {name}</query>" for name in ["engine", *(user.tag for user in users)])
        return (
            f"<clickhouse><profiles><default/>{profiles}</profiles><quotas><default/></quotas>"
            f"<roles>{_ENGINE}{roles}</roles>"
            "<users><default><no_password/><networks><ip>::/0</ip></networks><profile>default</profile>"
            f"<quota>default</quota><grants>{granted}</grants></default></users></clickhouse>"
        )

    def _read(self) -> ET.Element:
        return ET.parse(self._file).getroot()


class Engine(clickhouse.Engine):
    """The engine, each query in the role of its user."""

    def __init__(self, path: Path, users: Users) -> None:
        self._users = users
        made = path.parent / f"{path.name}-users.xml"
        made.write_text(users.config())
        config = clickhouse.ENGINE_CONFIG.replace("</clickhouse>", f"<users_config>{made}</users_config></clickhouse>")
        with patch.object(clickhouse, "ENGINE_CONFIG", config):
            super().__init__(path)

    def _connect(self, query: clickhouse.Query) -> Any:
        asked = dict(query.settings)
        user = asked.pop(_USER)
        connection = super()._connect(replace(query, settings={}))
        try:
            profile, values = self._users.profile(user)
            connection.query(f"SET ROLE {user}", "Null")
            connection.query(f"SET profile = '{profile}'", "Null")
            for name, value in [*values.items(), *asked.items()]:
                connection.query(f"SET {name} = {clickhouse._literal(value)}", "Null")
        except Exception as error:
            connection.close()
            raise clickhouse.QueryError.of(error) from error
        return connection


class Server(clickhouse.Server):
    """The application over that engine, behind a door that asks for a password."""

    def __init__(self, path: Path, users: Path) -> None:
        super().__init__(path)
        self._users = Users(users)
        self.guarded = Door(self.app, self._users)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._engine = await self._in_thread(lambda: Engine(self._path, self._users))
        try:
            yield
        finally:
            await self._in_thread(self._engine.close)
            self._threads.shutdown()


class Door:
    """Lets in who shows a user's password, in any of the three ways that ClickHouse takes it."""

    def __init__(self, inside: ASGIApp, users: Users) -> None:
        self._inside = inside
        self._users = users

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/ping":
            await self._inside(scope, receive, send)
            return
        headers, asked = Headers(scope=scope), dict(parse_qsl(scope["query_string"].decode(), keep_blank_values=True))
        user = headers.get("x-clickhouse-user") or asked.pop("user", "") or "default"
        password = headers.get("x-clickhouse-key") or asked.pop("password", "")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            user, _, password = base64.b64decode(given).decode().partition(":")
        if not re.fullmatch(r"\w+", user) or not self._users.admits(user, password):
            said = (
                f"Code: 516. DB::Exception: {user}: Authentication failed: password is incorrect, or there is no user "
                "with such name. (AUTHENTICATION_FAILED) (version 26.8.2.7 (official build))"
            )
            await PlainTextResponse(said, 403, {"X-ClickHouse-Exception-Code": "516"})(scope, receive, send)
            return
        query = urlencode({**asked, _USER: user}).encode()
        await self._inside({**scope, "query_string": query}, receive, send)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--users", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: None)
    # What the embedded engine's door refuses by its text is here for grants to refuse, as on a server.
    clickhouse.Query.reaches_outside = property(lambda _: False)
    config = uvicorn.Config(
        Server(arguments.path, arguments.users).guarded, log_level="warning", timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=1024 * 1024,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[bind(clickhouse.HOST, arguments.port)])


if __name__ == "__main__":
    main()
