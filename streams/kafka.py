"""The way to the broker: settings, and the few reads and producers that everything else is made of."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Self

import aiokafka
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaConnectionError, RequestTimedOutError
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from streams.client import RefusedError, adopt, contact_with, stop
from streams.errors import explain
from streams.messages import Incoming
from streams.refusals import CredentialsError, Refusal, causes, refusal_in

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
    sasl_password_file: Path | None = Field(
        None, description="File with the password instead, read again for each connection."
    )
    ssl_cafile: Path | None = Field(
        None, description="PEM certificates of authorities that may vouch for a broker; without it the system's."
    )
    ssl_certfile: Path | None = Field(None, description="PEM certificate of ours, for a broker that asks for one.")
    ssl_keyfile: Path | None = Field(None, description="PEM key of ssl_certfile.")
    schema_registry_url: str = Field(
        "",
        pattern=r"^$|^https?://[^/@\s]+(/[^\s?#]*)?$",
        description="Redpanda's or Confluent's schema registry, which `rewatch migrate` tells every schema so that "
        "other programs can read our topics. We need none.",
    )
    schema_registry_user: str | None = None
    schema_registry_password: SecretStr | None = Field(
        None, description="By environment: REWATCH_KAFKA__SCHEMA_REGISTRY_PASSWORD."
    )

    @model_validator(mode="after")
    def _secured_in_full(self) -> Self:
        protocol = self.security_protocol
        if self.with_sasl:
            self._check_password()
        elif set_ := self._set("sasl_username", "sasl_password", "sasl_password_file"):
            raise ValueError(
                f"kafka.{set_} is set, and kafka.security_protocol {protocol} asks nobody for it: "
                f"set kafka.security_protocol to {'SASL_SSL' if self.with_tls else 'SASL_SSL or SASL_PLAINTEXT'}"
            )
        if self.with_tls:
            try:
                self.tls()
            except CredentialsError as error:
                raise ValueError(error.args[0]) from error
        elif set_ := self._set("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            raise ValueError(
                f"kafka.{set_} is set, and kafka.security_protocol {protocol} is without TLS: "
                f"set it to {'SASL_SSL' if self.with_sasl else 'SSL or SASL_SSL'}"
            )
        return self

    def _check_password(self) -> None:
        if not self.sasl_username:
            raise ValueError(f"kafka.security_protocol {self.security_protocol} needs kafka.sasl_username")
        if (self.sasl_password is None) == (self.sasl_password_file is None):
            raise ValueError(
                f"kafka.security_protocol {self.security_protocol} needs kafka.sasl_password "
                "(REWATCH_KAFKA__SASL_PASSWORD), or kafka.sasl_password_file: one of them"
            )
        try:
            self.password()
        except CredentialsError as error:
            raise ValueError(error.args[0]) from error

    def _set(self, *names: str) -> str | None:
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def with_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.security_protocol.endswith("SSL")

    @property
    def with_sasl(self) -> bool:
        """Whether the broker asks for a password."""
        return self.security_protocol.startswith("SASL")

    def password(self) -> str:
        """The password.

        Raises:
            CredentialsError: its file cannot be read, or there is none in it.
        """
        setting, found = "kafka.sasl_password", ""
        if self.sasl_password is not None:
            found = self.sasl_password.get_secret_value()
        elif self.sasl_password_file is not None:
            setting = "kafka.sasl_password_file"
            try:
                found = self.sasl_password_file.read_text().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise CredentialsError(setting, error, self.sasl_password_file) from error
        if not found:
            raise CredentialsError(setting, ValueError("is empty"), "the password")
        return found

    def tls(self) -> ssl.SSLContext:
        """What a connection is encrypted with, from the files as they are now.

        Raises:
            CredentialsError: one of them cannot be used; the message names its setting.
        """
        try:
            context = ssl.create_default_context(cafile=self.ssl_cafile)
        except (OSError, ssl.SSLError) as error:
            raise CredentialsError("kafka.ssl_cafile", error, self.ssl_cafile) from error
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            lone = "kafka.ssl_certfile" if self.ssl_keyfile is None else "kafka.ssl_keyfile"
            raise CredentialsError(lone, ValueError("kafka.ssl_certfile and kafka.ssl_keyfile belong together"), lone)
        if self.ssl_certfile is not None and self.ssl_keyfile is not None:
            try:
                # An empty password: without one OpenSSL would ask whoever sits at the terminal.
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password="")
            except (OSError, ssl.SSLError) as error:
                at = f"{self.ssl_certfile} with {self.ssl_keyfile}"
                raise CredentialsError("kafka.ssl_certfile or kafka.ssl_keyfile", error, at) from error
        return context


class Kafka:
    """Connections to one broker or cluster, as one installation (`system`) of the product uses it."""

    def __init__(self, settings: KafkaSettings) -> None:
        self.settings = settings
        self.contact = contact_with(settings.bootstrap_servers)
        self._tls: tuple[object, ssl.SSLContext] | None = None

    @property
    def waiting_on(self) -> str:
        """What a stage says that waits for the broker: `broker`, and why where the broker or we refuse the other."""
        refusal = self.contact.refusal
        return f"broker ({refusal.what})" if refusal is not None else "broker"

    def refused(self, error: BaseException) -> Refusal | None:
        """What a broker that is there did, for a request to end so; None: nobody answered."""
        refusal = error.refusal if isinstance(error, RefusedError) else refusal_in(error) or self.contact.refusal
        late = any(isinstance(cause, TimeoutError | RequestTimedOutError) for cause in causes(error))
        if refusal is None and self.contact.reached and late:
            return Refusal("takes connections and is slow to answer", "look at its log, its load and its disk")
        return refusal

    def away(self, error: BaseException, fix: str = "") -> str:
        """What is said when the log cannot be had: what the broker does, which setting names it, and the fix.

        Args:
            error: what a request ended with.
            fix: what to do in this installation where nobody answers.
        """
        where = f"the broker at {self.settings.bootstrap_servers} (kafka.bootstrap_servers)"
        refusal = self.refused(error)
        if refusal is not None:
            return f"{where} {refusal.what}; {refusal.fix}"
        told = f"no answer from {where}; {fix}" if fix else f"no answer from {where}"
        # What this one says is the address, in Python's words.
        return told if isinstance(error, KafkaConnectionError) else f"{told}: {explain(error)}"

    def group(self, stage: str) -> str:
        """The consumer group of a stage."""
        return f"{self.settings.system}-{stage}"

    def transactional_id(self, stage: str, *parts: str | int) -> str:
        """The transactional id of a stage's hold on something: one name, one owner."""
        return "-".join((self.settings.system, stage, *map(str, parts)))

    def connection(self) -> dict[str, Any]:
        """Keyword arguments that every aiokafka client takes.

        Raises:
            CredentialsError: a file that they come from cannot be used now.
        """
        s = self.settings
        options: dict[str, Any] = {
            "bootstrap_servers": s.bootstrap_servers,
            "security_protocol": s.security_protocol,
            # A lone embedded broker comes back on the same port: look for it often.
            "metadata_max_age_ms": 30_000,
            "retry_backoff_ms": 100,
            "request_timeout_ms": 15_000,
        }
        try:
            if s.with_tls:
                options["ssl_context"] = self._context()
            if s.with_sasl:
                options["sasl_mechanism"] = s.sasl_mechanism
                options["sasl_plain_username"] = s.sasl_username
                options["sasl_plain_password"] = s.password()
        except CredentialsError as error:
            self.contact.failed(error)
            raise
        return options

    def _context(self) -> ssl.SSLContext:
        """The TLS context, made again where one of its files is another by now: reading them takes milliseconds."""
        s = self.settings
        files = [path for path in (s.ssl_cafile, s.ssl_certfile, s.ssl_keyfile) if path is not None]
        state = [(path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None for path in files]
        if self._tls is None or self._tls[0] != state:
            self._tls = (state, s.tls())
        return self._tls[1]

    def producer(self, **options: Any) -> AIOKafkaProducer:
        """An idempotent producer, not started."""
        producer = AIOKafkaProducer(
            **self.connection(),
            enable_idempotence=True,
            acks="all",
            max_request_size=MAX_RECORD_BYTES,
            # aiokafka's 16 KB makes a request and a flush of every frame: 58 frames of 32 KB a second, against 613
            # with this (measured). Redpanda takes batches of 1 MiB at most.
            max_batch_size=1_000_000,
            **options,
        )
        adopt(producer.client, self.contact)
        return producer

    def consumer(self, **options: Any) -> AIOKafkaConsumer:
        """A consumer that sees committed records only and never commits by itself, not started."""
        defaults: dict[str, Any] = {
            "isolation_level": "read_committed",
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "max_partition_fetch_bytes": MAX_RECORD_BYTES,
            "fetch_max_wait_ms": 250,
        }
        consumer = AIOKafkaConsumer(**self.connection(), **(defaults | options))
        adopt(consumer._client, self.contact)  # noqa: SLF001 (aiokafka is pinned below 0.15)
        return consumer

    @asynccontextmanager
    async def reading(self, **options: Any) -> AsyncIterator[AIOKafkaConsumer]:
        """A started consumer outside any group, stopped at the end."""
        consumer = self.consumer(**options)
        try:
            await consumer.start()
            yield consumer
        finally:
            await stop(consumer)

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        """A started admin client, closed at the end."""
        admin = AIOKafkaAdminClient(**self.connection())
        adopt(admin._client, self.contact)  # noqa: SLF001 (as above)
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
