"""One process of the product's runtime for `runtime.py`: `python -m tests.bench.runtime_rewatch HOST ...`."""

import argparse
import asyncio
import logging
import signal
from collections.abc import Sequence

import structlog

from schemas.records import Detections
from streams import codec
from streams.host_faust import FaustHost
from streams.host_raw import RawHost
from streams.kafka import Kafka, KafkaSettings
from streams.messages import FINGERPRINT, Emit, Incoming
from tests.bench.sightings import TOPIC, kept

HOSTS: dict[str, type[FaustHost | RawHost]] = {"faust": FaustHost, "raw": RawHost}


class Sure:
    """Detections in, the same with their sure boxes only out."""

    name = "sure"
    # Nothing is waited for here; the default window of a partition (128 records) is in hand either way.
    concurrency = 64
    outputs: tuple[str, ...] = ()  # its group is new: there is no position to look for in an output's tail

    def __init__(self, source: str, target: str) -> None:
        self.inputs: tuple[str, ...] = (source,)
        self._target = target

    async def handle(self, record: Incoming) -> Sequence[Emit]:
        """As every stage does it: decode, work, encode."""
        seen = codec.decode_bytes(TOPIC, record.value, record.header(FINGERPRINT), Detections)
        value, fingerprint = codec.encode(TOPIC, kept(seen))
        return [Emit(self._target, record.key or b"", value, ((FINGERPRINT, fingerprint),))]

    async def close(self) -> None:
        """Nothing is held."""


async def serve(host: str, servers: str, system: str, source: str, target: str) -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    kafka = Kafka(KafkaSettings(bootstrap_servers=servers, system=system))
    await HOSTS[host](kafka, Sure(source, target), epochs=lambda _: "bench").run(stop)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("host", choices=HOSTS)
    for name in ("servers", "system", "source", "target"):
        parser.add_argument(name)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(serve(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
