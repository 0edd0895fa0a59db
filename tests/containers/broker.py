"""Stands in for Redpanda in a container: the embedded Apache Kafka, listening to the network as `redpanda`.

Where secure.yaml gives it a password and a certificate, it listens with TLS and SCRAM, and without them to its own
container alone, as Redpanda is told to.
"""

import asyncio
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from infra.local.broker import Broker

DATA = Path("/var/lib/redpanda/data")
SECRETS = Path("/run/secrets")
PORT = 9092
INSIDE_PORT = 9093
CONTROLLER_PORT = 9094
ADVERTISED = os.environ.get("KAFKA_ADVERTISED", "redpanda")


def plain() -> Broker:
    """The broker as compose.yaml has it."""
    return Broker(
        DATA,
        PORT,
        controller_port=CONTROLLER_PORT,
        settings={
            "listeners": f"PLAINTEXT://0.0.0.0:{PORT},CONTROLLER://127.0.0.1:{CONTROLLER_PORT}",
            "advertised.listeners": f"PLAINTEXT://{ADVERTISED}:{PORT}",
        },
    )


def secure() -> Broker:
    """The broker as secure.yaml has it."""
    # Kafka reads the key and the certificate from one file.
    pair = Path("/tmp/redpanda.pem")
    pair.write_text((SECRETS / "tls_redpanda_key").read_text() + (SECRETS / "tls_redpanda").read_text())
    inside = f"PLAINTEXT://127.0.0.1:{INSIDE_PORT}"
    settings: Mapping[str, object] = {
        "listeners": f"{inside},SASL_SSL://0.0.0.0:{PORT},CONTROLLER://127.0.0.1:{CONTROLLER_PORT}",
        "advertised.listeners": f"{inside},SASL_SSL://{ADVERTISED}:{PORT}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": "SCRAM-SHA-256",
        "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "listener.name.sasl_ssl.ssl.keystore.type": "PEM",
        "listener.name.sasl_ssl.ssl.keystore.location": pair,
    }
    return Broker(DATA, INSIDE_PORT, controller_port=CONTROLLER_PORT, settings=settings)


async def make_user(broker: Broker, name: str, password: str) -> None:
    """Make the user, or give it its password anew."""
    spec = await broker.spec()
    java = spec.argv[: spec.argv.index("kafka.Kafka")]
    tool = await asyncio.create_subprocess_exec(
        *(*java, "kafka.admin.ConfigCommand", "--bootstrap-server", broker.bootstrap_servers, "--alter"),
        *("--add-config", f"SCRAM-SHA-256=[password={password}]", "--entity-type", "users", "--entity-name", name),
    )
    assert await tool.wait() == 0


async def main() -> None:
    """Run until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    password = SECRETS / "kafka_password"
    broker = secure() if password.exists() else plain()
    await broker.start()
    if password.exists():
        await make_user(broker, "rewatch", password.read_text())
    print("broker answers", flush=True)
    await stop.wait()
    await broker.stop()


if __name__ == "__main__":
    asyncio.run(main())
