"""One process of quixstreams for `runtime.py`: `python -m tests.bench.runtime_quixstreams SERVERS ...`.

As its documentation has it: exactly-once, one `StreamingDataFrame`, a serialiser of one's own for Avro in our
framing. It stays with plain dicts, which is the least work that gives the same bytes.
"""

import argparse
import io
from typing import Any

import fastavro
from quixstreams import Application
from quixstreams.models.serializers import Deserializer, SerializationContext, Serializer

from schemas import avro_schemas
from tests.bench.sightings import SURE, TOPIC

# How often it commits. The product's runtime commits a partition's records as soon as the commit before is done;
# with a backlog on 16 partitions on two cores that is once or twice a second for each.
COMMIT_INTERVAL_S = 0.5

_FRAME = 5  # Confluent's framing: a zero byte and the schema's id


class AvroIn(Deserializer):
    """Our framing and schema to a dict."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._schema = avro_schemas.current(TOPIC)

    def __call__(self, value: bytes, ctx: SerializationContext) -> Any:
        del ctx
        body = io.BytesIO(value)
        body.seek(_FRAME)
        return fastavro.schemaless_reader(body, self._schema, None)


class AvroOut(Serializer):
    """A dict to our framing and schema."""

    def __init__(self) -> None:
        super().__init__()
        self._schema = avro_schemas.current(TOPIC)
        number = int.from_bytes(avro_schemas.fingerprint(TOPIC)[:4], "big") & 0x7FFFFFFF
        self._head = b"\x00" + number.to_bytes(4, "big")

    def __call__(self, value: Any, ctx: SerializationContext) -> bytes:
        del ctx
        out = io.BytesIO()
        out.write(self._head)
        fastavro.schemaless_writer(out, self._schema, value)
        return out.getvalue()


def _sure(seen: dict[str, Any]) -> dict[str, Any]:
    return {**seen, "boxes": [box for box in seen["boxes"] if box["score"] >= SURE]}


def serve(servers: str, group: str, source: str, target: str, commit_interval: float) -> None:
    """Run until SIGTERM."""
    app = Application(
        broker_address=servers,
        consumer_group=group,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_interval=commit_interval,
        auto_create_topics=False,
        use_changelog_topics=False,  # nothing here has state
        loglevel="ERROR",
    )
    frames = app.dataframe(app.topic(source, value_deserializer=AvroIn()))
    frames.apply(_sure).to_topic(app.topic(target, value_serializer=AvroOut()))
    app.run()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("servers", "group", "source", "target"):
        parser.add_argument(name)
    parser.add_argument("--commit-interval", type=float, default=COMMIT_INTERVAL_S)
    serve(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
