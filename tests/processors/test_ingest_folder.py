"""The watched folder: every file is taken once, when it is whole, and never missed."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from processors.ingest import folder as folder_module
from processors.ingest.cursor import Cursor, Mark
from processors.ingest.fakes import MemoryCameras, MemoryLog
from processors.ingest.folder import Folder
from processors.ingest.settings import FolderSettings
from streams.errors import UnavailableError
from tests.processors.ingest_kit import NOW, Clock, appenders, away, jpeg, png


class Inbox:
    """A folder under test: its files, its clocks, and processes that watch it."""

    def __init__(self, tmp_path: Path, log: MemoryLog) -> None:
        self.root = tmp_path / "inbox"
        self.log = log
        self.tmp_path = tmp_path
        self.clock = Clock()
        self.monotonic = Clock(1000.0)
        self.cameras = MemoryCameras()
        self.opened = []

    def put(self, name: str, data: bytes, *, age: float = 60.0) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.touch(path, age=age)
        return path

    def touch(self, path: Path, *, age: float) -> None:
        os.utime(path, (self.clock.at - age, self.clock.at - age))

    def watch(self, **settings) -> Folder:
        """A new process."""
        made = appenders(self.log, self.tmp_path, cameras=self.cameras, clock=self.clock)
        self.opened.append(made)
        return Folder(FolderSettings(root=self.root, **settings), made, clock=self.clock, monotonic=self.monotonic)

    def later(self, seconds: float) -> None:
        self.clock.at += seconds
        self.monotonic.at += seconds

    def names(self) -> list[str]:
        return [frame.source_name for frame in self.log.frames()]

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
async def inbox(tmp_path, log):
    made = Inbox(tmp_path, log)
    yield made
    for opened in made.opened:
        await opened.close()


async def test_files_dropped_while_it_was_down_are_taken_at_once_and_in_order(inbox):
    for shade in range(50):
        inbox.put(f"front/{shade:02}.jpg", jpeg(shade), age=1000 - shade)
    inbox.put("back/x.jpg", jpeg(99))
    await inbox.watch().sweep()
    front = [frame.source_name for frame in inbox.log.frames() if frame.camera_id == "front"]
    assert front == [f"{shade:02}.jpg" for shade in range(50)]
    assert len(inbox.log.frames()) == 51
    assert set(inbox.cameras.known) == {"front", "back"}
    assert len(inbox.files()) == 51
    assert all("/.done/2026-11-21/" in name for name in inbox.files())


async def test_order_is_capture_time_then_file_time_then_name(inbox):
    inbox.put("front/a.jpg", jpeg(1, exif={0x9003: "2026:11:21 11:50:00"}), age=60)
    inbox.put("front/b.jpg", jpeg(2), age=900)
    inbox.put("front/d.jpg", jpeg(3), age=60)
    inbox.put("front/c.jpg", jpeg(4), age=60)
    await inbox.watch().sweep()
    assert inbox.names() == ["b.jpg", "a.jpg", "c.jpg", "d.jpg"]


async def test_the_file_time_is_a_field_of_its_own(inbox):
    inbox.put("front/a.jpg", jpeg(1), age=60)
    await inbox.watch().sweep()
    (frame,) = inbox.log.frames()
    assert (frame.file_at, frame.arrived_at) == (int((NOW - 60) * 1000), int(NOW * 1000))
    assert (frame.captured_at, frame.captured_from) == (None, "none")


async def test_a_half_written_upload_is_taken_once_when_it_is_whole(inbox):
    data = jpeg(1)
    watched = inbox.watch()
    for end in (0, 1, 100, len(data) // 2, len(data) - 1):
        inbox.put("front/a.jpg", data[:end], age=0)
        await watched.sweep()
        inbox.later(5)  # its sender stalls for longer than stable_s
        await watched.sweep()
        assert inbox.log.records == [], end
    inbox.put("front/a.jpg", data, age=0)
    await watched.sweep()
    assert inbox.log.records == []  # still warm
    inbox.later(2)
    await watched.sweep()
    await watched.sweep()
    assert inbox.names() == ["a.jpg"]
    assert inbox.log.dead_letters() == []


async def test_a_file_that_stays_cut_off_is_rejected_in_the_end(inbox):
    inbox.put("front/a.jpg", jpeg(1)[:-30], age=0)
    watched = inbox.watch()
    await watched.sweep()
    inbox.later(59)
    await watched.sweep()
    assert inbox.log.records == []
    inbox.later(1)
    await watched.sweep()
    (letter,) = inbox.log.dead_letters()
    assert "cut off" in letter.message
    assert inbox.files() == ["front/.rejected/a.jpg", "front/.rejected/a.jpg.reason.txt"]


async def test_a_file_with_a_time_to_come_is_taken_when_it_stood_still(inbox):
    inbox.put("front/a.jpg", jpeg(1), age=-86_400)
    watched = inbox.watch()
    await watched.sweep()
    assert inbox.names() == []
    inbox.later(2)
    await watched.sweep()
    assert inbox.names() == ["a.jpg"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (png(), "PNG"), (b"MZ junk", "no JPEG"), (jpeg(1)[:-9], "cut off")],
)
async def test_rejects_leave_with_a_reason_beside_them(inbox, data, reason):
    inbox.put("front/sub/x.jpg", data, age=100)
    inbox.put("front/y.jpg", jpeg(2), age=100)
    await inbox.watch().sweep()
    (letter,) = inbox.log.dead_letters()
    assert (letter.kind, letter.value, letter.key) == ("rejected", data, b"front")
    assert reason in letter.message
    assert reason in (inbox.root / "front/.rejected/sub/x.jpg.reason.txt").read_text()
    assert (inbox.root / "front/.rejected/sub/x.jpg").read_bytes() == data
    assert inbox.names() == ["y.jpg"]


async def test_a_bomb_and_a_huge_file_are_rejected(inbox):
    whole = jpeg(1)
    at = whole.index(b"\xff\xc0") + 5
    inbox.put("front/bomb.jpg", whole[:at] + b"\xff\xdc\xff\xdc" + whole[at + 4 :])
    inbox.put("front/huge.jpg", bytes(10_000_001))
    await inbox.watch().sweep()
    letters = {json.loads(letter.detail)["name"]: letter for letter in inbox.log.dead_letters()}
    assert "ingest.max_pixels" in letters["bomb.jpg"].message
    assert "ingest.max_bytes" in letters["huge.jpg"].message
    assert json.loads(letters["huge.jpg"].detail)["size"] == 10_000_001
    assert (inbox.root / "front/.rejected/huge.jpg").exists()


async def test_the_same_file_twice_is_one_frame(inbox):
    watched = inbox.watch()
    for name in ("a.jpg", "a.jpg", "b.jpg"):
        inbox.put(f"front/{name}", jpeg(1))
        await watched.sweep()
    assert inbox.names() == ["a.jpg"]
    assert inbox.files() == [
        "front/.done/2026-11-21/a.jpg",
        "front/.done/2026-11-21/a~2.jpg",
        "front/.done/2026-11-21/b.jpg",
    ]


async def test_a_name_used_again_for_another_image_is_another_frame(inbox):
    watched = inbox.watch(after="leave")
    for shade in (1, 2):
        inbox.put("front/latest.jpg", jpeg(shade), age=100 - shade)
        await watched.sweep()
    assert len(inbox.log.frames()) == 2


@pytest.mark.parametrize("step", ["open", "commit", "committed"])
@pytest.mark.parametrize("after", ["move", "delete", "leave"])
async def test_killed_between_append_and_move_takes_it_once(inbox, step, after):
    inbox.put("front/a.jpg", jpeg(1))
    inbox.put("front/b.jpg", png())

    def die(at):
        if at == step:
            raise RuntimeError("killed")

    inbox.log.fault = die
    await inbox.watch(after=after).sweep()
    inbox.log.fault = lambda _: None
    assert (inbox.root / "front/a.jpg").exists()
    await inbox.watch(after=after).sweep()
    await inbox.watch(after=after).sweep()
    assert inbox.names() == ["a.jpg"]
    assert len(inbox.log.dead_letters()) == 1


async def test_a_move_that_fails_is_tried_again_and_doubles_nothing(inbox, monkeypatch):
    inbox.put("front/a.jpg", jpeg(1))
    watched = inbox.watch()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        await watched.sweep()
    assert watched.waiting_on == {"front": "folder"}
    inbox.later(60)
    await watched.sweep()
    assert watched.waiting_on == {}
    assert inbox.names() == ["a.jpg"]
    assert inbox.files() == ["front/.done/2026-11-21/a.jpg"]


async def test_a_read_only_folder_is_not_taken_and_says_what_to_set(inbox, monkeypatch):
    inbox.put("front/a.jpg", jpeg(1))
    inbox.put("back/a.jpg", jpeg(2))
    access = os.access
    monkeypatch.setattr(
        folder_module.os,
        "access",
        lambda path, mode: access(path, mode) and Path(path).name != "front",
    )
    watched = inbox.watch()
    await watched.sweep()
    assert [frame.camera_id for frame in inbox.log.frames()] == ["back"]
    assert watched.waiting_on == {"front": "folder"}


async def test_a_read_only_folder_can_be_left_with_a_cursor_elsewhere(inbox, tmp_path):
    inbox.put("front/a.jpg", jpeg(1))
    for _ in range(2):
        await inbox.watch(after="leave", cursor=tmp_path / "state/cursor").sweep()
    assert inbox.files() == ["front/a.jpg"]
    assert inbox.names() == ["a.jpg"]
    assert inbox.log.state("front").unchanged == 0


async def test_an_unreadable_file_holds_no_other_up(inbox, monkeypatch):
    inbox.put("front/a.jpg", jpeg(1), age=50)
    inbox.put("front/b.jpg", jpeg(2))
    read = folder_module.read_unchanged

    def refuse(path, mark, limit):
        if path.name == "a.jpg":
            raise PermissionError(13, "Permission denied")
        return read(path, mark, limit)

    watched = inbox.watch()
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "read_unchanged", refuse)
        await watched.sweep()
    assert inbox.names() == ["b.jpg"]
    inbox.later(60)
    await watched.sweep()
    assert inbox.names() == ["b.jpg", "a.jpg"]


async def test_delete(inbox):
    inbox.put("front/a.jpg", jpeg(1))
    inbox.put("front/b.jpg", png())
    await inbox.watch(after="delete").sweep()
    assert inbox.files() == ["front/.rejected/b.jpg", "front/.rejected/b.jpg.reason.txt"]


async def test_leave_takes_each_file_once_over_restarts(inbox):
    for shade in range(3):
        inbox.put(f"front/{shade}.jpg", jpeg(shade), age=100 - shade)
        inbox.put("front/bad.jpg", png())
        await inbox.watch(after="leave").sweep()
    assert inbox.names() == ["0.jpg", "1.jpg", "2.jpg"]
    assert len(inbox.log.dead_letters()) == 1
    assert inbox.log.state("front").unchanged == 0
    assert inbox.files() == [".rewatch-cursor", "front/0.jpg", "front/1.jpg", "front/2.jpg", "front/bad.jpg"]


async def test_leave_takes_all_again_for_another_log(inbox):
    inbox.put("front/a.jpg", jpeg(1))
    await inbox.watch(after="leave").sweep()
    inbox.log = MemoryLog("memory:2")
    await inbox.watch(after="leave").sweep()
    assert inbox.names() == ["a.jpg"]


async def test_what_is_no_image_of_a_camera_stays(inbox, tmp_path):
    inbox.put("front/movie.MP4", b"x")
    inbox.put("front/a.jpg.part", jpeg(1))
    inbox.put("front/.hidden.jpg", jpeg(1))
    inbox.put("front/.git/x.jpg", jpeg(1))
    inbox.put("Front Door/a.jpg", jpeg(1))
    inbox.put("a.jpg", jpeg(1))
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(5))
    (inbox.root / "front/link.jpg").symlink_to(secret)
    (inbox.root / "front/away").symlink_to(tmp_path)
    os.mkfifo(inbox.root / "front/pipe.jpg")
    before = inbox.files()
    await inbox.watch().sweep()
    assert inbox.files() == before
    assert inbox.log.records == []


async def test_folders_can_be_mapped_to_cameras(inbox, tmp_path):
    inbox.put("Front Door/2026/11/a.jpg", jpeg(1))
    inbox.put("root.jpg", jpeg(2))
    (tmp_path / "mount").mkdir()
    (inbox.root / "garage").symlink_to(tmp_path / "mount")
    inbox.put("garage/c.jpg", jpeg(3))
    await inbox.watch(cameras={"Front Door": "front-door", ".": "yard"}).sweep()
    assert {(f.camera_id, f.source_name) for f in inbox.log.frames()} == {
        ("front-door", "2026/11/a.jpg"),
        ("yard", "root.jpg"),
        ("garage", "c.jpg"),
    }
    assert (inbox.root / "Front Door/.done/2026-11-21/2026/11/a.jpg").exists()
    assert (inbox.root / ".done/2026-11-21/root.jpg").exists()
    with pytest.raises(ValidationError, match=r"ingest\.folder\.cameras"):
        FolderSettings(cameras={"x": "../etc"})


async def test_an_unknown_camera_waits_until_it_is_added(inbox):
    inbox.put("front/a.jpg", jpeg(1))
    watched = inbox.watch(auto_create=False)
    await watched.sweep()
    assert watched.waiting_on == {"front": "settings"}
    await inbox.cameras.ensure("front")
    inbox.later(60)
    await watched.sweep()
    assert inbox.names() == ["a.jpg"]
    assert watched.waiting_on == {}


async def test_an_away_broker_leaves_the_files_where_they_are(inbox):
    inbox.put("front/a.jpg", jpeg(1))

    inbox.log.fault = away()
    watched = inbox.watch()
    for _ in range(3):
        await watched.sweep()
        inbox.later(60)
    assert watched.waiting_on == {"front": "broker"}
    assert inbox.files() == ["front/a.jpg"]
    inbox.log.fault = lambda _: None
    await watched.sweep()
    assert inbox.names() == ["a.jpg"]


async def test_a_file_replaced_while_it_is_taken_is_taken_too(inbox):
    path = inbox.put("front/a.jpg", jpeg(1))

    def replace(step):
        if step == "commit":
            inbox.log.fault = lambda _: None
            inbox.put("front/a.jpg", jpeg(2), age=30)

    inbox.log.fault = replace
    watched = inbox.watch()
    await watched.sweep()
    assert path.exists()
    await watched.sweep()
    assert len(inbox.log.frames()) == 2
    assert inbox.files() == ["front/.done/2026-11-21/a.jpg"]


async def test_a_root_that_cannot_be_made_is_waited_for(inbox):
    inbox.root.parent.mkdir(exist_ok=True)
    inbox.root.write_text("a file")
    watched = inbox.watch()
    await watched.sweep()
    assert watched.waiting_on == {"": "folder"}
    inbox.root.unlink()
    await watched.sweep()
    assert watched.waiting_on == {}
    assert inbox.root.is_dir()


@pytest.mark.parametrize("polling", [False, True], ids=["events", "polling"])
async def test_files_that_come_while_it_runs(inbox, polling):
    made = appenders(inbox.log, inbox.tmp_path, cameras=inbox.cameras)
    settings = FolderSettings(root=inbox.root, stable_s=0.01, polling=polling, poll_s=0.05, rescan_s=3600)
    stop = asyncio.Event()
    running = asyncio.create_task(Folder(settings, made).run(stop))
    async with asyncio.timeout(20):
        for shade, name in enumerate(("front/a.jpg", "front/b.jpg", "new/deep/c.jpg")):
            inbox.put(name, jpeg(shade), age=0)
            await inbox.log.until(shade + 1)
        stop.set()
        await running
    await made.close()
    assert inbox.names() == ["a.jpg", "b.jpg", "deep/c.jpg"]


async def test_events_alone_are_enough(inbox, log):
    """After the second scan only events say that something came."""
    inbox.root.mkdir(parents=True)
    made = appenders(log, inbox.tmp_path, cameras=inbox.cameras)
    settings = FolderSettings(root=inbox.root, stable_s=0.01, poll_s=0.05, rescan_s=3600)
    watched = Folder(settings, made)
    scans = []
    scan = watched._scan

    async def counted():
        await scan()
        scans.append(len(scans))
        if len(scans) == 2:
            second.set()

    second = asyncio.Event()
    watched._scan = counted
    stop = asyncio.Event()
    running = asyncio.create_task(watched.run(stop))
    async with asyncio.timeout(20):
        await second.wait()
        inbox.put("front/a.jpg", jpeg(1), age=0)
        await log.until(1)
        stop.set()
        await running
    await made.close()


class TestCursor:
    def test_marks_last(self, tmp_path):
        marks = [Mark("front/a.jpg", 1, 2), Mark("fr\udcffont/b.jpg", 3, 4), Mark("new\nline", 5, 6)]
        Cursor(tmp_path / "c", "log", "x").add(marks)
        again = Cursor(tmp_path / "c", "log", "x")
        assert all(mark in again for mark in marks)
        assert Mark("front/a.jpg", 1, 3) not in again

    def test_a_line_cut_off_by_a_crash_is_dropped(self, tmp_path):
        Cursor(tmp_path / "c", "log", "x").add([Mark("a", 1, 2), Mark("b", 3, 4)])
        data = (tmp_path / "c").read_bytes()
        (tmp_path / "c").write_bytes(data[:-4])
        again = Cursor(tmp_path / "c", "log", "x")
        assert Mark("a", 1, 2) in again
        assert Mark("b", 3, 4) not in again
        again.add([Mark("c", 5, 6)])
        assert len(Cursor(tmp_path / "c", "log", "x")) == 2

    def test_a_write_that_failed_half_way_spoils_no_later_one(self, tmp_path):
        cursor = Cursor(tmp_path / "c", "log", "x")
        with (tmp_path / "c").open("ab") as out:
            out.write(b'["a", 1')  # the disk was full
        cursor.add([Mark("b", 3, 4)])
        assert Mark("b", 3, 4) in Cursor(tmp_path / "c", "log", "x")

    def test_another_log_starts_afresh(self, tmp_path):
        Cursor(tmp_path / "c", "log", "x").add([Mark("a", 1, 2)])
        assert len(Cursor(tmp_path / "c", "other", "x")) == 0

    def test_files_that_are_gone_are_forgotten(self, tmp_path):
        cursor = Cursor(tmp_path / "c", "log", "x")
        cursor.add([Mark("a", 1, 2), Mark("b", 3, 4)])
        cursor.keep([Mark("b", 3, 4), Mark("never", 0, 0)])
        assert len(Cursor(tmp_path / "c", "log", "x")) == 1

    def test_where_it_cannot_be_kept_the_setting_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UnavailableError, match=r"ingest\.folder\.cursor"):
            Cursor(tmp_path / "file/c", "log", "ingest.folder.cursor")


async def test_a_name_that_is_not_utf_8_ends_no_watching(inbox, log):
    """`watchfiles` cannot tell of such a name and ends; what comes after it must not wait for the next look around."""
    inbox.root.mkdir(parents=True)
    made = appenders(log, inbox.tmp_path, cameras=inbox.cameras)
    watched = Folder(FolderSettings(root=inbox.root, stable_s=0.01, poll_s=0.05, rescan_s=3600), made)
    stop = asyncio.Event()
    running = asyncio.create_task(watched.run(stop))
    odd = os.fsdecode(b"caf\xe9.jpg")
    async with asyncio.timeout(20):
        for count, name in enumerate(("first.jpg", odd, "second.jpg", f"again-{odd}", "last.jpg"), start=1):
            inbox.put(f"cam/{name}", jpeg(count), age=0)
            await log.until(count)
        stop.set()
        await running
    await made.close()
    assert inbox.names() == ["first.jpg", "caf?.jpg", "second.jpg", "again-caf?.jpg", "last.jpg"]


async def test_what_only_looks_like_a_file_is_left_and_said(inbox, tmp_path, capsys):
    inbox.put("cam/good.jpg", jpeg())
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    (inbox.root / "cam" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(inbox.root / "cam" / "pipe.jpg")
    await inbox.watch().sweep()
    assert inbox.names() == ["good.jpg"]
    said = capsys.readouterr().out
    assert "link.jpg is no file" in said
    assert "pipe.jpg is no file" in said
