"""What people are told of a broker that is there and does not take them, or that they cannot take."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaConnectionError,
    NodeNotReadyError,
    TopicAuthorizationFailedError,
    UnsupportedSaslMechanismError,
)
from pydantic import ValidationError

from infra.tls import certificates
from infra.tls.certificates import Pair
from streams.client import RefusedError
from streams.kafka import Kafka, KafkaSettings
from streams.refusals import refusal_in
from tests.streams.test_client import SilentBroker

NOW = datetime.now(UTC)
OURS = certificates.authority("ours", NOW)
THEIRS = certificates.authority("theirs", NOW)
HERE = ("127.0.0.1",)


def written(folder: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    certificate.write_bytes(pair.certificate)
    key.write_bytes(pair.key)
    return certificate, key


@contextlib.asynccontextmanager
async def tls_before(port: int, folder: Path, server: Pair) -> AsyncIterator[str]:
    """Takes TLS off before the real broker."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*written(folder, "server", server))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


async def told(kafka: Kafka) -> str:
    with pytest.raises(RefusedError) as refused:
        async with kafka.admin():
            pass
    assert "," not in kafka.waiting_on  # it would be taken for two things that are waited on
    assert kafka.waiting_on.startswith("broker (")
    return kafka.away(refused.value)


def port_of(kafka: Kafka) -> int:
    return int(kafka.settings.bootstrap_servers.rpartition(":")[2])


CERTIFICATES = {
    "has expired; give the broker a new one": certificates.issue(OURS, "old", HERE, NOW - timedelta(days=900)),
    "is not valid yet; give the broker a new one": certificates.issue(OURS, "new", HERE, NOW + timedelta(days=9)),
    "for another name; ask for it in kafka.bootstrap_servers": certificates.issue(OURS, "n", ("kafka",), NOW),
    "of nobody we trust; set kafka.ssl_cafile": certificates.issue(THEIRS, "theirs", HERE, NOW),
}


@pytest.mark.parametrize(("words", "pair"), CERTIFICATES.items())
async def test_a_certificate_that_cannot_be_taken_is_told_with_its_fix(
    kafka: Kafka, tmp_path: Path, words: str, pair: Pair
) -> None:
    authority, _ = written(tmp_path, "ca", OURS)
    async with tls_before(port_of(kafka), tmp_path, pair) as address:
        secured = Kafka(KafkaSettings(bootstrap_servers=address, security_protocol="SSL", ssl_cafile=authority))
        found = await told(secured)
        assert words in found
        assert f"{address} (kafka.bootstrap_servers)" in found


async def test_tls_asked_of_a_port_without_it_names_the_setting(kafka: Kafka) -> None:
    secured = Kafka(KafkaSettings(bootstrap_servers=kafka.settings.bootstrap_servers, security_protocol="SSL"))
    assert "kafka.security_protocol" in await told(secured)


async def test_a_broker_that_is_slow_is_not_said_to_be_away(kafka: Kafka) -> None:
    async with SilentBroker(port_of(kafka)).running() as broker:
        silent = Kafka(KafkaSettings(bootstrap_servers=f"127.0.0.1:{broker.port}"))
        starting = asyncio.ensure_future(silent.bounds([]))
        await broker.asked.wait()
        starting.cancel()
        await asyncio.wait([starting])
        assert "slow to answer; look at its log" in silent.away(TimeoutError())
        assert "no answer" not in silent.away(TimeoutError())


def test_a_broker_that_nobody_has_reached_is_away() -> None:
    kafka = Kafka(KafkaSettings(bootstrap_servers="192.0.2.1:9092"))
    assert kafka.away(TimeoutError(), "call for help") == (
        "no answer from the broker at 192.0.2.1:9092 (kafka.bootstrap_servers); call for help: TimeoutError"
    )
    assert kafka.away(KafkaConnectionError("x")).startswith("no answer from")


def test_what_failed_for_lack_of_a_connection_is_told_by_why_there_is_none() -> None:
    """Requests that aiokafka tries again and again end with nothing but `NodeNotReadyError`."""
    kafka = Kafka(KafkaSettings(bootstrap_servers="192.0.2.2:9092"))
    error = KafkaConnectionError("closed")
    error.__cause__ = ConnectionResetError()
    kafka.contact.failed(error)
    assert "hangs up at once" in kafka.away(NodeNotReadyError())
    assert kafka.waiting_on == "broker (hangs up at once)"
    kafka.contact.taken()
    assert "no answer" in kafka.away(NodeNotReadyError())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnsupportedSaslMechanismError(), "kafka.sasl_mechanism"),
        (IllegalSaslStateError(), "PLAINTEXT or SSL"),
        (TopicAuthorizationFailedError("frames"), "grant it to kafka.sasl_username"),
        (ValueError("Server sent wrong signature!"), "look who answers"),
        (KafkaConnectionError("refused"), None),
        (ConnectionRefusedError(), None),
        (TimeoutError(), None),
    ],
)
def test_each_refusal_has_its_fix_and_what_is_away_is_none(error: Exception, words: str | None) -> None:
    found = refusal_in(error)
    assert (found is None) if words is None else (found is not None and words in found.fix)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"security_protocol": "SASL_SSL"}, "kafka.sasl_username"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "u"}, "REWATCH_KAFKA__SASL_PASSWORD"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "u", "sasl_password": ""}, "kafka.sasl_password"),
        (
            {"security_protocol": "SASL_SSL", "sasl_username": "u", "sasl_password": "p", "sasl_password_file": "f"},
            "one of them",
        ),
        (
            {"security_protocol": "SASL_SSL", "sasl_username": "u", "sasl_password_file": "/nowhere"},
            "kafka.sasl_password_file: /nowhere: No such file",
        ),
        ({"sasl_password": "p"}, "SASL_SSL or SASL_PLAINTEXT"),
        ({"security_protocol": "SSL", "sasl_username": "u"}, "set kafka.security_protocol to SASL_SSL"),
        ({"ssl_cafile": "ca.pem"}, "SSL or SASL_SSL"),
        ({"security_protocol": "SSL", "ssl_cafile": "/nowhere"}, "kafka.ssl_cafile: /nowhere: No such file"),
        ({"security_protocol": "SSL", "ssl_cafile": "/etc/hosts"}, "kafka.ssl_cafile: /etc/hosts"),
        ({"security_protocol": "SSL", "ssl_certfile": "c.pem"}, "belong together"),
        ({"security_protocol": "SSL", "ssl_certfile": "/no", "ssl_keyfile": "/no"}, "kafka.ssl_certfile"),
    ],
)
def test_settings_that_cannot_open_the_broker_are_refused_by_name(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        KafkaSettings(**given)
    assert words in str(refused.value)
