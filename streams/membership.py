"""Static membership (KIP-345): a worker that was killed comes back under its name and has its partitions at once.

A group waits for a dead member until its session runs out, 10 s, before anybody gets its partitions. A named member
that joins again takes its predecessor's place, partitions included, and nobody else notices.

Two of one name must not take each other's place for ever. The broker tells whoever was replaced FENCED_INSTANCE_ID; but
aiokafka (0.14) does not know it, and its heartbeats do not say the name, so that it hears "unknown member", joins
again under the name, and throws out the other. Here heartbeats say the name, and whoever is fenced gives it up: it
becomes an ordinary member, and both work, each on partitions of its own.
"""

from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import UnknownMemberIdError
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.group import (
    HeartbeatRequest,
    HeartbeatRequest_v1,
    HeartbeatResponse_v1,
    JoinGroupRequest,
    SyncGroupRequest,
)
from aiokafka.protocol.types import Int32, Schema, String

log = structlog.get_logger(__name__)

_FENCED_INSTANCE_ID = 82


class _HeartbeatResponse(Response):  # type: ignore[misc]
    API_KEY = HeartbeatRequest.API_KEY
    API_VERSION = 3
    SCHEMA = HeartbeatResponse_v1.SCHEMA


class _HeartbeatStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = HeartbeatRequest.API_KEY
    API_VERSION = 3
    RESPONSE_TYPE = _HeartbeatResponse
    SCHEMA = Schema(
        ("group", String("utf-8")),
        ("generation_id", Int32),
        ("member_id", String("utf-8")),
        ("group_instance_id", String("utf-8")),
    )


class _Heartbeat(Request[HeartbeatRequest_v1 | _HeartbeatStruct]):  # type: ignore[misc]
    """A heartbeat that says the member's name, where the broker takes one (Kafka 2.3)."""

    API_KEY = HeartbeatRequest.API_KEY

    def __init__(self, plain: HeartbeatRequest, name: str) -> None:
        self._said = (plain._group, plain._generation_id, plain._member_id)  # noqa: SLF001
        self._name = name

    def build(self, request_struct_class: type[RequestStruct]) -> RequestStruct:
        """The request in the newest version that both sides know."""
        more = (self._name,) if request_struct_class is _HeartbeatStruct else ()
        return request_struct_class(*self._said, *more)


class Membership:
    """A consumer's place in its group: kept by name over a kill, given up when another takes it, left in order."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        """Take care of a consumer that is not started; one without a `group_instance_id` stays as it is."""
        self._consumer = consumer
        client = consumer._client  # noqa: SLF001 (aiokafka is pinned below 0.15)
        self._send = client.send
        client.send = self._send_named

    def give_up(self) -> None:
        """Be an ordinary member from now on. One that closes leaves its group; a named one would not say so."""
        coordinator = self._consumer._coordinator  # noqa: SLF001
        if coordinator is not None:
            coordinator._group_instance_id = None  # noqa: SLF001

    async def _send_named(self, node_id: Any, request: Any, **options: Any) -> Any:
        coordinator = self._consumer._coordinator  # noqa: SLF001
        name = coordinator and coordinator._group_instance_id  # noqa: SLF001
        if not name or not isinstance(request, HeartbeatRequest | JoinGroupRequest | SyncGroupRequest):
            return await self._send(node_id, request, **options)
        said = _Heartbeat(request, name) if isinstance(request, HeartbeatRequest) else request
        response = await self._send(node_id, said, **options)
        if response.error_code == _FENCED_INSTANCE_ID:
            log.warning("another process has this member's name; going on without one", member=name)
            self.give_up()
            response.error_code = UnknownMemberIdError.errno  # aiokafka joins anew
        return response
