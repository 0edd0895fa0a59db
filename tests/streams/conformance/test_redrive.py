"""Dead letters redriven by several at once, while their stage and they themselves are killed: one result each."""

import asyncio
import secrets
from collections import Counter
from pathlib import Path

import pytest
from aiokafka import TopicPartition

from schemas import ids
from schemas.records import DeadLetter, DeadLetterStatus
from streams import codec
from streams.delivery import FencedProducer
from streams.kafka import Kafka
from streams.redrives import OPEN, RESOLVED, STATUS, again
from tests.conftest import PARTITIONS
from tests.streams.conformance.harness import Road, road, until, worker

pytestmark = [pytest.mark.real, pytest.mark.chaos]

BAD = 8

# Five workers start one after another here, and each takes its time on a busy machine.
WITHIN = 90


async def test_redriven_by_several_at_once_with_kills_between_each_letter_has_one_result(
    kafka: Kafka, host: str, tmp_path: Path
) -> None:
    async with road(kafka, tmp_path) as on:
        for number in range(BAD):
            await on.producer.send_and_wait(
                on.source, b"bad %d" % number, key=b"camera", partition=number % PARTITIONS, headers=[("n", b"1")]
            )
        settings = on.settings(host, "echo")
        async with worker(settings):
            await until(lambda: _letters(on, BAD), WITHIN)
            first = await on.dead_letters()
            await _redrive(kafka, first)  # nothing is mended: each fails once more
            await until(lambda: _letters(on, 2 * BAD), WITHIN)
        letters = await on.dead_letters()
        assert Counter(letter.origin for letter in letters) == {letter.origin: 2 for letter in first}
        assert sorted(letter.attempt for letter in letters) == [1] * BAD + [2] * BAD
        assert {(letter.value, letter.key, letter.headers["n"]) for letter in letters} == {
            (b"bad %d" % number, b"camera", b"1") for number in range(BAD)
        }
        assert all(len(letter.headers) == 1 for letter in letters)
        assert Counter(one.status for one in await _statuses(on)) == {OPEN: BAD}

        (tmp_path / "mended").touch()
        redriving = [asyncio.create_task(_redrive(kafka, first)) for _ in range(3)]
        killed = asyncio.create_task(_redrive(kafka, first))
        await asyncio.sleep(0.05)
        killed.cancel()
        for resolved in (1, 3):
            async with worker(settings):  # ended by SIGKILL
                await until(lambda resolved=resolved: _resolved(on, resolved), WITHIN)
        await asyncio.gather(*redriving)
        async with worker(settings):
            await _redrive(kafka, first)
            await until(lambda: _resolved(on, BAD), WITHIN)
            await on.send(40)  # behind all that was redriven: when these are through, so is everything
            await until(lambda: _through(on), WITHIN)
        output = Counter(record.value for record in await on.output())
        assert output == Counter([b"bad %d" % n for n in range(BAD)] + [one.encode() for one in on.sent])
        assert len(await on.dead_letters()) == 2 * BAD
        resolved_by = Counter(one.origin for one in await _statuses(on) if one.status == RESOLVED)
        assert resolved_by == {letter.origin: 1 for letter in first}


async def _redrive(kafka: Kafka, letters: list[DeadLetter]) -> None:
    """As the command line does it, in two transactions."""
    producer = FencedProducer(kafka, kafka.transactional_id("redrive", secrets.token_hex(4)))
    await producer.open()
    try:
        for part in (letters[::2], letters[1::2]):
            emits = []
            for letter in part:
                place = ids.place(letter.origin)
                assert place is not None
                headers = tuple(letter.headers.items())
                emits += again(
                    place, letter.attempt, key=letter.key, value=letter.value, headers=headers, by="test", at=1
                )
            await producer.transact(emits)
    finally:
        await producer.close()


async def _statuses(on: Road) -> list[DeadLetterStatus]:
    """What the stage said."""
    found = [codec.decode(one, DeadLetterStatus) for one in await on.kafka.read([TopicPartition(STATUS, 0)])]
    return [one for one in found if one.origin.startswith(f"{on.source}:") and one.by == "echo"]


async def _letters(on: Road, count: int) -> bool:
    return len(await on.dead_letters()) >= count


async def _resolved(on: Road, count: int) -> bool:
    return sum(one.status == RESOLVED for one in await _statuses(on)) >= count


async def _through(on: Road) -> bool:
    made = {(record.value or b"").decode() for record in await on.output()}
    return made >= set(on.sent)
