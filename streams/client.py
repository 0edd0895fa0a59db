"""The connections under every client of the broker: aiokafka's, with what it leaves open closed, and its errors kept.

aiokafka (0.14) forgets a connection whose bootstrap is cancelled, makes new ones for requests that outlive their
client, stops by halves while a fetch is tried again, and says of a refused password only that it could not connect.
"""

import asyncio
from collections.abc import Callable
from functools import cache
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError, StaleMetadata
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.util import create_task

from streams.errors import explain
from streams.refusals import Refusal, refusal_in

log = structlog.get_logger(__name__)


class RefusedError(KafkaConnectionError):  # type: ignore[misc]
    """The broker is there, and it or we will have nothing of the other."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"the broker {refusal.what}: {refusal.fix}")
        self.refusal = refusal

    def __str__(self) -> str:
        return str(self.args[0])


class Contact:
    """What the last connection to a broker came to, of all clients of a process.

    Requests that wait for a connection end with nothing but their time being up.
    """

    def __init__(self) -> None:
        self.reached = False
        """Whether it was made: then who does not answer is slow, and not away."""
        self.refusal: Refusal | None = None
        """Why not, where that is for people to mend."""

    def taken(self) -> None:
        """The broker takes us."""
        if self.refusal is not None:
            log.info("the broker takes us again")
        self.refusal = None

    def failed(self, error: BaseException) -> Refusal | None:
        """A connection came to nothing; says what is refused, if anything is."""
        refusal = refusal_in(error)
        if refusal is not None and refusal != self.refusal:  # once is enough: it is tried again and again
            log.warning("refused", broker=refusal.what, fix=refusal.fix, error=explain(error))
        self.refusal = refusal
        return refusal


@cache
def contact_with(servers: str) -> Contact:
    """This process's contact with the broker at these addresses."""
    del servers
    return Contact()


class Client(AIOKafkaClient):  # type: ignore[misc]
    """aiokafka's client, which a producer, a consumer and an admin client each have one of. Made by `adopt`."""

    contact: Contact
    _over: asyncio.Event
    _sync_task: Any

    async def bootstrap(self) -> None:
        """Learn the cluster from one of the addresses that are set.

        Raises:
            RefusedError: one of them answers, and does not take us.
            KafkaConnectionError: none of them answers.
        """
        failed: list[Exception] = []
        for host, port, _ in self.hosts:
            try:
                await self._ask_first(host, port)
            except (KafkaError, OSError) as error:  # TimeoutError is an OSError
                failed.append(error)
            else:
                break
        else:
            refused = next((error for error in failed if isinstance(error, RefusedError)), None)
            if refused is not None:
                raise refused
            raise KafkaConnectionError(f"Unable to bootstrap from {self.hosts}") from failed[-1]
        if self._sync_task is None:
            self._sync_task = create_task(self._md_synchronizer())

    async def _ask_first(self, host: str, port: int) -> None:
        """Learn the cluster from this address."""
        conn = await self._connect(host, port)
        kept = False
        try:
            self.cluster.update_metadata(await conn.send(MetadataRequest([])))
            if not self.cluster.brokers():  # as of one that has no topics yet: it is asked again
                self._conns["bootstrap", ConnectionGroup.DEFAULT] = conn
                kept = True
        except (KafkaError, OSError) as error:  # a broker that asks for a password hangs up now, and not before
            self._say(error)
            raise
        finally:
            if not kept:
                conn.close()
        self.contact.taken()

    async def _get_conn(
        self, node_id: int | str, *, group: ConnectionGroup = ConnectionGroup.DEFAULT, no_hint: bool = False
    ) -> Any:
        """The connection to a node, made where there is none; None where that cannot be done now."""
        del no_hint
        conn_id = (node_id, group)
        conn = self._conns.get(conn_id)
        if conn is not None:
            if conn.connected():
                return conn
            del self._conns[conn_id]
        try:
            broker = self.cluster.broker_metadata(node_id)
            if broker is None:
                raise StaleMetadata(f"Broker id {node_id} not in current metadata")
            async with self._get_conn_lock:
                if conn_id in self._conns:
                    return self._conns[conn_id]
                if self._over.is_set():
                    return None
                conn = await self._connect(broker.host, broker.port, on_close=self._on_connection_closed)
                if self._over.is_set():  # closed meanwhile: nobody would close this one any more
                    conn.close()
                    return None
                self._conns[conn_id] = conn
        except (OSError, KafkaError) as error:
            log.debug("no connection", node=node_id, error=explain(error))
            self.force_metadata_update()
            return None
        self.contact.taken()
        return conn

    async def close(self) -> None:
        """Close every connection, and make no other."""
        self._over.set()
        await super().close()

    async def _connect(self, host: str, port: int, on_close: Callable[..., None] | None = None) -> Any:
        """A connection, with the password taken.

        Raises:
            RefusedError: the broker or we refuse.
            KafkaError or OSError: it cannot be made.
        """
        try:
            conn = await create_conn(
                host,
                port,
                client_id=self._client_id,
                request_timeout_ms=self._request_timeout_ms,
                ssl_context=self._ssl_context,
                security_protocol=self._security_protocol,
                on_close=on_close,
                max_idle_ms=self._connections_max_idle_ms,
                sasl_mechanism=self._sasl_mechanism,
                sasl_plain_username=self._sasl_plain_username,
                sasl_plain_password=self._sasl_plain_password,
            )
        except (KafkaError, OSError) as error:
            self.contact.reached = False
            self._say(error)
            raise
        except (ValueError, AssertionError) as error:  # what aiokafka and SCRAM say of an answer that cannot be
            self._say(error)
            raise KafkaConnectionError(explain(error)) from error
        self.contact.reached = True
        return conn

    def _say(self, error: Exception) -> None:
        """Keep what it came to.

        Raises:
            RefusedError: it is a refusal.
        """
        refusal = self.contact.failed(error)
        if refusal is not None:
            raise RefusedError(refusal) from error


async def stop(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer, with its broker there or away.

    aiokafka's own way out (0.14) ends in the middle where a fetch waits to be tried again: it cancels that, and lets
    the cancellation out as if it were its caller's.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        fetches = consumer._fetcher._pending_tasks  # noqa: SLF001 (aiokafka is pinned below 0.15)
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        await consumer._client.close()  # noqa: SLF001 (as above)
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise


def adopt(client: AIOKafkaClient, contact: Contact) -> None:
    """Make aiokafka's client, not started, one of ours, which tells `contact`."""
    client.__class__ = Client
    client.contact = contact
    client._over = asyncio.Event()  # noqa: SLF001 (ours)
