"""Claim checks: bytes by their content's name, and nothing else by any name."""

import hashlib
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from streams.claims import ClaimStore
from streams.errors import UnavailableError, UnprocessableError

DATA = b"a picture"
SHA256 = hashlib.sha256(DATA).hexdigest()


async def test_stored_bytes_come_back_by_their_claim(tmp_path: Path) -> None:
    store = ClaimStore(str(tmp_path / "images"))
    claim = await store.put(DATA)
    assert claim == f"sha256:{SHA256}"
    assert await store.get(claim, SHA256) == DATA


async def test_the_same_bytes_are_kept_once(tmp_path: Path) -> None:
    store = ClaimStore(str(tmp_path))
    assert await store.put(DATA) == await store.put(DATA)
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [DATA]


async def test_an_object_store_keeps_them_too() -> None:
    store = ClaimStore("memory://claims")
    assert await store.get(await store.put(DATA), SHA256) == DATA


@pytest.mark.parametrize(
    ("claim", "sha256"),
    [
        (f"sha256:{SHA256}", "0" * 64),
        ("sha256:../../etc/passwd", "../../etc/passwd"),
        (f"file:///etc/{SHA256}", SHA256),
        (f"sha256:{SHA256.upper()}", SHA256.upper()),
    ],
)
async def test_a_claim_names_content_and_nothing_else(tmp_path: Path, claim: str, sha256: str) -> None:
    store = ClaimStore(str(tmp_path))
    await store.put(DATA)
    with pytest.raises(UnprocessableError, match="not a claim of this store"):
        await store.get(claim, sha256)


async def test_bytes_that_are_gone_make_a_dead_letter(tmp_path: Path) -> None:
    with pytest.raises(UnprocessableError, match=r"\(images\)"):
        await ClaimStore(str(tmp_path)).get(f"sha256:{SHA256}", SHA256)


async def test_corrupt_bytes_make_a_dead_letter(tmp_path: Path) -> None:
    store = ClaimStore(str(tmp_path))
    claim = await store.put(DATA)
    (tmp_path / SHA256[:2] / SHA256[2:4] / SHA256).write_bytes(b"another")
    with pytest.raises(UnprocessableError, match="corrupt"):
        await store.get(claim, SHA256)


async def test_a_store_that_cannot_be_written_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file where the directory should be")
    with pytest.raises(UnavailableError, match=r"\(images\)") as caught:
        await ClaimStore(str(tmp_path / "images")).put(DATA)
    assert caught.value.waiting_on == "disk"


@pytest.mark.parametrize("kind", ["local", "memory"])
async def test_trash_is_found_until_it_is_purged_and_can_be_put_back(tmp_path: Path, kind: str) -> None:
    store = ClaimStore(str(tmp_path / "images") if kind == "local" else f"memory://trash-{tmp_path.name}")
    claim = await store.put(DATA)
    before = datetime.now(UTC)
    assert await store.trash(SHA256) == len(DATA)
    assert await store.get(claim, SHA256) == DATA
    assert await store.trash(SHA256) is None, "it is there already"
    assert await store.trashed(before - timedelta(seconds=10)) == []
    [lying] = await store.trashed(datetime.now(UTC) + timedelta(seconds=10))
    assert (lying.sha256, lying.size) == (SHA256, len(DATA))
    assert lying.since >= before - timedelta(seconds=1), "not since the picture was taken in"
    await store.put_back(SHA256)
    assert await store.get(claim, SHA256) == DATA
    assert await store.trashed(datetime.now(UTC) + timedelta(seconds=10)) == []
    await store.trash(SHA256)
    await store.purge(SHA256)
    await store.purge(SHA256)
    await store.put_back(SHA256)
    with pytest.raises(UnprocessableError, match="is not in"):
        await store.get(claim, SHA256)


async def test_what_is_stored_again_while_it_lies_in_the_trash_outlives_it(tmp_path: Path) -> None:
    store = ClaimStore(str(tmp_path))
    claim = await store.put(DATA)
    await store.trash(SHA256)
    assert await store.put(DATA) == claim
    await store.purge(SHA256)
    assert await store.get(claim, SHA256) == DATA


async def test_an_old_picture_is_no_old_trash(tmp_path: Path) -> None:
    store = ClaimStore(str(tmp_path))
    await store.put(DATA)
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    os.utime(path, (1_000_000_000, 1_000_000_000))
    await store.trash(SHA256)
    assert await store.trashed(datetime.now(UTC) - timedelta(minutes=1)) == []
