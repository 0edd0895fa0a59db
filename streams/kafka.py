"""The way to the broker: settings, and the few reads and producers that everything else is made of."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import aiokafka
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaConnectionError
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from streams.errors import explain
from streams.messages import Incoming

# A transaction holds results that are already in hand, so it lasts milliseconds; what a dead owner left open
# blocks readers of its outputs until its successor comes or this ends it.
TRANSACTION_TIMEOUT_MS = 10_000

# The broker's message.max.bytes: frames are at most 64 KB inline, events a few tens of KB.
MAX_RECORD_BYTES = 4 * 1024 * 1024


class KafkaSettings(BaseModel):
    """Where the log is and how to speak to it."""

    model_config = ConfigDict(extra="forbid")

    bootstrap_servers: str = Field("127.0.0.1:9092", description="host:port, comma-separated.")
    system: str = Field(
        "rewatch",
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        description="Prefix of group names and transactional ids. Topics have none: one installation a cluster.",
    )
    partitions: int = Field(16, ge=1, le=1024, description="Partitions of each data topic; fixed at creation.")
    replication_factor: int = Field(1, ge=1, description="Replicas of each topic.")
    session_timeout_ms: int = Field(10_000, ge=1_000, description="A member not heard of for this long is out.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-256"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = Field(None, description="By environment: REWATCH_KAFKA__SASL_PASSWORD.")
    ssl_cafile: str | None = None


class Kafka:
    """Connections to one broker or cluster, as one installation (`system`) of the product uses it."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings

    def away(self, error: BaseException, fix: str = "") -> str:
        """What is said when the broker does not answer: the setting that names it, what to do, and the error."""
        where = f"no answer from the broker at {self.settings.bootstrap_servers} (kafka.bootstrap_servers)"
        told = f"{where}; {fix}" if fix else where
        # What this one says is the address, in Python's words.
        return told if isinstance(error, KafkaConnectionError) else f"{told}: {explain(error)}"

    def group(self, stage: str) -> str:
        """The consumer group of a stage."""
        return f"{self.settings.system}-{stage}"

    def transactional_id(self, stage: str, *parts: str | int) -> str:
        """The transactional id of a stage's hold on something: one name, one owner."""
        return "-".join((self.settings.system, stage, *map(str, parts)))

    def connection(self) -> dict[str, Any]:
        """Keyword arguments that every aiokafka client takes."""
        s = self.settings
        options: dict[str, Any] = {
            "bootstrap_servers": s.bootstrap_servers,
            "security_protocol": s.security_protocol,
            # A lone embedded broker comes back on the same port: look for it often.
            "metadata_max_age_ms": 30_000,
            "retry_backoff_ms": 100,
            "request_timeout_ms": 15_000,
        }
        if s.security_protocol.endswith("SSL"):
            options["ssl_context"] = ssl.create_default_context(cafile=s.ssl_cafile)
        if s.security_protocol.startswith("SASL"):
            options["sasl_mechanism"] = s.sasl_mechanism
            options["sasl_plain_username"] = s.sasl_username
            options["sasl_plain_password"] = s.sasl_password.get_secret_value() if s.sasl_password else None
        return options

    def producer(self, **options: Any) -> AIOKafkaProducer:
        """An idempotent producer, not started."""
        return AIOKafkaProducer(
            **self.connection(),
            enable_idempotence=True,
            acks="all",
            max_request_size=MAX_RECORD_BYTES,
            # aiokafka's 16 KB makes a request and a flush of every frame: 58 frames of 32 KB a second, against 613
            # with this (measured). Redpanda takes batches of 1 MiB at most.
            max_batch_size=1_000_000,
            **options,
        )

    def consumer(self, **options: Any) -> AIOKafkaConsumer:
        """A consumer that sees committed records only and never commits by itself, not started."""
        defaults: dict[str, Any] = {
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "max_partition_fetch_bytes": MAX_RECORD_BYTES,
            "fetch_max_wait_ms": 250,
        }
        return AIOKafkaConsumer(**self.connection(), **(defaults | options))

    @asynccontextmanager
    async def reading(self, **options: Any) -> AsyncIterator[AIOKafkaConsumer]:
        """A started consumer outside any group, stopped at the end."""
        consumer = self.consumer(**options)
        try:
            await consumer.start()
            yield consumer
        finally:
            await consumer.stop()

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        """A started admin client, closed at the end."""
        admin = AIOKafkaAdminClient(**self.connection())
        try:
            await admin.start()
            yield admin
        finally:
            await admin.close()

    async def committed(self, group: str, tp: TopicPartition) -> tuple[int, str] | None:
        """The group's committed offset for the partition and its metadata (the topic's epoch), or None.

        Raises:
            KafkaError: the coordinator cannot say now.
        """
        async with self.admin() as admin:
            found = await admin.list_consumer_group_offsets(group, partitions=[tp])
        if tp not in found:
            # The broker answers -1 for a partition without an offset. aiokafka overlooks the error of a whole
            # group, as of a coordinator that is still loading; taken for "none", everything would be done again.
            raise GroupCoordinatorNotAvailableError(group)
        return None if found[tp].offset < 0 else (found[tp].offset, found[tp].metadata)

    async def bounds(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        """`(log start, end)` of each partition; the end counts records whose transaction is still open."""
        async with self.reading(isolation_level="read_uncommitted") as consumer:
            starts = await consumer.beginning_offsets(tps)
            ends = await consumer.end_offsets(tps)
        return {tp: (starts[tp], ends[tp]) for tp in tps}

    async def read(
        self,
        tps: Sequence[TopicPartition],
        *,
        since: Mapping[TopicPartition, int] | None = None,
        until: Mapping[TopicPartition, int] | None = None,
        epoch: str = "",
        within: float = 30.0,
    ) -> list[Incoming]:
        """Every committed record of the partitions, from the start or from `since` (offsets), to their end now.

        `until` (offsets, exclusive) ends it earlier.
        The end is taken with open transactions counted, and waited for: a record of ours that is committed
        can stand behind a stranger's open transaction and must not be missed.

        Raises:
            TimeoutError: the end was not reached in time: a transaction stays open, or the broker is away.
        """
        bounds = await self.bounds(tps)
        starts = {tp: max(start, (since or {}).get(tp, start)) for tp, (start, _) in bounds.items()}
        ends = {tp: min(end, (until or {}).get(tp, end)) for tp, (_, end) in bounds.items()}
        todo = {tp for tp in bounds if starts[tp] < ends[tp]}
        if not todo:
            return []
        found: list[Incoming] = []
        async with self.reading() as consumer:
            consumer.assign(list(todo))
            for tp in todo:  # no await between assign and seek: aiokafka's own reset would win
                consumer.seek(tp, starts[tp])
            async with asyncio.timeout(within):
                while todo:
                    for tp, batch in (await consumer.getmany(*todo, timeout_ms=100)).items():
                        found.extend(incoming(record, epoch) for record in batch if record.offset < ends[tp])
                    todo = {tp for tp in todo if await consumer.position(tp) < ends[tp]}
        return found


def incoming(record: "aiokafka.ConsumerRecord[Any, Any]", epoch: str) -> Incoming:
    """A consumed record as stages see it."""
    return Incoming(
        record.topic,
        epoch,
        record.partition,
        record.offset,
        record.key,
        record.value,
        # Kafka allows headers without a value; nothing behind this point does.
        tuple([(name, value or b"") for name, value in record.headers]),
    )
