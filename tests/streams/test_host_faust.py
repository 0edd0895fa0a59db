"""What the Faust host hands on of the chunks that come to its agent; no broker. The rest is in `conformance`."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from streams.host_faust import FaustHost
from streams.kafka import Kafka, KafkaSettings
from streams.messages import Incoming
from tests.streams.conformance.toys import WindowStage


class Stream:
    """A Faust stream of chunks, each of a generation of the group."""

    def __init__(self, *chunks: tuple[int, list[int]]) -> None:
        self._chunks = chunks

    def noack(self) -> "Stream":
        return self

    async def events(self) -> AsyncIterator[Any]:
        for generation, offsets in self._chunks:
            records = [Incoming("in", "e", 1, offset, b"k", b"v", ()) for offset in offsets]
            message = SimpleNamespace(topic="in", generation_id=generation, value=records)
            yield SimpleNamespace(message=message)


@pytest.mark.parametrize(("flowing", "fed"), [(True, [5, 6, 7, 9]), (False, [])])
async def test_a_chunk_is_handed_on_whole_if_it_is_of_the_present_generation_and_no_rebalance_began(
    monkeypatch: pytest.MonkeyPatch, flowing: bool, fed: list[int]
) -> None:
    host = FaustHost(Kafka(KafkaSettings()), WindowStage("in", "out"), epochs=lambda _: "e")
    app: Any = SimpleNamespace(consumer_generation_id=3, flow_control=SimpleNamespace(is_active=lambda: flowing))
    monkeypatch.setattr(host, "_app", app)
    offsets: list[int] = []
    monkeypatch.setattr(host.workers, "feed", lambda record: offsets.append(record.offset))
    await host._feed(Stream((2, [3, 4]), (3, [5, 6, 7]), (3, [9]), (2, [10])))
    assert offsets == fed
