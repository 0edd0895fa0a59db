"""The embedded broker behind TLS and a password: who gets in, what the others are told, what survives a restart."""

import asyncio
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import NewTopic

from infra.local.broker import HOST, Broker
from infra.tls import certificates, embedded
from infra.tls.places import files
from streams.client import RefusedError
from streams.kafka import Kafka, KafkaSettings
from streams.liveness import Liveness
from streams.workers import until_broker_answers


async def told(settings: KafkaSettings) -> str:
    kafka = Kafka(settings)
    with pytest.raises(RefusedError) as refused:
        async with kafka.admin():
            pass
    return kafka.away(refused.value)


async def until(true: Callable[[], bool]) -> None:
    """What comes by retries of aiokafka has no event to wait for."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def by_password(broker: Broker, secure: Path, **more: Any) -> KafkaSettings:
    """As a person would write it who connects from elsewhere."""
    parts = files(secure)
    given = {
        "bootstrap_servers": broker.bootstrap_servers,
        "security_protocol": "SASL_SSL",
        "sasl_username": "rewatch",
        "sasl_password": parts.password.read_text(),
        "ssl_cafile": parts.authority,
    }
    return KafkaSettings(**(given | more))


async def append(kafka: Kafka, value: bytes) -> None:
    producer = kafka.producer(transactional_id="one")
    try:
        await producer.start()
        async with producer.transaction():
            await producer.send("kept", value, partition=0)
    finally:
        await producer.stop()


@pytest.mark.real
@pytest.mark.timeout(600)
async def test_a_log_that_was_open_is_locked_and_opens_to_the_password_of_the_day_alone(tmp_path: Path) -> None:
    data, secure = tmp_path / "kafka", tmp_path / "data"
    broker = Broker(data, 0)
    await broker.start()
    try:
        kafka = Kafka(broker.client_settings)
        async with kafka.admin() as admin:
            await admin.create_topics([NewTopic("kept", 1, 1)])
        await append(kafka, b"open")
    finally:
        await broker.stop()

    broker = Broker(data, broker.port, secure=secure)
    await broker.start()
    try:
        kafka = Kafka(broker.client_settings)
        await append(kafka, b"locked")
        address = broker.bootstrap_servers
        for settings, words in (
            (KafkaSettings(bootstrap_servers=address), "hangs up at once"),
            (by_password(broker, secure, sasl_password="guess"), "refuses the password; correct kafka.sasl_username"),
            (by_password(broker, secure, sasl_username="root"), "refuses the password; correct kafka.sasl_username"),
            (by_password(broker, secure, sasl_mechanism="SCRAM-SHA-512"), "SASL mechanism; set kafka.sasl_mechanism"),
            (by_password(broker, secure, sasl_mechanism="PLAIN"), "SASL mechanism; set kafka.sasl_mechanism"),
            (by_password(broker, secure, ssl_cafile=None), "nobody we trust; set kafka.ssl_cafile"),
            (by_password(broker, secure, security_protocol="SASL_PLAINTEXT", ssl_cafile=None), "kafka.security_proto"),
        ):
            assert words in await told(settings)
        await _only_the_broker_itself_gets_in_behind(broker, secure)
        await _a_worker_says_that_it_is_refused_and_goes_on_once_it_is_not(broker, secure)
        old = Kafka(by_password(broker, secure))
        async with old.reading() as consumer:
            consumer.assign([TopicPartition("kept", 0)])
            async with asyncio.timeout(30):
                assert [(await consumer.getone()).value for _ in range(2)] == [b"open", b"locked"]
            await broker.stop()
            files(secure).password.unlink()
            broker = Broker(data, broker.port, secure=secure)
            await broker.start()
            # It has its connection no more, and tries again by itself without a word.
            fetching = asyncio.create_task(consumer.getone())
            await until(lambda: old.waiting_on == "broker (refuses the password)")
            fetching.cancel()
            await asyncio.wait([fetching])
        assert "refuses the password" in old.away(TimeoutError())
        await append(kafka, b"again")  # its clients read the password when they connect
        assert len(await kafka.read([TopicPartition("kept", 0)])) == 3
    finally:
        await broker.stop()
    kept = [data / "node.pem", data / "keystore.pem", files(secure).password, files(secure).key]
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


async def _only_the_broker_itself_gets_in_behind(broker: Broker, secure: Path) -> None:
    """By the ports of its talk with itself: no password is asked for there, but its own certificate."""
    folder = secure / "tls"
    for port in (broker._internal_port, broker._controller_port):
        node = broker.data_dir / "node.pem"
        behind: dict[str, Any] = {
            "bootstrap_servers": f"{HOST}:{port}",
            "security_protocol": "SSL",
            "ssl_cafile": node,
        }
        assert "wants a certificate of ours; set kafka.ssl_certfile" in await told(KafkaSettings(**behind))
        authority = certificates.Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes())
        pair = certificates.issue(authority, "rewatch client", (), datetime.now(UTC))
        certificate, key = secure / "client.pem", secure / "client.key"
        certificate.write_bytes(pair.certificate)
        key.write_bytes(pair.key)
        mine = KafkaSettings(**behind, ssl_certfile=certificate, ssl_keyfile=key)
        refused = await told(mine)
        assert "refuses our certificate" in refused or "wants a certificate of ours" in refused
    own = KafkaSettings(**behind, ssl_certfile=node, ssl_keyfile=node)
    own = own.model_copy(update={"bootstrap_servers": f"{HOST}:{broker._internal_port}"})
    async with Kafka(own).admin() as admin:
        assert (await admin.describe_cluster())["brokers"]


async def _a_worker_says_that_it_is_refused_and_goes_on_once_it_is_not(broker: Broker, secure: Path) -> None:
    password = secure / "password"
    password.write_text("yesterday's\n")
    kafka = Kafka(by_password(broker, secure, sasl_password=None, sasl_password_file=password))
    life, stop = Liveness("detect"), asyncio.Event()
    waiting = asyncio.create_task(until_broker_answers(kafka, life, stop))
    await until(lambda: life.report()["waiting_on"] == ["broker (refuses the password)"])
    password.write_text(files(secure).password.read_text() + "\n")
    assert await waiting
    assert life.report()["waiting_on"] == []


def test_the_certificate_is_made_anew_before_it_ends_and_after_a_kill_between_its_halves(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    first = embedded.prepare(tmp_path, now)
    seen = {path: path.read_bytes() for path in first}
    assert {path: path.read_bytes() for path in embedded.prepare(tmp_path, now)} == seen
    almost = certificates.read(seen[first.certificate]).ends.replace(microsecond=0)
    embedded.prepare(tmp_path, almost)
    renewed = first.certificate.read_bytes()
    assert renewed != seen[first.certificate]
    assert first.authority.read_bytes() == seen[first.authority]
    first.key.write_bytes(seen[first.key])  # as a kill leaves it that comes between key and certificate
    embedded.prepare(tmp_path, almost)
    assert certificates.matches(certificates.Pair(first.certificate.read_bytes(), first.key.read_bytes()))
    first.certificate.write_text("torn")
    embedded.prepare(tmp_path, almost)
    assert certificates.signed_by(first.certificate.read_bytes(), first.authority.read_bytes())
