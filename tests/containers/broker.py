"""Stands in for Redpanda in a container: the embedded Apache Kafka, listening to the network as `redpanda`."""

import asyncio
import signal
from pathlib import Path

from infra.local.broker import Broker

DATA = Path("/var/lib/redpanda/data")
CONTROLLER_PORT = 9093


async def main() -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    broker = Broker(
        DATA,
        9092,
        controller_port=CONTROLLER_PORT,
        settings={
            "listeners": f"PLAINTEXT://0.0.0.0:9092,CONTROLLER://127.0.0.1:{CONTROLLER_PORT}",
            "advertised.listeners": "PLAINTEXT://redpanda:9092",
        },
    )
    await broker.start()
    print("broker answers", flush=True)
    await stop.wait()
    await broker.stop()


if __name__ == "__main__":
    asyncio.run(main())
