"""Only an unexplained stall is a reason to restart a worker."""

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest

from streams.liveness import STALL_S, Liveness
from streams.turns import Turns


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lively() -> tuple[Liveness, Clock]:
    clock = Clock()
    return Liveness("toy", clock=clock), clock


def test_a_worker_that_polls_and_has_nothing_lives() -> None:
    life, clock = lively()
    life.partition("in-0").idle()
    clock.now += 10 * STALL_S
    life.polled()
    assert life.stall() is None


def test_a_consumer_that_silently_stopped_is_a_stall() -> None:
    life, clock = lively()
    clock.now += STALL_S + 1
    assert life.stall() == "the consumer has not polled for 46 s"


def test_a_consumer_that_is_brought_nothing_is_a_stall() -> None:
    life, _ = lively()
    life.deaf = "in-0 ends at offset 9 and is not read on from 4 for 30 s"
    assert life.stall() == life.deaf


def test_time_in_which_the_process_did_not_run_is_no_time_of_a_stall() -> None:
    life, clock = lively()
    life.partition("in-0").hold(3)
    life.ticked()
    clock.now += STALL_S + 10  # SIGSTOP, then SIGCONT; or others had the CPU
    life.ticked()
    assert life.stall() is None
    for _ in range(int(STALL_S) - 3):
        assert life.stall() is None
        clock.now += 1
        life.ticked()
    clock.now += 4
    life.ticked()
    assert life.stall() is not None


def test_a_worker_whose_broker_is_away_waits() -> None:
    life, clock = lively()
    life.waiting_on = "broker"
    clock.now += 10 * STALL_S
    assert life.stall() is None
    assert life.report()["waiting_on"] == ["broker"]


def test_records_in_hand_that_do_not_advance_are_a_stall() -> None:
    life, clock = lively()
    life.partition("in-0").hold(3)
    clock.now += STALL_S + 1
    life.polled()
    assert life.stall() == "in-0 has 3 records in hand and has not advanced for 46 s"


def test_a_record_after_a_quiet_hour_is_no_stall() -> None:
    life, clock = lively()
    partition = life.partition("in-0")
    partition.idle()
    clock.now += 3600
    life.polled()
    partition.hold(1)
    assert life.stall() is None


def test_a_partition_that_says_what_it_waits_on_is_no_stall_nor_when_the_waiting_ends() -> None:
    life, clock = lively()
    partition = life.partition("in-0")
    partition.hold(1)
    partition.waiting_on = "llm"
    clock.now += 3600
    life.polled()
    assert life.stall() is None
    partition.waiting_on = None
    assert life.stall() is None


def test_a_stage_with_patience_may_take_longer_for_a_record() -> None:
    life, clock = lively()
    life.partition("in-0", patience_s=400).hold(1)
    clock.now += 399
    life.polled()
    assert life.stall() is None
    clock.now += 2
    assert life.stall() is not None


def test_a_forgotten_partition_is_not_reported() -> None:
    life, _ = lively()
    life.partition("in-0").advanced(7, 2)
    life.partition("in-1")
    life.forget("in-1")
    assert life.report()["partitions"] == {"in-0": {"position": 7, "in_hand": 2, "waiting_on": None}}


def test_the_status_file_is_whole_json(tmp_path: Path) -> None:
    life, _ = lively()
    path = tmp_path / "made" / "status.json"
    life.write(path)
    assert json.loads(path.read_text())["stage"] == "toy"
    assert list(path.parent.iterdir()) == [path]


async def test_waiting_for_a_slot_behind_other_partitions_is_no_stall() -> None:
    now = [0.0]
    liveness = Liveness("detect", clock=lambda: now[0])
    slots = Turns(1)
    life = liveness.partition("frames-0")
    life.hold(3)
    await slots.acquire("another")

    async def work() -> None:
        async with life.slot(slots):
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    now[0] = 10 * STALL_S
    liveness.polled()
    assert liveness.stall() is None
    slots.release()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert liveness.stall() is None  # it holds the slot from now on
    now[0] += STALL_S + 1
    liveness.polled()
    assert "has not advanced" in str(liveness.stall())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not slots.locked()


def test_a_report_that_cannot_be_written_still_says_that_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Liveness("toy")
    status = tmp_path / "toy.json"
    life.write(status)
    written = status.read_text()
    os.utime(status, (1, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    life.write(status)
    assert status.stat().st_mtime > 1
    assert status.read_text() == written
