"""Claim checks: bytes by their content's name, and nothing else by any name."""

import hashlib
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
