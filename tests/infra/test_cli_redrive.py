"""`rewatch dlq redrive` on the real broker and the real ClickHouse engine, and on files that were rejected."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition

from infra.config import Settings, load
from schemas.records import DeadLetter, DeadLetterStatus, Record
from streams import codec
from streams.admin import read_meta
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.messages import ATTEMPTS, REDRIVE, Emit, Incoming
from streams.redrives import STATUS
from tests.infra.cli_kit import AT, answer, invoke, put_in_store

pytestmark = pytest.mark.real

LARGE = 300_000


@pytest.fixture
def mine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The running stack, with a database of this test's own, empty."""
    assert settings.kafka.system
    monkeypatch.setenv("REWATCH_CLICKHOUSE__DATABASE", f"cli_{secrets.token_hex(4)}")
    return load()


def letter(origin: str, **other: Any) -> DeadLetter:
    usual: dict[str, Any] = {
        "camera_id": "front",
        "stage": "detect",
        "kind": "error",
        "error": "ValueError",
        "message": "no",
        "attempt": 1,
        "key": b"front",
        "value": b"bytes",
        "headers": {"fp": b"\x01"},
        "detail": "",
        "failed_at": AT,
    }
    return DeadLetter(origin=origin, **usual | other)


def store(settings: Settings, topic: str, records: Sequence[Record], first: int = 0) -> None:
    """The records in ClickHouse as if they stood on the log there."""
    emits = [codec.emit(topic, record) for record in records]
    rows = [Incoming(topic, "e", 0, first + n, emit.key, emit.value, emit.headers) for n, emit in enumerate(emits)]
    asyncio.run(put_in_store(settings, rows))


def append(settings: Settings, *emits: Emit) -> list[int]:
    async def transact() -> list[int]:
        kafka = Kafka(settings.kafka)
        producer = FencedProducer(kafka, kafka.transactional_id("test", secrets.token_hex(4)))
        await producer.open()
        try:
            return await producer.transact(emits)
        finally:
            await producer.close()

    return asyncio.run(transact())


def read(settings: Settings, topic: str, partition: int, since: int = 0) -> list[Incoming]:
    tp = TopicPartition(topic, partition)
    return asyncio.run(Kafka(settings.kafka).read([tp], since={tp: since}))


def epoch_of(settings: Settings, topic: str) -> str:
    return asyncio.run(read_meta(Kafka(settings.kafka)))[topic].epoch


def test_bytes_go_back_to_where_they_came_from_and_the_letter_is_followed_to_its_end(mine: Settings) -> None:
    epoch = epoch_of(mine, "frames")
    large = bytes(LARGE)
    [at] = append(mine, Emit("frames", b"front", large, (("fp", b"\x02"),), 3))
    small, big = letter(f"frames:{epoch}:3:{at + 900}"), f"frames:{epoch}:3:{at}"
    store(mine, "dead_letters", [small, letter(big, key=None, value=None, headers={}, claim=f"log:{big}")])
    planned = answer("dlq", "redrive", "--all", "--dry-run")
    assert [(one["to"], one["why"]) for one in planned["letters"]] == [("frames-3", None)] * 2
    assert len(read(mine, "frames", 3, at)) == 1

    done = answer("dlq", "redrive", "--error", "VALUEERROR: n", "--yes")
    assert [one["origin"] for one in done["letters"]] == [big, small.origin]
    _, first, second = read(mine, "frames", 3, at)
    assert (first.key, first.value, first.original_headers) == (b"front", large, (("fp", b"\x02"),))
    assert (second.key, second.value) == (b"front", b"bytes")
    marks = ((REDRIVE, small.origin.encode()), (ATTEMPTS, b"1"))
    assert second.headers == (("fp", b"\x01"), *marks)
    assert second.redriven == small.origin
    said = [codec.decode(one, DeadLetterStatus) for one in read(mine, STATUS, 0)]
    said = [one for one in said if one.origin in {big, small.origin}]
    assert [(one.status, one.by) for one in said] == [("redriven", "cli")] * 2

    store(mine, STATUS, said)
    assert {one["status"] for one in answer("dlq", "ls", "--status", "open")} == {"redriven"}
    assert invoke("dlq", "redrive", "--all", "--yes").exit_code == 1  # on their way
    assert answer("dlq", "redrive", big, "--dry-run")["letters"][0]["to"] == "frames-3"  # by name again

    def status(origin: str, what: str, by: str, at: int) -> DeadLetterStatus:
        return DeadLetterStatus(origin=origin, status=what, by=by, at=at, record=f"frames:{epoch}:3:{at}")

    again = letter(small.origin, attempt=2, failed_at=AT + 10)
    late = status(big, "redriven", "cli", said[0].at + 100)  # redriven once more, after it was resolved
    store(mine, "dead_letters", [again], first=10)
    store(
        mine,
        STATUS,
        [status(big, "resolved", "detect", said[0].at + 50), late, status(again.origin, "open", "detect", late.at)],
        first=10,
    )
    assert answer("status", code=0)["dead_letters"] == [{"stage": "detect", "kind": "error", "count": 1}]
    [open_] = answer("dlq", "ls", "--status", "open")
    assert (open_["origin"], open_["status"], open_["attempt"]) == (small.origin, "open", 2)
    assert [one["origin"] for one in answer("dlq", "ls", "--status", "resolved")] == [big]
    assert [one["attempt"] for one in answer("dlq", "show", small.origin)] == [2, 1]
    refused = answer("dlq", "redrive", big, code=1)["letters"][0]
    assert refused["why"].startswith("it is resolved")
    # Another stage's say, or a letter of another stage, is another matter.
    store(mine, "dead_letters", [letter(big, stage="replay")], first=20)
    assert len(answer("status")["dead_letters"]) == 2


def test_filters_choose_by_time_stage_and_words(mine: Settings) -> None:
    minutes = [AT + n * 60_000 for n in range(4)]
    origins = [f"batches:e:0:{n}" for n in range(4)]
    store(
        mine,
        "dead_letters",
        [
            letter(origin, failed_at=at, stage="enrich", message=f"zone {n}")
            for n, (origin, at) in enumerate(zip(origins, minutes, strict=True))
        ],
    )

    def found(*options: str) -> list[str]:
        return [one["origin"] for one in answer("dlq", "ls", *options)]

    assert found() == origins[::-1]
    assert found("--since", "2026-11-02T10:01", "--until", "2026-11-02T10:03") == [origins[2], origins[1]]
    assert found("--error", "ZONE 2") == [origins[2]]
    assert found("--stage", "detect") == []
    assert found("--limit", "1") == [origins[3]]


def test_what_cannot_be_redriven_says_why_and_what_to_do(mine: Settings) -> None:
    epoch = epoch_of(mine, "frames")
    bare: dict[str, Any] = {"key": None, "value": None, "headers": {}}
    reasons = {
        f"frames:{epoch}:0:1": "a gap has no bytes",
        "frames:0ld:0:2": "was made anew since",
        f"frames:{epoch}:1:999999999": "retention has taken them",
        f"frames:{epoch}:99:1": "partitions now",
        "upload:front/a.jpg@0011223344556677": "send it again",
        "folder:front/a.jpg@0011223344556677": "is not there any more",
    }
    gap, anew, gone, elsewhere, upload, file = reasons
    detail = json.dumps({"name": "a.jpg", "size": 3, "file_at": 1})
    store(
        mine,
        "dead_letters",
        [
            letter(gap, kind="gap", **bare),
            letter(anew, claim=f"log:{anew}", **bare),
            letter(gone, claim=f"log:{gone}", **bare),
            letter(elsewhere),
            letter(upload, kind="rejected", stage="ingest", detail=detail),
            letter(file, kind="rejected", stage="ingest", detail=detail),
        ],
    )
    letters = answer("dlq", "redrive", "--all", "--yes", code=1)["letters"]
    assert {one["origin"]: one["to"] for one in letters} == dict.fromkeys(reasons)
    for one in letters:
        assert reasons[one["origin"]] in one["why"]
    result = invoke("dlq", "redrive", "--all", "--yes")
    assert "0 redriven, 6 not" in result.stdout
    assert not [one for one in read(mine, STATUS, 0) if (one.key or b"").decode() in {*reasons} - {gap, elsewhere}]


def test_a_rejected_file_goes_back_to_its_camera_s_folder(mine: Settings) -> None:
    data = b"no jpeg yet"
    root = Path(mine.ingest.folder.root)
    rejected = root / "front" / ".rejected" / "day" / "a~2.jpg"
    rejected.parent.mkdir(parents=True)
    rejected.write_bytes(data)
    rejected.with_name("a~2.jpg.reason.txt").write_text("no\n")
    (rejected.parent / "a.jpg").write_bytes(b"some other")  # its namesake, of other content
    origin = f"folder:front/day/a.jpg@{hashlib.sha256(data).hexdigest()[:16]}"
    detail = json.dumps({"name": "day/a.jpg", "size": len(data), "file_at": 1})
    store(mine, "dead_letters", [letter(origin, kind="rejected", stage="ingest", detail=detail)])
    back = root / "front" / "day" / "a.jpg"
    assert answer("dlq", "redrive", origin, "--dry-run")["letters"][0]["to"] == str(back)
    assert rejected.exists()
    assert answer("dlq", "redrive", origin)["letters"][0]["to"] == str(back)
    assert back.read_bytes() == data
    assert sorted(path.name for path in rejected.parent.iterdir()) == ["a.jpg", "a.jpg.redrive.json"]
    assert "is not there any more" in answer("dlq", "redrive", origin, code=1)["letters"][0]["why"]
