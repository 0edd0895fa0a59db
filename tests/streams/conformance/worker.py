"""A process that runs one toy stage on one host; its settings are one JSON argument."""

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from streams import delivery
from streams.host_faust import FaustHost
from streams.host_raw import RawHost
from streams.kafka import Kafka, KafkaSettings
from tests.streams.conformance.toys import EchoStage, TableStage, WindowStage

HOSTS: dict[str, Any] = {"raw": RawHost, "faust": FaustHost}


def make(stage: str, source: str, target: str, control: Path) -> EchoStage | WindowStage | TableStage:
    """The toy stage of that name."""
    if stage == "echo":
        return EchoStage(source, target, control)
    if stage == "window":
        return WindowStage(source, target)
    return TableStage(source, control / "table.sqlite", control)


def go_through(port: int, broker: int) -> None:
    """Let every connection to the broker's port go to another one: a proxy that delays."""
    connect = asyncio.BaseEventLoop.create_connection

    async def rerouted(self: Any, factory: Any, host: Any = None, at: Any = None, **options: Any) -> Any:
        return await connect(self, factory, host, port if at == broker else at, **options)

    asyncio.BaseEventLoop.create_connection = rerouted  # type: ignore[assignment,method-assign]


async def main(settings: dict[str, Any]) -> None:
    kafka = Kafka(KafkaSettings(**settings["kafka"]))
    if "via" in settings:
        go_through(settings["via"], int(kafka.settings.bootstrap_servers.rpartition(":")[2]))
    if "transaction_timeout_ms" in settings:
        delivery.TRANSACTION_TIMEOUT_MS = settings["transaction_timeout_ms"]
        delivery._COMMIT_TIMEOUT_S = settings["transaction_timeout_ms"] / 1000 + 2
    control = Path(settings["control"])
    stage = make(settings["stage"], settings["source"], settings["target"], control)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    host = HOSTS[settings["host"]](
        kafka, stage, epochs=lambda _: settings["epoch"], status=Path(settings["status"]), member=settings.get("member")
    )
    await host.run(stop)


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
