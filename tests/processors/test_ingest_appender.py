"""Frames are on the log once, whatever fails, dies or competes at whichever step."""

import asyncio
from collections import Counter

import pytest

from processors.ingest import core
from processors.ingest.fakes import MemoryCameras, MemoryLog
from schemas.records import Frame
from streams.claims import INLINE_LIMIT
from streams.errors import FencedError, UnavailableError, UncertainError
from streams.messages import Incoming, Tick
from tests.processors.ingest_kit import NOW, appenders, jpeg


def submission(shade=1, camera_id="front", **changes):
    return core.Submission(camera_id, jpeg(shade), "upload", "a.jpg", int(NOW * 1000))._replace(**changes)


async def send(to, *shades, camera_id="front"):
    """Prepare and append these; return the receipts."""
    entries = [await to.prepare(submission(shade, camera_id)) for shade in shades]
    return await to.append(camera_id, entries)


def once(log: MemoryLog, count: int) -> bool:
    ids = Counter(frame.frame_id for frame in log.frames())
    return len(ids) == count and set(ids.values()) <= {1}


def fail_at(log: MemoryLog, step: str, error: BaseException, times: int = 1) -> None:
    left = times

    def fault(at: str) -> None:
        nonlocal left
        if at == step and left:
            left -= 1
            raise error

    log.fault = fault


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
async def one(log, tmp_path):
    made = appenders(log, tmp_path)
    yield made
    await made.close()


async def test_accepted_then_known(one, log):
    (first,), (second,) = await send(one, 1), await send(one, 1)
    assert (first.status, second.status) == ("accepted", "known")
    assert first.frame_id == second.frame_id
    assert once(log, 1)
    assert log.commits == 1


async def test_frames_and_memory_are_one_transaction(one, log):
    await send(one, 1, 2, 3)
    assert [emit.topic for emit in log.records] == ["frames"] * 3 + ["ingest_state"]
    assert log.state("front").frames == 3


async def test_frames_keep_their_order(one, log):
    receipts = await send(one, *range(40))
    assert [frame.frame_id for frame in log.frames()] == [receipt.frame_id for receipt in receipts]


async def test_frames_that_wait_together_share_a_transaction(one, log):
    entries = [await one.prepare(submission(shade)) for shade in range(100)]
    await asyncio.gather(*(one.append("front", [entry]) for entry in entries))
    assert once(log, 100)
    assert log.commits <= 3


async def test_the_same_frame_twice_in_one_transaction(one, log):
    receipts = await send(one, 1, 2, 1)
    assert [receipt.status for receipt in receipts] == ["accepted", "accepted", "known"]
    assert once(log, 2)


async def test_a_new_process_remembers(log, tmp_path):
    for status in ("accepted", "known"):
        one = appenders(log, tmp_path)
        assert (await send(one, 1))[0].status == status
        await one.close()
    assert once(log, 1)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("open", FencedError("x")),
        ("open", UncertainError("x")),
        ("commit", FencedError("x")),
        ("commit", UncertainError("x")),
        ("committed", UncertainError("x")),
    ],
)
async def test_lost_ownership_is_acquired_again_before_the_answer(one, log, step, error):
    fail_at(log, step, error)
    (receipt,) = await send(one, 1)
    assert receipt.status == "accepted"
    assert once(log, 1)
    assert log.state("front").frames == 1


@pytest.mark.parametrize("error", [UnavailableError("broker", "away"), RuntimeError("not foreseen")])
@pytest.mark.parametrize("step", ["open", "commit", "committed"])
async def test_what_is_not_answered_can_be_tried_again(one, log, step, error):
    fail_at(log, step, error)
    with pytest.raises(type(error)):
        await send(one, 1)
    await send(one, 1)
    assert once(log, 1)


async def test_a_way_in_that_cannot_be_closed_is_given_up(one, log):
    await send(one, 1)
    fail_at(log, "commit", FencedError("x"))
    inner = log.fault

    def fault(step):
        inner(step)
        if step == "close":
            raise OSError("broken")

    log.fault = fault
    await send(one, 2)
    assert once(log, 2)


async def test_killed_at_every_await_then_tried_again(tmp_path):
    finished = False
    steps = 0
    while not finished:
        log = MemoryLog()
        dying = appenders(log, tmp_path)
        entries = [await dying.prepare(submission(shade)) for shade in (1, 2, 3)]
        others = asyncio.all_tasks()
        task = asyncio.create_task(dying.append("front", entries))
        for _ in range(steps):
            await asyncio.sleep(0)
        finished = task.done()
        for killed in asyncio.all_tasks() - others:
            killed.cancel()
        await asyncio.gather(task, return_exceptions=True)
        heir = appenders(log, tmp_path)
        receipts = await send(heir, 1, 2, 3)
        assert {receipt.status for receipt in receipts} <= {"accepted", "known"}
        assert once(log, 3), steps
        assert log.state("front").frames == 3, steps
        await heir.close()
        steps += 1
    assert steps > 5  # open, commit, committed and the answer all lie between


async def test_two_replicas_fence_one_another(log, tmp_path):
    left, right = appenders(log, tmp_path), appenders(log, tmp_path)
    for shade in range(10):
        await asyncio.gather(send(left, shade), send(right, shade), send(left, 100 + shade), send(right, 200 + shade))
    assert once(log, 30)
    assert log.state("front").frames == 30
    await asyncio.gather(left.close(), right.close())


async def test_a_fenced_replica_checks_again_before_it_answers(log, tmp_path):
    left, right = appenders(log, tmp_path), appenders(log, tmp_path)
    await send(left, 1)
    await send(right, 2)
    (receipt,) = await send(left, 2)
    assert receipt.status == "known"
    assert once(log, 2)
    await asyncio.gather(left.close(), right.close())


async def test_fenced_for_ever_is_an_error_in_bounded_time(log, tmp_path):
    one = appenders(log, tmp_path, deadline_s=0.001)
    fail_at(log, "commit", FencedError("x"), times=10**9)
    with pytest.raises(UnavailableError, match="another ingest appends for it too"):
        await send(one, 1)
    assert one.waiting_on == {"front": "broker"}
    log.fault = lambda _: None
    await send(one, 1)
    assert one.waiting_on == {}
    assert once(log, 1)
    await one.close()


async def test_an_idle_cameras_producer_is_closed_and_opened_again(log, tmp_path):
    one = appenders(log, tmp_path, idle_s=0.001)
    await send(one, 1)
    await asyncio.wait_for(log.closed.wait(), 5)
    await send(one, 1, 2)
    assert log.opened == 2
    assert once(log, 2)
    await one.close()


async def test_repeats_are_counted_but_not_one_by_one(log, tmp_path):
    one = appenders(log, tmp_path)
    await send(one, 1)
    for _ in range(50):
        await send(one, 1)
    assert log.commits == 1
    await one.close()
    assert log.state("front").unchanged == 50
    assert once(log, 1)


async def test_a_frozen_picture_reaches_the_log_while_it_repeats(log, tmp_path):
    one = appenders(log, tmp_path, idle_s=1e-9)
    await send(one, 1)
    for _ in range(5):
        await send(one, 1)
    await one.close()
    assert log.state("front").unchanged == 5
    assert once(log, 1)


async def test_large_images_are_claims_and_stored_before_they_are_appended(one, log, tmp_path):
    data = jpeg(3) + bytes(INLINE_LIMIT)
    entry = await one.prepare(submission()._replace(data=data))
    assert any((tmp_path / "images").rglob("*"))
    assert log.records == []
    await one.append("front", [entry])
    (frame,) = log.frames()
    assert frame.image is None
    assert await one._claims.get(frame.claim, frame.sha256) == data


async def test_at_the_limit_it_is_inline(one, log):
    data = jpeg(3)
    data += bytes(INLINE_LIMIT - len(data))
    await one.append("front", [await one.prepare(submission()._replace(data=data))])
    assert log.frames()[0].image == data


async def test_a_full_image_store_is_waited_for(log, tmp_path):
    one = appenders(log, tmp_path)
    (tmp_path / "images").write_text("a file where the store should be")
    with pytest.raises(UnavailableError) as error:
        await one.prepare(submission()._replace(data=jpeg(3) + bytes(INLINE_LIMIT)))
    assert error.value.waiting_on == "disk"


async def test_a_rejected_file_is_one_dead_letter(one, log):
    bad = submission()._replace(data=b"no image", source="folder", name="../x.jpg")
    for _ in range(2):
        await one.append("front", [await one.reject(bad, core.RejectedError("this is no JPEG"), 8)])
    (letter,) = log.dead_letters()
    assert (letter.kind, letter.stage, letter.value, letter.camera_id) == ("rejected", "ingest", b"no image", "front")
    assert letter.origin.startswith("folder:front/x.jpg@")
    assert log.state("front").frames == 0


async def test_a_large_rejected_file_is_a_claim(one, log):
    data = b"x" * 300_000
    await one.append("front", [await one.reject(submission()._replace(data=data), core.RejectedError("x"), 300_000)])
    (letter,) = log.dead_letters()
    assert letter.value is None
    assert letter.claim.startswith("sha256:")


async def test_the_end_of_a_stream_is_appended_every_time(one, log):
    for _ in range(2):
        await one.append("front", [one.end_of_stream("front")])
    assert log.ticks() == [Tick(int(NOW * 1000), "front")] * 2
    assert log.records[0].key == b"front"


async def test_cameras(one):
    assert (await one.camera("front", create=False)).camera_id == "front"
    with pytest.raises(core.UnknownCameraError, match="rewatch camera add back"):
        await one.camera("back", create=False)
    assert (await one.camera("back", create=True)).camera_id == "back"
    with pytest.raises(core.RejectedError):
        await one.camera("../x", create=True)


async def test_a_camera_that_cannot_be_added_now(log, tmp_path):
    class Away(MemoryCameras):
        async def ensure(self, camera_id):
            raise UncertainError(camera_id)

    with pytest.raises(UnavailableError, match="cannot be added now"):
        await appenders(log, tmp_path, cameras=Away()).camera("front", create=True)


async def test_a_bad_time_zone_names_the_fix(log, tmp_path):
    one = appenders(log, tmp_path, cameras=MemoryCameras("front", time_zone="Mars/Olympus"))
    with pytest.raises(UnavailableError, match="rewatch camera set front --time-zone"):
        await one.prepare(submission())


async def test_stopping_finishes_the_transaction_in_hand_and_refuses_the_rest(log, tmp_path):
    one = appenders(log, tmp_path)
    entries = [await one.prepare(submission(shade)) for shade in (1, 2)]
    reached, go = asyncio.Event(), asyncio.Event()
    way_in = one._log.camera

    def slow(camera):
        made = way_in(camera)
        commit = made.commit

        async def wait(emits):
            reached.set()
            await go.wait()
            await commit(emits)

        made.commit = wait
        return made

    log.camera = slow
    first = asyncio.create_task(one.append("front", entries[:1]))
    await reached.wait()
    second = asyncio.create_task(one.append("front", entries[1:]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(one.close())
    await asyncio.sleep(0)
    go.set()
    await closing
    assert (await first)[0].status == "accepted"
    with pytest.raises(UnavailableError, match="stopping"):
        await second
    with pytest.raises(UnavailableError, match="stopping"):
        await one.append("front", entries[1:])
    assert once(log, 1)


async def test_a_caller_that_went_away_holds_nobody_up(one, log):
    entries = [await one.prepare(submission(shade)) for shade in (1, 2)]
    gone = asyncio.create_task(one.append("front", entries[:1]))
    await asyncio.sleep(0)
    gone.cancel()
    await one.append("front", entries[1:])
    assert once(log, len(log.frames()))
    await one.append("front", entries)
    assert once(log, 2)


@pytest.mark.real
@pytest.mark.asyncio(loop_scope="session")
async def test_on_kafka_a_second_replica_fences_the_first(kafka, tmp_path):
    from aiokafka import TopicPartition

    from processors.ingest.appender import Appenders
    from processors.ingest.kafka_log import KafkaLog
    from processors.ingest.settings import IngestSettings
    from streams import codec
    from streams.claims import ClaimStore
    from streams.topics import partition_of

    def replica():
        log = KafkaLog(kafka, "e1")
        return Appenders(log, MemoryCameras("front"), ClaimStore(str(tmp_path / "images")), IngestSettings())

    first, second = replica(), replica()
    try:
        assert [r.status for r in await send(first, 1, 2)] == ["accepted", "accepted"]
        assert [r.status for r in await send(second, 2, 3)] == ["known", "accepted"]
        assert [r.status for r in await send(first, 3, 4)] == ["known", "accepted"]
        await first.append("front", [first.end_of_stream("front")])
    finally:
        await first.close()
        await second.close()
    tp = TopicPartition("frames", partition_of("front", kafka.settings.partitions))
    records: list[Incoming] = [r for r in await kafka.read([tp]) if r.key == b"front"]
    frames = [codec.decode(record, Frame) for record in records if record.value is not None]
    expected = [(await first.prepare(submission(shade))).name for shade in (1, 2, 3, 4)]
    assert [frame.frame_id for frame in frames][-4:] == expected
    assert Counter(frame.frame_id for frame in frames)[expected[0]] == 1
    assert Tick.of(records[-1]).camera_id == "front"
