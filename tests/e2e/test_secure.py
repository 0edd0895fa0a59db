"""The whole road on a log that asks for TLS and a password: nobody but the installation itself is let in."""

import asyncio
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.config import Settings
from infra.installation import Installation
from infra.tls.places import files
from streams.client import RefusedError
from streams.kafka import Kafka, KafkaSettings
from tests.e2e.installation import CAMERAS, Audit, Feeder, kill, pictures, settings_for
from tests.e2e.test_kills import drained

FRAMES = 12


async def rewatch(*arguments: str) -> Any:
    """What a command says with --json, run as a person runs it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "infra.cli", *arguments, "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, (arguments, out.decode(), err.decode())
    return json.loads(out)


async def refusal_of(kafka: Kafka) -> str:
    """How the broker's refusal of a client is told."""
    with pytest.raises(RefusedError) as refused:
        async with kafka.admin():
            pass
    return kafka.away(refused.value)


def strangers(settings: Settings) -> dict[str, KafkaSettings]:
    """Clients that are not of this installation, by what they are to be told."""
    ours, parts = settings.kafka, files(settings.data_dir)
    address = ours.bootstrap_servers
    return {
        "hangs up at once": KafkaSettings(bootstrap_servers=address),
        "refuses the password": KafkaSettings(
            bootstrap_servers=address,
            security_protocol="SASL_SSL",
            sasl_username="rewatch",
            sasl_password="a guess",
            ssl_cafile=parts.authority,
        ),
        "of nobody we trust": ours.model_copy(update={"ssl_cafile": None}),
    }


@pytest.mark.real
@pytest.mark.timeout(300)
async def test_from_upload_to_event_over_tls_and_a_password_through_a_kill_of_the_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust carries detect, batch and enrich; the raw host analyze and sink; commands find their way by themselves."""
    settings = settings_for(tmp_path, monkeypatch, LOCAL__KAFKA_SECURE="true", STAGES__ANALYZE__HOST="raw")
    shots = await asyncio.to_thread(pictures)
    async with Installation(settings) as installation:
        feeder = Feeder(settings, shots)
        load = [asyncio.create_task(feeder.upload(camera, FRAMES, story_s=FRAMES / 2)) for camera in CAMERAS]
        while len(feeder.accepted) < len(CAMERAS) * FRAMES / 2:
            await asyncio.sleep(0.1)
        kill(installation, "kafka")
        await asyncio.gather(*load)
        await feeder.end(CAMERAS)
        await drained(settings)
        audit = Audit(settings)
        await audit.read()
        assert audit.violations(feeder.accepted) == []
        assert await asyncio.to_thread(audit.violations_in_clickhouse) == []
        assert len(audit.records["risk_events"]) >= 2 * len(CAMERAS)

        status, _, doctor = await asyncio.gather(rewatch("status"), rewatch("camera", "add", "gate"), rewatch("doctor"))
        assert status["problems"] == []
        checks = {check["name"]: check for check in doctor["checks"]}
        assert checks["broker"]["status"] == "ok"
        for told, stranger in strangers(settings).items():
            assert told in await refusal_of(Kafka(stranger))

    parts = files(settings.data_dir)
    password = parts.password.read_bytes()
    assert len(password) > 30
    assert {stat.S_IMODE(path.stat().st_mode) for path in (parts.password, parts.key)} == {0o600}
    elsewhere = [path for path in settings.data_dir.rglob("*") if path.is_file() and path != parts.password]
    assert [path for path in elsewhere if password in path.read_bytes()] == []
