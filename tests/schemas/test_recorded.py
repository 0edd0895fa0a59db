"""What every version ever wrote is read by the newest code, from bytes that were kept."""

from typing import Any

import pytest

from processors.sink import core
from streams import codec
from streams.stages import Range
from streams.topics import STORED, TOPICS
from tests.schemas import recorded


def within(then: Any, now: Any) -> bool:
    """Whether all that was said then is said now; a field that came later is no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        return all(name in now and within(value, now[name]) for name, value in then.items())
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(map(within, then, now))
    return bool(then == now)


def test_every_version_has_its_record() -> None:
    missing = [
        f"{topic}.{n}" for topic, n in recorded.versions() if not (recorded.FOLDER / f"{topic}.{n}.json").exists()
    ]
    assert missing == [], "python -m tests.schemas.recorded"


@pytest.mark.parametrize(("topic", "version"), recorded.versions())
def test_a_record_of_every_version_says_today_what_it_said(topic: str, version: int) -> None:
    kept = recorded.load(topic, version)
    assert within(kept.says, recorded.plain(codec.decode(kept.incoming, TOPICS[topic].record)))


@pytest.mark.parametrize(("topic", "version"), [kind for kind in recorded.versions() if kind[0] in STORED])
def test_a_record_of_every_version_has_its_row(topic: str, version: int) -> None:
    incoming = recorded.load(topic, version).incoming
    rows = core.rows(Range(topic, incoming.epoch, incoming.partition, 0, 0), [incoming])
    assert len(rows.typed) == len(rows.log) == 1
