"""The files of a backup: whole or refused, byte by byte; in a directory and in an object store. No server runs."""

import hashlib
import json
from itertools import permutations
from pathlib import Path

import msgspec
import pytest

from infra.backup import manifest as manifests
from infra.backup.check import check
from infra.backup.cut import Look
from infra.backup.history import History, Life
from infra.backup.looking import Seen
from infra.backup.make import DivergedError, _Backup
from infra.backup.manifest import Manifest, ManifestError
from infra.backup.packs import Kept, Pack, Packer, PackError, claims_of, read_part
from infra.backup.passes import Marks, Pass, read_marks, write_marks
from infra.backup.refill import runs
from infra.backup.target import Target
from infra.config import Settings
from schemas.records import TopicMeta
from streams.errors import UnavailableError
from streams.messages import Incoming
from tests.infra.cli_kit import answer, invoke

IMAGE = b"\xff\xd8 an image"
SHA256 = hashlib.sha256(IMAGE).hexdigest()


def record(offset: int, value: bytes | None = b"v") -> Kept:
    return Kept(Incoming("frames", "e1", 0, offset, b"k", value, (("fp", b"\xff"), ("fp", b""))), None, offset, "odd")


MARKS = [Marks("frames", "e1", 0, "low", 1_780_000_000_000, [1, 2, 5]), Marks("labels", "e1", 1, "low", 5, [9])]


def made(root: str) -> tuple[Target, Manifest]:
    """A small backup: two parts, an image, a pass of the collector."""
    target = Target(root)
    packer = Packer(target, "history")
    packer.add([record(3), record(4, None)], [SHA256])
    packer.add([record(9)])
    packer.flush()
    tail = Packer(target, "tail")
    tail.add([record(12)])
    tail.flush()
    target.put(manifests.image_name(SHA256), IMAGE)
    file, sha256, size = write_marks(target, "p1", MARKS)
    pass_ = {"name": "p1", "owner": "here", "started_at": 1, "state": "done", "records": 4, "images": 0, "at": 2}
    manifest = Manifest(
        made_at=1_780_000_000_000,
        version="1",
        partitions=4,
        topics=(),
        starts={"frames": {0: 3}},
        positions={"sink": {"frames": {0: 10}}},
        history=tuple(packer.packs),
        tail=tuple(tail.packs),
        passes=(Pass(**pass_, file=file, sha256=sha256, size=size),),
        images=1,
        missing=(),
    )
    manifests.write(target, manifest)
    return target, manifests.read(target)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_is_written_is_read_again_from_a_directory_and_from_an_object_store(scheme: str, tmp_path: Path) -> None:
    target, manifest = made(f"{scheme}{tmp_path}")
    [pack] = manifest.history
    assert [part.lo for part in pack.parts] == [3, 9]
    assert read_part(target, pack, pack.parts[0]) == [record(3), record(4, None)]
    assert read_part(target, pack, pack.parts[1]) == [record(9)]
    assert list(claims_of(target, pack)) == [SHA256]
    found = check(target)
    assert (found.wrong, found.files, found.images) == (0, 6, 1)
    assert list(read_marks(target, manifest.passes[0])) == MARKS
    assert sorted(target.names("tail")) == sorted(name for name in target.names("tail") if target.exists(name))
    target.remove(manifest.tail[0].name)
    assert [one.what for one in check(target).problems] == ["is missing"]


def test_one_flipped_bit_in_any_file_is_named(tmp_path: Path) -> None:
    target, manifest = made(str(tmp_path))
    for name in (*manifest.files, manifests.image_name(SHA256)):
        path = tmp_path / name
        good = path.read_bytes()
        if not good:
            continue
        for at in {0, len(good) // 2, len(good) - 1}:
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            assert [one.file for one in check(target).problems][:1] == [name]
        path.write_bytes(good)
    path = tmp_path / manifests.NAME
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        if good[at : at + 1].isspace():
            continue
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ManifestError, match=r"damaged|newer"):
            manifests.read(target)


def test_without_a_manifest_there_is_no_backup_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    target, manifest = made(str(tmp_path / "made"))
    target.remove(manifests.NAME)
    with pytest.raises(ManifestError, match="begun here and not finished: run it again"):
        check(target)
    with pytest.raises(ManifestError, match="no backup is here"):
        check(Target(str(tmp_path / "nowhere")))
    newer = msgspec.json.encode({"format": manifest.format + 1})
    target.put(manifests.NAME, newer)
    with pytest.raises(ManifestError, match="newer version"):
        check(target)


def test_a_part_that_is_not_what_the_manifest_says_is_refused(tmp_path: Path) -> None:
    target, manifest = made(str(tmp_path))
    [pack] = manifest.history
    target.put(pack.name, target.read(pack.name)[::-1])
    with pytest.raises(PackError, match="frames-0 from 3"):
        read_part(target, pack, pack.parts[0])


def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    target, _ = made(str(tmp_path))

    def half(out: object) -> None:
        raise OSError(28, "No space left on device")

    before = target.read(manifests.NAME)
    with pytest.raises(UnavailableError, match=r"cannot write the backup at .*: .*No space left") as told:
        target.write(manifests.NAME, half)
    assert told.value.waiting_on == "disk"
    assert target.read(manifests.NAME) == before
    (tmp_path / "history" / ".part-x").write_bytes(b"of one that was killed")
    target.sweep()
    assert not list(tmp_path.rglob(".part-*"))


def test_verify_needs_no_server_and_a_torn_backup_is_not_restored(tmp_path: Path) -> None:
    made(str(tmp_path))
    found = answer("backup", "verify", str(tmp_path))
    assert (found["whole"], found["records"], found["images"]) == (True, 4, 1)
    assert "6 files are as they were written" in invoke("backup", "verify", str(tmp_path)).output
    (tmp_path / manifests.image_name(SHA256)).unlink()
    result = invoke("backup", "verify", str(tmp_path))
    assert result.exit_code == 1
    assert f"{SHA256} is missing" in result.stderr
    result = invoke("restore", str(tmp_path))
    assert result.exit_code == 1
    assert "nothing was restored: the backup is not whole" in result.stderr
    (tmp_path / manifests.NAME).unlink()
    result = invoke("restore", str(tmp_path))
    assert result.exit_code == 1
    assert "run it again, it goes on" in result.stderr


def test_where_nothing_was_recorded_there_is_nothing_to_back_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "empty"))
    result = invoke("backup", str(tmp_path / "backup"))
    assert result.exit_code == 2
    assert "nothing was recorded" in result.stderr


def test_records_become_runs_with_the_holes_behind_them() -> None:
    offsets = [3, 4, 5, 7, 8, 12, *range(13, 1300)]
    found = list(runs(record(offset).record for offset in offsets))
    assert [run.hole for run in found[:2]] == [1, 3]
    assert [one.offset for run in found for one in run.records] == offsets
    assert all(run.hole == 0 for run in found[2:])
    assert max(len(run.records) for run in found) == 500


def pack_of(target: Target, *spans: tuple[int, int, int], epoch: str = "e1") -> Pack:
    """A pack that was written: of each partition the first and the last offset."""
    packer = Packer(target, "history")
    for partition, lo, hi in spans:
        packer.add([Kept(Incoming("frames", epoch, partition, at, b"k", b"v", ())) for at in range(lo, hi + 1)])
    packer.flush()
    [pack] = packer.packs
    return pack


def test_packs_of_a_killed_backup_are_taken_over_in_their_order_or_not_at_all(tmp_path: Path) -> None:
    target = Target(str(tmp_path))
    packs = [
        pack_of(target, (0, 0, 9), (1, 0, 5)),
        pack_of(target, (1, 6, 9)),
        pack_of(target, (0, 12, 13), (1, 10, 11)),
    ]
    for found in permutations(packs):
        making = _Backup(Settings(), target, print)
        making._adopt(found)
        assert making._packs == packs
        assert making._reached == {("frames", "e1", 0): 13, ("frames", "e1", 1): 11}
    other = pack_of(target, (1, 3, 8))
    for found in permutations([*packs, other]):
        making = _Backup(Settings(), target, print)
        making._adopt(found)
        assert (making._packs, making._reached) == ([], {})


async def test_packs_and_backups_of_another_installation_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lives(_: History) -> dict[Life, int]:
        return {("frames", "e1", 0): 9}

    monkeypatch.setattr(History, "lives", lives)
    target = Target(str(tmp_path))
    meta = TopicMeta(topic="labels", epoch="e5", status="ready", partitions=4, created_at=0)
    seen = Seen(Look({"labels": meta}, {}, {}), [], {})
    ours, theirs = pack_of(target, (0, 0, 9)), pack_of(target, (0, 0, 9), epoch="e2")
    await _Backup(Settings(), target, print)._refuse_others(seen, [ours])
    with pytest.raises(DivergedError, match="of another installation"):
        await _Backup(Settings(), target, print)._refuse_others(seen, [ours, theirs])

    async def none(_: History) -> dict[Life, int]:
        return {}

    _, before = made(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(History, "lives", none)
        with pytest.raises(DivergedError, match="of another installation"):
            await _Backup(Settings(), target, print)._refuse_others(seen, [])
        manifests.write(target, msgspec.structs.replace(before, topics=(meta,)))
        await _Backup(Settings(), target, print)._refuse_others(seen, [])


def test_what_another_writes_into_an_object_store_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target, before = made(f"memory://{tmp_path}")
    making = _Backup(Settings(), target, print)
    another, mine = Packer(target, "tail/another"), Packer(target, "tail/mine")
    for packer in (another, mine):
        packer.add([record(12), record(13)])
        packer.flush()
    now = manifests.write(target, msgspec.structs.replace(before, tail=tuple(mine.packs)))
    making._forget_tail(now)
    assert {name.rpartition("/")[0] for name in target.names("tail")} == {"tail/another", "tail/mine"}
    assert check(target).wrong == 0


def test_a_backup_without_images_that_its_records_name_is_not_called_whole(tmp_path: Path) -> None:
    target, manifest = made(str(tmp_path))
    target.remove(manifests.image_name(SHA256))
    manifests.write(target, msgspec.structs.replace(manifest, missing=(SHA256,)))
    result = invoke("backup", "verify", str(tmp_path))
    assert result.exit_code == 1
    assert "1 images are not among them" in result.stderr
    assert "whole" not in result.output
    result = invoke("backup", "verify", str(tmp_path), "--json")
    assert (result.exit_code, json.loads(result.stdout)["whole"]) == (1, False)


def test_a_backup_is_always_whole(tmp_path: Path) -> None:
    result = invoke("backup", str(tmp_path), "--since", "30d")
    assert result.exit_code == 2
    assert "No such option" in result.stderr
