"""One run of the collector in an installation: its lock, its parts, and the broker's share of retention."""

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import NamedTuple

from filelock import FileLock, Timeout

from infra.config import Settings
from infra.private import make_private
from infra.retention.collector import Collector, NotNowError, Report, Store
from infra.retention.kafka_log import KafkaLog
from processors.store.connection import Connection
from processors.store.queries import Queries
from streams.claims import ClaimStore
from streams.kafka import Kafka
from streams.retention import Change, retain, retention

# Deleting from a table of 100 GB rewrites a column of it; a table that is written anew takes as long as its disk does.
_ASK_S = 3600.0


class Outcome(NamedTuple):
    """What a run did, or would do."""

    report: Report
    changes: list[Change]
    """What the broker was told otherwise now, or would be."""


async def collect(settings: Settings, *, dry_run: bool, told: Callable[[str], None] = lambda _: None) -> Outcome:
    """Run the collector once.

    Raises:
        NotNowError: nothing can be deleted safely now; another run is at work, for one.
        KafkaError, TimeoutError, OSError, UnavailableError: a service is away.
    """
    kafka = Kafka(settings.kafka)
    own = settings.clickhouse
    patient = own.model_copy(update={"read_timeout_s": max(_ASK_S, own.read_timeout_s)})
    with alone(settings):
        told("looking at the broker")
        topics = await retention(kafka)
        wanted = settings.retention.topics_ms
        changes = [Change(name, topics[name], ms) for name, ms in wanted.items() if topics.get(name, ms) != ms]
        connection = Connection(patient)
        async with aclosing(Queries(patient)) as queries:
            try:
                collector = Collector(
                    Store(connection),
                    KafkaLog(kafka, queries),
                    ClaimStore(settings.images_root),
                    settings.retention,
                    owner=_owner(settings),
                    told=told,
                )
                if dry_run:
                    return Outcome(await collector.plan(), changes)
                return Outcome(await collector.run(), await retain(kafka, wanted))
            finally:
                await connection.close()


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Hold the lock of whoever takes rows away or makes tables anew; a process that is killed lets go of it.

    Raises:
        NotNowError: somebody else holds it.
    """
    make_private(settings.data_dir)
    lock = FileLock(settings.data_dir / "gc.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise NotNowError(
            f"another `rewatch gc` or `rewatch rebuild` is at work on {settings.data_dir} (data_dir)"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _owner(settings: Settings) -> str:
    """Names this machine's data directory and its images: its lock says whether a collector of that name runs."""
    place = hashlib.sha256(f"{settings.data_dir.resolve()}\0{settings.images_root}".encode()).hexdigest()[:8]
    return f"{socket.gethostname()}:{place}"
