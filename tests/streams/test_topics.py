"""The catalogue, and where a camera lives."""

import pytest
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st

from streams.topics import STORED, TOPICS, partition_of


@pytest.mark.parametrize(
    ("key", "murmur2"),
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
    ],
)
def test_a_camera_lives_where_kafkas_own_partitioner_puts_its_key(key: str, murmur2: int) -> None:
    """Hashes from Apache Kafka's UtilsTest.testMurmur2."""
    for partitions in (1, 4, 16, 64):
        assert partition_of(key, partitions) == (murmur2 & 0x7FFFFFFF) % partitions


@given(st.text(min_size=1), st.integers(1, 64))
def test_producers_without_a_partition_agree(camera: str, partitions: int) -> None:
    everywhere = list(range(partitions))
    assert partition_of(camera, partitions) == DefaultPartitioner()(camera.encode(), everywhere, everywhere)


def test_a_pin_wins() -> None:
    assert partition_of("front-door", 16, pin=5) == 5


def test_what_is_remembered_beyond_a_position_is_compacted_and_not_stored() -> None:
    internal = {"ingest_state", "batch_state", "sink_state", "meta"}
    assert {name for name, topic in TOPICS.items() if topic.compacted} == internal
    assert set(STORED) == TOPICS.keys() - internal
