"""Completion: TAB finds cameras, events and dead letters of a running system, and nothing, at once, of none."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cli.complete import address
from infra.cli.main import app
from infra.config import load

ROWS = {
    "FROM cameras": [{"camera_id": "front-door", "name": "Front door"}, {"camera_id": "yard", "name": "yard"}],
    "FROM events": [
        {
            "camera_id": "yard",
            "event_id": "yard:7c1b22:live",
            "risk_score": 72,
            "risk_level": "high",
            "summary": "A person",
        },
        {"camera_id": "yard", "event_id": "yard:9d00aa:live", "risk_score": 3, "risk_level": "low", "summary": "A cat"},
    ],
    "FROM prompts": [{"digest": "3fa9c1d2e3f4a5b6", "name": "shop", "comment": "a shop"}],
    "FROM dead_letters": [{"origin": "frames:3f2a:0:1", "stage": "detect", "message": "no image"}],
}


class ClickHouse(BaseHTTPRequestHandler):
    """Answers what completion asks, as ClickHouse does."""

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers["content-length"])).decode()
        rows = next(rows for name, rows in ROWS.items() if name in query)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": rows}).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), ClickHouse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def tab(line: str, **environment: str) -> list[str]:
    """What bash is offered at the end of the line."""
    words = line.split(" ")
    bash = {"_REWATCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    found = CliRunner().invoke(app, [], prog_name="rewatch", env=bash | environment)
    assert found.exception is None or isinstance(found.exception, SystemExit)
    assert found.stderr == ""
    return found.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rewatch ev", ["events"]),
        ("rewatch events sh", ["show"]),
        ("rewatch events ls --le", ["--level"]),
        ("rewatch events ls --level c", ["critical"]),
        ("rewatch run d", ["detect"]),
        ("rewatch dlq ls --stage a", ["analyze"]),
        ("rewatch dlq ls --kind g", ["gap"]),
        ("rewatch camera set ", ["front-door", "yard"]),
        ("rewatch events ls --camera y", ["yard"]),
        ("rewatch explain ", ["7c1b22", "9d00aa"]),
        ("rewatch events show 7", ["7c1b22"]),
        ("rewatch explain yard:9", ["yard:9d00aa:live"]),
        ("rewatch dlq show fr", ["frames:3f2a:0:1"]),
        ("rewatch prompt show ", ["active", "default", "deliveries-strict-nights", "shop"]),
        ("rewatch prompt promote 3f", ["3fa9c1d2e3f4"]),
        ("rewatch prompt diff default sh", ["shop"]),
    ],
)
def test_tab_completes(line: str, offered: list[str], url: str) -> None:
    assert tab(line, REWATCH_CLICKHOUSE__URL=url) == offered


def test_away_is_silence() -> None:
    assert tab("rewatch camera set ", REWATCH_CLICKHOUSE__URL="http://127.0.0.1:1") == []


def test_a_store_that_hangs_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        began = time.monotonic()
        assert tab("rewatch explain ", REWATCH_CLICKHOUSE__URL=f"http://127.0.0.1:{hanging.getsockname()[1]}") == []
        assert time.monotonic() - began < 2


def test_wrong_settings_are_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("kafka: [", "clickhouse: 3", "- a list", "\x00"):
        (tmp_path / "rewatch.yaml").write_text(text)
        assert tab("rewatch camera set ", REWATCH_LOCAL__CLICKHOUSE_PORT="1") == []


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("", {}),
        ("local: {clickhouse_port: 8200}", {}),
        ("clickhouse: {url: 'http://store:8123', user: reader, database: site}", {}),
        ("clickhouse: {url: 'http://store:8123'}", {"REWATCH_CLICKHOUSE__URL": "http://other:1"}),
        ("", {"REWATCH_CLICKHOUSE__PASSWORD": "secret", "rewatch_local__clickhouse_port": "8300"}),
    ],
)
def test_it_asks_where_the_settings_say(
    text: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewatch.yaml").write_text(text)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load().clickhouse
    password = settings.password.get_secret_value() if settings.password else ""
    assert address() == (settings.url, settings.database, settings.user, password)
    assert address(tmp_path / "rewatch.yaml") == address()
