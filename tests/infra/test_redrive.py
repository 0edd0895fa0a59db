"""The way back for dead letters, without a broker: what goes into which transaction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from infra import redrive
from infra.config import load
from schemas.records import DeadLetterStatus, TopicMeta
from streams import codec
from streams.messages import ATTEMPTS, Emit, Incoming
from streams.redrives import REDRIVEN, STATUS
from tests import examples


def row(origin: str, stage: str = "detect", attempt: int = 1, **other: Any) -> dict[str, Any]:
    """A dead letter as the store has it."""
    usual: dict[str, Any] = {"kind": "error", "status": "open", "claim": "", "key": "61", "value": "62", "headers": []}
    return {"origin": origin, "stage": stage, "attempt": attempt} | usual | other


class Store:
    """Has these letters."""

    def __init__(self, letters: Sequence[dict[str, Any]]) -> None:
        self.letters = letters

    async def dead_letters(self, *, origins: Sequence[str], limit: int) -> list[dict[str, Any]]:
        return [letter for letter in self.letters if letter["origin"] in origins][:limit]


class Producer:
    """Remembers what was appended together."""

    def __init__(self) -> None:
        self.transactions: list[list[Emit]] = []

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def transact(self, emits: Sequence[Emit]) -> None:
        self.transactions.append(list(emits))


@pytest.fixture
def producer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Producer:
    async def metas(_: object) -> dict[str, TopicMeta]:
        meta = next(value for value in vars(examples).values() if isinstance(value, TopicMeta))
        return {"frames": meta}

    made = Producer()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redrive, "read_meta", metas)
    monkeypatch.setattr(redrive, "FencedProducer", lambda *_: made)
    return made


async def redriven(letters: Sequence[dict[str, Any]], *, dry_run: bool = False) -> list[redrive.Outcome]:
    redriver = redrive.Redriver(load(), Store(letters), dry_run=dry_run)  # type: ignore[arg-type]
    return await redriver.run(redrive.one_each(letters))


async def test_a_records_bytes_and_its_status_are_appended_all_or_nothing(producer: Producer) -> None:
    """Killed between them, it would be at work and called open, and asked for again; or called redriven for ever."""
    done = await redriven([row(f"frames:e1:0:{n}") for n in range(redrive.CHUNK + 1)])
    assert [outcome.why for outcome in done] == [None] * (redrive.CHUNK + 1)
    assert [len(emits) for emits in producer.transactions] == [2 * redrive.CHUNK, 2]
    for emits in producer.transactions:
        for record, status in zip(emits[::2], emits[1::2], strict=True):
            said = codec.decode(Incoming(STATUS, "s", 0, 0, status.key, status.value, status.headers), DeadLetterStatus)
            assert (record.topic, status.topic, said.status) == ("frames", STATUS, REDRIVEN)
            assert dict(record.headers)["redrive"].decode() == said.origin


async def test_it_goes_on_counting_where_its_own_stage_stopped(producer: Producer) -> None:
    """Of two stages that refused one record each counts its own attempts."""
    letters = [row("frames:e1:0:1", attempt=3), row("frames:e1:0:1", stage="replay", attempt=1)]
    await redriven(letters)
    [[record, _]] = producer.transactions
    assert dict(record.headers)[ATTEMPTS] == b"3"


async def test_a_dry_run_appends_nothing(producer: Producer) -> None:
    [outcome] = await redriven([row("frames:e1:0:1")], dry_run=True)
    assert (outcome.to, outcome.why) == ("frames-0", None)
    assert producer.transactions == []
