"""The command line under ClickHouse's three users: what each command needs, and what it says where that is missing."""

import asyncio
import hashlib
import os
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self

import pytest

from processors.sink.store import ClickHouseStore
from processors.store.audit import Report
from processors.store.connection import Connection
from processors.store.queries import Queries
from processors.store.users import make_users
from schemas.users import USERS, statements
from streams.errors import UnavailableError
from streams.registry import SchemaRegistry, Told
from tests.clickhouse_users import Guarded
from tests.infra.cli_kit import answer, invoke
from tests.processors.audit_kit import History

pytest_plugins = ["tests.users_kit"]


def become(role: str, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in guarded.environment(role).items():
        monkeypatch.setenv(name, value)


async def kept(guarded: Guarded) -> History:
    """A history that is as it should be, in tables that the admin made and by the hand of the writer."""
    history = History()
    for role in ("admin", "writer"):
        store = ClickHouseStore(guarded.settings(role))
        try:
            await (store.migrate() if role == "admin" else history.keep(store))
        finally:
            await store.close()
    return history


@pytest.mark.real
def test_the_command_line_and_the_audit_read_as_the_reader_and_change_nothing(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = asyncio.run(kept(guarded))

    async def audited() -> Report:
        async with aclosing(Queries(guarded.settings("reader"))) as reader:
            return await history.audited(reader)

    assert asyncio.run(audited()).clean
    become("reader", guarded, monkeypatch)
    event = answer("events", "ls")[0]
    assert answer("explain", event["event_id"])["frames"]
    assert answer("sql", "SELECT count() > 0 AS there FROM risk_events") == [{"there": 1}]
    for command in (("events", "show", event["event_id"]), ("dlq", "ls"), ("label", "ls")):
        done = invoke(*command)
        assert done.exit_code == 0, done.output
    refused = invoke("rebuild", "--table", "labels", "--yes")
    assert refused.exit_code == 3
    assert "clickhouse.user" in refused.stderr


@pytest.mark.real
def test_a_wrong_password_and_a_user_who_may_make_none_name_the_setting(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="access_management"):
        asyncio.run(make_users(guarded.settings("admin"), {user.role: "word" for user in USERS}))
    become("admin", guarded, monkeypatch)
    monkeypatch.delenv("REWATCH_CLICKHOUSE__PASSWORD_FILE")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__PASSWORD", "wrong-word")
    refused = invoke("events", "ls")
    assert refused.exit_code == 3
    assert "REWATCH_CLICKHOUSE__PASSWORD" in refused.stderr
    assert "rewatch_admin: Authentication failed" in refused.stderr
    assert "wrong-word" not in refused.stderr
    assert "does not answer" not in refused.stderr


class Client:
    """Takes every statement, as a server where the connected user may make others."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    async def command(self, statement: str) -> None:
        self.statements.append(statement)

    async def close(self) -> None: ...


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Client:
    """Settings that name a server, with everything but its users there already."""
    client = Client()

    async def nothing(*_: object, **__: object) -> Any:
        return []

    async def topics(*_: object) -> dict[str, Any]:
        return {"frames": None}

    async def opened(*_: object) -> Client:
        return client

    class Admin:
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def list_topics(self) -> list[str]:
            return ["frames"]

    monkeypatch.setenv("REWATCH_CLICKHOUSE__URL", "http://clickhouse:8123")
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", "cams")
    monkeypatch.setattr("streams.kafka.Kafka.admin", lambda _: Admin())
    monkeypatch.setattr("streams.admin.ensure_topics", topics)
    monkeypatch.setattr("streams.retention.retain", nothing)
    monkeypatch.setattr("streams.prompts.Prompts.register", nothing)
    monkeypatch.setattr("processors.sink.store.ClickHouseStore.migrate", nothing)
    monkeypatch.setattr(Connection, "open", opened)
    return client


def test_users_are_made_with_passwords_that_only_their_owner_can_read_and_kept_the_next_time(
    elsewhere: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "secrets"
    done = invoke("migrate", "--users", str(folder))
    assert done.exit_code == 0, done.output
    assert "users: cams_admin, cams_writer, cams_reader" in done.stdout
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(first) == {f"clickhouse_{user.role}_password" for user in USERS}
    assert len(set(first.values())) == len(USERS)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    sent = "\n".join(elsewhere.statements) + done.output
    assert not [password for password in first.values() if password in sent]

    (folder / "clickhouse_reader_password").write_text("chosen by a person\n")
    elsewhere.statements.clear()
    assert answer("migrate", "--users", str(folder))["users"] == ["cams_admin", "cams_writer", "cams_reader"]
    assert (folder / "clickhouse_writer_password").read_text() == first["clickhouse_writer_password"]
    digests = {user.role: hashlib.sha256(first[f"clickhouse_{user.role}_password"].encode()) for user in USERS}
    digests["reader"] = hashlib.sha256(b"chosen by a person")
    assert elsewhere.statements == [
        statement for user in USERS for statement in statements(user, "cams", digests[user.role].hexdigest())
    ]


@pytest.mark.parametrize("wrong", ["empty", "file"])
def test_a_folder_of_passwords_that_is_none_is_refused_at_once(elsewhere: Client, tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "secrets"
    if wrong == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "clickhouse_admin_password").touch()
    refused = invoke("migrate", "--wait", "--users", str(folder))
    assert refused.exit_code == 2
    assert str(folder) in refused.stderr
    assert elsewhere.statements == []


def test_the_embedded_engine_has_no_users_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    refused = invoke("migrate", "--users", str(tmp_path / "secrets"))
    assert refused.exit_code == 2
    assert "clickhouse.url" in refused.stderr
    assert not (tmp_path / "secrets").exists()


def test_migrate_tells_the_registry_and_waits_for_it(elsewhere: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "schemas" not in answer("migrate")
    monkeypatch.setenv("REWATCH_KAFKA__SCHEMA_REGISTRY_URL", "http://redpanda:8081")
    monkeypatch.setattr("infra.cli.migrate._PAUSE_S", 0.001)
    answers: list[Any] = [
        UnavailableError("schema registry", "nobody there"),
        [Told("frames-value", (7, 8), 0, ()), Told("labels-value", (), 2, (3,))],
        [Told("frames-value", (), 2, ())],
    ]

    async def register(_: SchemaRegistry) -> list[Told]:
        told = answers.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(SchemaRegistry, "register", register)
    first = invoke("migrate", "--wait")
    assert first.exit_code == 0, first.output
    assert first.stderr.count("waiting: nobody there") == 1
    assert "schema registry: told 2 of 4 schemas; versions that are not ours: labels-value 3" in first.stdout
    assert "schema registry: has every schema" in invoke("migrate").stdout
