"""What the power cut does to a segment: nothing that may have been acknowledged is touched, nothing valid is added."""

import random
from pathlib import Path

import pytest
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from tests.chaos.tearing import active_segments, last_batch, tear, torn_append


def batch(offset: int, count: int) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 20)
    for number in range(count):
        assert builder.append(number, 1, b"key", b"value" * number, [])
    return offset.to_bytes(8, "big") + bytes(builder.build())[8:]


def test_the_last_whole_batch_is_found_whatever_follows_it():
    first, second = batch(0, 3), batch(3, 2)
    whole = first + second
    assert last_batch(whole) == (len(first), len(whole))
    assert last_batch(whole + second[:40]) == (len(first), len(whole))
    assert last_batch(whole + bytes(500)) == (len(first), len(whole))
    assert last_batch(b"") == last_batch(first[:-1]) == (0, 0)


@pytest.mark.parametrize("seed", range(200))
def test_no_valid_batch_is_ever_added(seed: int):
    last = batch(17, 5)
    torn = torn_append(last, random.Random(seed))
    assert 0 < len(torn) <= len(last)
    assert len(torn) < len(last) or not DefaultRecordBatch(torn).validate_crc()


def test_zeros_that_were_there_anyway_are_cut_off():
    """A record without headers ends with a zero: with zeros behind all but that, the batch would be whole."""
    last = batch(17, 5)
    assert last.endswith(b"\0")

    class Unlucky(random.Random):
        def randrange(self, *_: int) -> int:
            return len(last) - 1

        def choice(self, _: object) -> str:
            return "zeros"

    assert len(torn_append(last, Unlucky(1))) == len(last) - 1


def test_only_segments_that_are_written_to_are_torn_and_only_behind_their_last_batch(tmp_path: Path):
    old, new = batch(0, 3), batch(3, 2)
    part = tmp_path / "frames-0"
    part.mkdir()
    (part / f"{0:020}.log").write_bytes(old)
    (part / f"{3:020}.log").write_bytes(new + new[:30])
    (tmp_path / "empty-0").mkdir()
    (tmp_path / "empty-0" / f"{0:020}.log").touch()
    assert part / f"{3:020}.log" in active_segments(tmp_path)
    assert [told.split()[0] for told in tear(tmp_path, random.Random(1), share=1.0)] == ["frames-0"]
    assert (part / f"{0:020}.log").read_bytes() == old
    assert (part / f"{3:020}.log").read_bytes().startswith(new)
    assert last_batch((part / f"{3:020}.log").read_bytes())[1] == len(new)
