"""An installation in containers, as a person with a browser and a camera meets it."""

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from streams.topics import partition_of
from tests.containers import machine
from tests.containers.podman import Compose, say
from tests.e2e.installation import pictures, stamped

COMPOSE = machine.TREE / "infra" / "compose"
PARTITIONS = 4
STAGES = ("ingest", "gateway", "detect", "batch", "enrich", "analyze", "sink")
SERVERS = ("redpanda", "clickhouse", "detector", "llama")


def cameras() -> list[str]:
    """A camera for each partition, so that each has work."""
    found: dict[int, str] = {}
    for number in range(1000):
        found.setdefault(partition_of(f"camera-{number}", PARTITIONS), f"camera-{number}")
    return [found[partition] for partition in range(PARTITIONS)]


class Site:
    """The stack behind its door."""

    def __init__(self, compose: Compose, url: str, key: str, authority: Path | None = None) -> None:
        """`compose`: that of the host with the doors; `authority`: who signed the door's certificate."""
        self.compose = compose
        self.accepted: set[str] = set()
        self._key = key
        self._shots: list[bytes] = []
        self._at = datetime(2026, 5, 1, 22, 30, tzinfo=UTC)
        self.moved(url, authority)

    def moved(self, url: str, authority: Path | None = None) -> None:
        """The door is somewhere else now."""
        self._url = url
        self._tls = ssl.create_default_context(cafile=authority) if authority is not None else None

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """A request to the door, with the key; status 0 where nobody answers."""
        request = urllib.request.Request(f"{self._url}{path}", data=body, headers={"X-API-Key": self._key})
        try:
            with urllib.request.urlopen(request, timeout=60, context=self._tls) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def answers(self) -> None:
        """Wait for the page."""
        until(lambda: self.ask("/api/health")[0] == 200, 300, "the page to answer")

    def feed(self, count: int) -> None:
        """`count` frames of each camera, a second apart, as a camera sends them: again until they are taken."""
        self._shots = self._shots or pictures()
        for _ in range(count):
            self._at += timedelta(seconds=1)
            for camera in cameras():
                self.send(camera, stamped(self._shots[len(self.accepted) % len(self._shots)], self._at))

    def send(self, camera: str, body: bytes) -> None:
        """A frame of a camera, again until it is taken."""
        answer = b""

        def taken() -> bool:
            nonlocal answer
            status, answer = self.ask(f"/api/upload?camera={camera}", body)
            assert status in {0, 200, 429, 502, 503}, f"{status}: {answer!r}"
            return status == 200

        until(taken, 300, f"a frame of {camera} to be taken")
        self.accepted.add(json.loads(answer)["frame_id"])

    def events(self) -> list[dict[str, Any]]:
        """The events that the page shows, which are ClickHouse's."""
        status, body = self.ask("/api/events?limit=200")
        found: list[dict[str, Any]] = json.loads(body)["events"] if status == 200 else []
        return found

    def audit(self) -> None:
        """What `rewatch audit` says once nothing is in flight, and that every accepted frame is in ClickHouse once."""
        said = ""
        for _ in range(
            3
        ):  # code 3 and a line on stderr: a service took too long to answer, as on a machine that does much
            said = said or self.compose.exec(
                "gateway", "rewatch", "audit", "--wait", "--json", within=400, codes=(0, 1, 3)
            )
        report: dict[str, Any] = json.loads(said)
        assert report["clean"], report
        assert (report["accepted"], report["lost"], report["duplicates"]) == (len(self.accepted), 0, 0)
        query = "SELECT frame_id FROM frames FINAL"
        rows = json.loads(self.compose.exec("gateway", "rewatch", "sql", query, "--json", within=120))
        stored = [row["frame_id"] for row in rows]
        assert len(stored) == len(set(stored))
        assert set(stored) == self.accepted
        say(f"audit: {report['accepted']} frames accepted, 0 lost, 0 doubled")


def reports(compose: Compose, service: str, stage: str) -> list[dict[str, Any]]:
    """What the live processes of a stage on a host say of themselves, asked in a container there."""
    script = (
        "import json; from pathlib import Path; from streams.health import workers; "
        "print(json.dumps(workers(Path('/data'))))"
    )
    found = json.loads(compose.exec(service, "python", "-c", script, within=60))
    return [report for report in found if report["stage"] == stage]


def shared(held: list[set[str]]) -> bool:
    """Whether each of several processes has partitions of its own, and all have all of them."""
    return len(held) > 1 and all(held) and sum(map(len, held)) == PARTITIONS == len(set[str]().union(*held))


def no_secret_in_logs(compose: Compose) -> None:
    """Look for each secret in each container's log."""
    folder = Path(compose.environment["SECRETS"])
    secrets: Mapping[str, str] = {path.name: path.read_text().strip() for path in folder.iterdir() if path.is_file()}
    found = [
        f"{secret} in the log of {name}"
        for name in compose.names()
        for log in [compose.logs(name, 100_000)]
        for secret, value in secrets.items()
        if value in log
    ]
    assert not found


def until(holds: Callable[[], object], within: float, what: str) -> None:
    """Wait for it, looking each second."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"waited {within:.0f} s for {what}"
        time.sleep(1.0)
