"""`rewatch ingest snapshot` and `ingest video`: what a person types and reads; on the real broker, twice."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiokafka import TopicPartition

from infra.cli.ingest import PASSWORD
from infra.config import ConfigError, Settings, load
from schemas.records import DeadLetter, Frame, IngestState
from streams import codec
from streams.admin import read_meta
from streams.kafka import Kafka
from streams.messages import Tick
from streams.topics import partition_of
from tests.infra.cli_kit import answer, invoke
from tests.processors.camera_kit import Camera, camera, picture, with_digest
from tests.processors.ingest_kit import jpeg
from tests.processors.video_kit import cut, record


@contextmanager
def served() -> Iterator[Camera]:
    """A camera in a thread of its own, for commands that run a loop of theirs."""
    there: list[Camera] = []
    ready = threading.Event()
    ended = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with camera() as one:
            there.append(one)
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    try:
        yield there[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


def on_the_log(settings: Settings, name: str) -> tuple[list[Frame], list[Tick], IngestState, list[DeadLetter]]:
    """What is on the real log of a camera: frames, ends of stream, its memory, dead letters."""

    async def read():
        kafka = Kafka(settings.kafka)
        partition = partition_of(name, settings.kafka.partitions)
        metas = await read_meta(kafka)
        found = {}
        for topic in ("frames", "ingest_state", "dead_letters"):
            records = await kafka.read([TopicPartition(topic, partition)], epoch=metas[topic].epoch)
            found[topic] = [r for r in records if r.key == name.encode() or topic == "dead_letters"]
        frames = [codec.decode(record, Frame) for record in found["frames"] if record.value is not None]
        ticks = [Tick.of(record) for record in found["frames"] if record.value is None]
        letters = [codec.decode(record, DeadLetter) for record in found["dead_letters"]]
        letters = [letter for letter in letters if letter.camera_id == name]
        return frames, ticks, codec.decode(found["ingest_state"][-1], IngestState), letters

    return asyncio.run(read())


@pytest.mark.real
def test_snapshots_end_to_end_twice_are_the_same_frames(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # at which httpx tells each address with what it holds
    monkeypatch.setenv(PASSWORD, "hunter2")
    name = "yard-snapshots"
    with served() as cam:
        url = f"{cam.url}/snap.jpg?token=topsecret"
        command = ("ingest", "snapshot", url, "--camera", name, "--user", "admin", "--every", "50ms", "--count")
        shots = [jpeg(1), jpeg(2, size=(640, 480)), jpeg(3)]
        protected = [with_digest(picture(shot, etag=f'"{n}"'), "admin", "hunter2") for n, shot in enumerate(shots)]
        cam.says(protected[0], protected[0], protected[1], protected[1], protected[2])
        done = answer(*command, "4")
        assert (done["accepted"], done["unchanged"], done["failed"]) == (3, 1, 0)
        cam.says(*protected)
        again = invoke("--verbose", *command, "3")
        assert again.exit_code == 0
        assert "0 taken, 3 unchanged" in again.output
        cam.says(b"<html>token=topsecret</html>")
        rejected = invoke(*command, "1")
        assert rejected.exit_code == 1
        assert "1 rejected" in rejected.output
    frames, ticks, state, letters = on_the_log(settings, name)
    assert [frame.image for frame in frames] == shots
    assert {frame.source for frame in frames} == {"snapshot"}
    assert ticks == []
    assert (state.frames, state.unchanged) == (3, 4)
    told = again.output + again.stderr + rejected.output + rejected.stderr + repr(frames) + repr(letters)
    told += caplog.text
    assert "hunter2" not in told
    assert "topsecret" not in told
    assert len(letters) == 1


@pytest.mark.real
def test_a_recording_end_to_end_twice_is_the_same_frames(settings: Settings, tmp_path: Path) -> None:
    name = "yard-video"
    clip = record(tmp_path / "clip.mp4", created="2026-11-21T09:00:00.000000Z")
    command = ("ingest", "video", str(clip), "--camera", name, "--fps", "5")
    first = invoke(*command)
    assert first.exit_code == 0, first.output
    assert first.stdout == (
        "10 taken, 0 known, 0 rejected\nit began at 2026-11-21 09:00:00.000+00:00, by the container's creation_time\n"
    )
    assert answer(*command)["known"] == 10
    for cursor in (settings.data_dir / "playback").iterdir():
        cursor.unlink()
    assert answer(*command)["known"] == 10  # by their ids
    broken = invoke("ingest", "video", str(cut(clip, 0.2)), "--camera", name)
    assert broken.exit_code == 2
    assert "is no video, or is cut off" in broken.stderr
    frames, ticks, state, letters = on_the_log(settings, name)
    assert [frame.source_name for frame in frames] == [f"clip.mp4#t={n / 5:.3f}" for n in range(10)]
    assert {tick.camera_id for tick in ticks if tick is not None} == {name}
    assert len(ticks) == 3
    assert (state.frames, letters) == (10, [])


@pytest.mark.real
def test_ctrl_c_ends_the_watch_in_order(settings: Settings) -> None:
    assert settings.kafka.system
    with served() as cam:

        def interrupt(_: object) -> object:
            if len(cam.asked) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return picture(jpeg(len(cam.asked)))(cam.asked[-1])

        cam.says(interrupt)
        result = invoke("ingest", "snapshot", f"{cam.url}/x.jpg", "--camera", "yard-interrupted", "--every", "50ms")
    assert result.exit_code == 0, result.output
    assert "0 rejected, 0 failed" in result.output


@pytest.mark.real
def test_a_camera_that_never_answered_is_a_service_that_is_away(settings: Settings) -> None:
    assert settings.kafka.system
    command = ("ingest", "snapshot", "http://127.0.0.1:9/x.jpg", "--camera", "yard-away")
    result = invoke(*command, "--for", "5s")
    assert result.exit_code == 3
    assert "error: http://127.0.0.1:9/x.jpg: cannot connect (Connection refused)" in result.stderr
    with served() as cam:
        cam.says(with_digest(picture(jpeg(1)), "admin", "hunter2"))
        result = invoke("ingest", "snapshot", f"{cam.url}/x.jpg", "--camera", "yard-away")
    assert result.exit_code == 2
    assert "it asks for a user and a password: give --user" in result.stderr


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("ftp://cam/x.jpg",), "no http:// or https:// address"),
        (("http://cam/x.jpg", "--every", "soon"), "--every 'soon' is no time: write 500ms"),
        (("http://cam/x.jpg", "--every", "1ms"), "--every: Input should be greater than or equal to 0.05"),
        (("http://cam/x.jpg", "--user", "admin"), "no password: set CAMERA_PASSWORD"),
        (("http://cam/x.jpg", "--user", "admin", "--password-env", "GATE"), "no password: set GATE"),
        (("http://admin:hunter2/@cam/x.jpg",), "no http:// or https:// address"),
    ],
)
def test_what_cannot_be_asked_for_names_the_option(
    options: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    result = invoke("ingest", "snapshot", "--camera", "yard", *options)
    assert result.exit_code == 2
    assert why in result.stderr
    assert "hunter2" not in result.output


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("dir", "nowhere", "--camera", "yard"), "nowhere is no directory"),
        (("dir", ".", "--camera", "yard"), "no .jpg or .jpeg file in ."),
        (("dir", ".", "--camera", "My Yard"), "'My Yard' is no camera id"),
        (("video", "nowhere.mp4", "--camera", "yard"), "'nowhere.mp4' does not exist"),
    ],
)
def test_a_wrong_path_is_told_before_a_broker_is_asked(
    command: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9")
    result = invoke("ingest", *command)
    assert result.exit_code == 2
    assert why in " ".join(result.stderr.replace("\u2502", "").split())


def test_help_shows_commands_that_can_be_typed() -> None:
    text = invoke("ingest", "snapshot", "--help").output
    assert "frigate:5000/api/driveway/latest.jpg" in text
    assert PASSWORD in text


def test_cameras_in_the_settings_keep_their_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "rewatch.yaml"
    file.write_text(
        "ingest:\n"
        "  snapshots:\n"
        "    gate: http://admin:hunter2@cam/snap.cgi?user=admin&password=hunter2\n"
        "    yard: {url: https://yard.lan/x.jpg, every_s: 2}\n"
    )
    monkeypatch.setenv("REWATCH_INGEST__SNAPSHOTS__YARD__USER", "admin")
    monkeypatch.setenv("REWATCH_INGEST__SNAPSHOTS__YARD__PASSWORD", "hunter2")
    yard = load().ingest.snapshots["yard"]
    assert (yard.address.user, yard.address.password, yard.every_s) == ("admin", "hunter2", 2)
    shown = {entry["setting"]: entry for entry in answer("config", "show")}
    assert shown["ingest.snapshots.gate.url"]["value"] == "http://cam/snap.cgi?..."
    assert shown["ingest.snapshots.yard.password"]["from"] == "REWATCH_INGEST__SNAPSHOTS__YARD__PASSWORD"
    assert shown["ingest.snapshots.yard.every_s"]["from"] == "rewatch.yaml"
    told = invoke("config", "show").output + invoke("config", "show", "--json").output + repr(load()) + caplog.text
    for wrong, hint in {
        "{url: 'http://admin:hunter2/@cam'}": "no http:// or https:// address",
        "{url: 'http://cam', pasword: hunter2}": r"did you mean ingest\.snapshots\.gate\.password\?",
        "{url: {hunter2: 1}}": "gate",
        "{url: 'http://cam', password: [hunter2]}": "gate",
        "[http://admin:hunter2@cam]": "gate",
    }.items():
        file.write_text(f"ingest:\n  snapshots:\n    gate: {wrong}\n")
        with pytest.raises(ConfigError, match=hint) as raised:
            load()
        told += str(raised.value)
    file.write_text("ingest:\n  snapshots: http://admin:hunter2@cam\n")
    with pytest.raises(ConfigError, match="snapshots") as raised:
        load()
    assert "hunter2" not in told + str(raised.value)
