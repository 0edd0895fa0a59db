"""No secret is ever told: a canary in every secret setting and in every address, real processes, and a search.

The settings are taken from the model itself, so one that is new is covered on the day it is made.
"""

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from joserfc import jwk, jwt
from pydantic import BaseModel, Secret, SecretStr
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from infra.cli.config import in_force
from infra.config import ConfigError, Settings, load
from infra.local.process import free_port
from infra.local.stack import LocalStack
from infra.masks import secrets_of
from streams.kafka import Kafka
from streams.serving import EndpointSettings
from streams.topics import TOPICS
from tests.conftest import PARTITIONS
from tests.infra.cli_kit import invoke
from tests.processors.camera_kit import Camera, camera
from tests.processors.ingest_kit import jpeg

MARK = f"canary-{secrets.token_hex(3)}-"
DOORS = ("gateway", "ingest.upload", "metrics", "detector.service")
ISSUER = "https://id.example"


class Planted(NamedTuple):
    """What a test put where."""

    environment: dict[str, str]
    canaries: dict[str, str]
    """By the settings' dotted names."""

    def told_in(self, texts: Mapping[str, bytes]) -> dict[str, list[str]]:
        """Which texts tell which settings' canaries."""
        found = {what: self.found_in(text) for what, text in texts.items()}
        return {what: names for what, names in found.items() if names}

    def found_in(self, text: str | bytes) -> list[str]:
        """The settings whose canaries are told there."""
        said = text if isinstance(text, bytes) else text.encode()
        return [name for name, canary in self.canaries.items() if canary.encode() in said]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every setting and its types; maps of sections have one section named `gate`."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        mapped = get_origin(field.annotation) is dict
        for kind in inner:
            yield from leaves(kind, f"{prefix}{name}.{'gate.' if mapped else ''}")
        if not inner:
            yield f"{prefix}{name}", kinds


SECRETS = sorted(
    name
    for name, kinds in leaves(Settings)
    if any(isinstance(kind, type) and issubclass(kind, Secret | SecretStr) for kind in kinds)
)
ADDRESSES = sorted(
    name
    for name, kinds in leaves(Settings)
    if name not in SECRETS and str in kinds and (name.endswith("url") or name == "images")
)


def variable(name: str) -> str:
    return f"REWATCH_{name.upper().replace('.', '__')}"


def plant(
    monkeypatch: pytest.MonkeyPatch, addresses: Mapping[str, str], *, without: tuple[str, ...] = (), **more: str
) -> Planted:
    """A canary in every secret setting, and in the user and password of every address that takes one."""
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        if name not in {"REWATCH_DATA_DIR", "REWATCH_KAFKA__SYSTEM", "REWATCH_KAFKA__PARTITIONS"}:
            monkeypatch.delenv(name)
    canaries = {
        name: f"{MARK}{number}-{secrets.token_hex(16)}" for number, name in enumerate(SECRETS) if name not in without
    }
    canaries["detector.api_key"] = canaries["detector.service.api_key"]  # the service's own
    environment = {variable(name): canary for name, canary in canaries.items()} | {
        variable(f"{door}.jwt.issuer"): ISSUER for door in DOORS
    }
    camera_url = addresses["ingest.snapshots.gate.url"].split("://")[1]
    secret = canaries["ingest.snapshots.gate.url"]
    environment |= {
        "REWATCH_INGEST__SNAPSHOTS__GATE__URL": f"http://viewer:{secret}@{camera_url}/snap.jpg?token={secret}",
        "REWATCH_INGEST__SNAPSHOTS__GATE__EVERY_S": "0.1",
        "REWATCH_INGEST__SNAPSHOTS__YARD__URL": f"http://{camera_url}/yard.jpg",
        "REWATCH_INGEST__SNAPSHOTS__YARD__USER": "viewer",
        "REWATCH_INGEST__SNAPSHOTS__YARD__PASSWORD": secret,
        "REWATCH_INGEST__SNAPSHOTS__YARD__EVERY_S": "0.1",
        **{variable(f"{door}.port"): str(free_port()) for door in DOORS},
        **more,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for number, name in enumerate(name for name in ADDRESSES if name not in without):
        canary = f"{MARK}url-{number}-{secrets.token_hex(16)}"
        scheme, _, rest = addresses.get(name, "http://127.0.0.1:9").partition("://")
        monkeypatch.setenv(variable(name), f"{scheme}://me:{canary}@{rest}")
        if _taken():
            canaries[name] = canary
        elif name in addresses:
            monkeypatch.setenv(variable(name), addresses[name])
        else:
            monkeypatch.delenv(variable(name))
    return Planted(environment, canaries)


def _taken() -> bool:
    try:
        load()
    except ConfigError:
        return False
    return True


async def run(*argv: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )


async def ended(process: asyncio.subprocess.Process) -> str:
    if process.returncode is None:
        process.terminate()
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    return said.decode()


async def until(
    what: Callable[[], Awaitable[bool]], workers: list[asyncio.subprocess.Process], within_s: float = 60
) -> None:
    async with asyncio.timeout(within_s):
        while True:
            gone = [worker for worker in workers if worker.returncode is not None]
            assert not gone, await ended(gone[0])
            try:
                if await what():
                    return
            except (httpx.TransportError, OSError, ValueError):
                pass
            await asyncio.sleep(0.1)


def below(folder: Path) -> dict[str, bytes]:
    """Every file that processes left; certificates' keys are where they belong."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tls" not in path.parts
    }


@asynccontextmanager
async def reader(stack: LocalStack) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(bootstrap_servers=stack.bootstrap_servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def _ends(consumer: AIOKafkaConsumer) -> dict[TopicPartition, int]:
    counts = {name: 1 if topic.single else PARTITIONS for name, topic in TOPICS.items()}
    return dict(await consumer.end_offsets([TopicPartition(name, n) for name in counts for n in range(counts[name])]))


async def ends(stack: LocalStack) -> dict[TopicPartition, int]:
    async with reader(stack) as consumer:
        return await _ends(consumer)


async def since(stack: LocalStack, before: Mapping[TopicPartition, int]) -> bytes:
    """All that came on the log since then, with its topics' names: keys, headers, bytes."""
    said = bytearray()
    async with reader(stack) as consumer:
        until_ = {place: end for place, end in (await _ends(consumer)).items() if end > before.get(place, 0)}
        if not until_:
            return b""
        consumer.assign(list(until_))
        for place in until_:
            consumer.seek(place, before.get(place, 0))
        while any([await consumer.position(place) < end for place, end in until_.items()]):
            for place, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    said += b"%s %r %r " % (place.topic.encode(), record.key, record.headers) + (record.value or b"")
    return bytes(said)


def test_every_secret_setting_is_known_to_the_masks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"gateway.api_key", "gateway.jwt.secret", "kafka.sasl_password", "ingest.snapshots.gate.url"} <= set(SECRETS)
    assert {"detector.url", "llm.url", "clickhouse.url"} <= set(ADDRESSES)
    planted = plant(
        monkeypatch,
        {"ingest.snapshots.gate.url": "http://127.0.0.1:9"},
        REWATCH_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:9",
        REWATCH_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        REWATCH_KAFKA__SASL_USERNAME="me",
    )
    settings = load()
    known = "\n".join(secrets_of(settings))
    assert set(planted.found_in(known)) >= set(SECRETS)
    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert [name for name in planted.found_in(shown) if name in SECRETS] == []


def test_settings_that_are_wrong_are_told_without_the_secrets_beside_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("REWATCH_")]:
        monkeypatch.delenv(name)
    canary, file = f"{MARK}wrong", tmp_path / "rewatch.yaml"
    address, beside = f"http://me:{canary}@127.0.0.1:9", {"nonsense": 1, "port": "x", "timeout_s": "x"}
    for name in (*SECRETS, *ADDRESSES):
        *sections, setting = name.split(".")
        plain = ((canary, beside), ({"x": [canary]}, {})) if name in SECRETS else ()
        addresses = ((address, {}), (address, beside), ([f"{address}:x"], {}))
        for value, more in (*plain, *addresses):
            tree: dict[str, Any] = {setting: value} | more
            for part in reversed(sections):
                tree = {part: tree}
            file.write_text(json.dumps(tree))
            try:
                said = repr(in_force(load()))
            except ConfigError as error:
                said = f"{error}{error.__cause__}"
            assert canary not in said, (name, tree)


COMMANDS = (
    ("config", "show"),
    ("config", "show", "--json"),
    ("-v", "status"),
    ("status", "--json"),
    ("-v", "doctor"),
    ("doctor", "--json"),
    ("dlq", "ls", "--json"),
    ("camera", "ls"),
    ("events", "ls"),
    ("sql", "SELECT nothing"),
)


def commanded() -> dict[str, bytes]:
    """What commands say, and what they fail with."""
    told = {}
    for arguments in COMMANDS:
        said = invoke(*arguments)
        told[" ".join(arguments)] = said.output.encode() + repr(said.exception).encode()
    return told


async def test_nothing_that_works_tells_a_secret(
    stack: LocalStack, settings: Settings, kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = await ends(stack)
    async with camera() as cam:
        detector = f"http://127.0.0.1:{free_port()}"
        planted = plant(
            monkeypatch,
            {
                "ingest.snapshots.gate.url": cam.url,
                "clickhouse.url": stack.clickhouse_url,
                "llm.url": stack.llm_url,
                "images": f"file://{tmp_path}/images",
            },
            # This broker asks for none, and settings that would send one are refused; a user in the detector's address
            # goes before its key.
            without=("kafka.sasl_password", "detector.url"),
            REWATCH_DETECTOR__URL=detector,
            REWATCH_KAFKA__BOOTSTRAP_SERVERS=stack.bootstrap_servers,
            REWATCH_DETECTOR__SERVICE__PORT=detector.rpartition(":")[2],
            REWATCH_LOG_LEVEL="debug",
        )
        told = await _work(load(), planted, cam, stack, before)
    told |= await asyncio.to_thread(commanded)
    told |= below(settings.data_dir)
    told["log"] = await since(stack, before)
    assert planted.told_in(told) == {}
    assert b"no such camera" in told["log"]


async def _work(
    settings: Settings, planted: Planted, cam: Camera, stack: LocalStack, before: Mapping[TopicPartition, int]
) -> dict[str, bytes]:
    """Everything that processes say while they work, and to whoever asks them rightly and wrongly."""

    def echo(request: Request) -> Response:
        return Response(f"no such camera: {request.url} {dict(request.headers)}", headers={"x-asked": str(request.url)})

    def lost(request: Request) -> Response:
        return RedirectResponse(f"http://elsewhere.example{request.url.path}?{request.url.query}")

    def locked(request: Request) -> Response:
        return Response(f"{request.url}", 401, headers={"www-authenticate": f'Basic realm="{request.url.query}"'})

    cam.says(jpeg(1), jpeg(2), echo, lost, echo, lost, jpeg(3), locked)
    workers = [
        await run(*argv)
        for argv in (
            *(("infra.worker", stage) for stage in ("gateway", "ingest", "detect", "analyze")),
            ("infra.cli", "serve", "detector"),
        )
    ]
    told: dict[str, bytes] = {}
    try:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            doors = (settings.gateway, settings.ingest.upload, settings.detector.service)

            async def up() -> bool:
                return all([(await http.get(f"{door.url}/health")).status_code in {200, 503} for door in doors])

            await until(up, workers)
            for door in doors:
                told |= {f"{door.section} {n}": said for n, said in enumerate(await _asked(http, door, planted))}

            async def done() -> bool:
                return b"no such camera" in (said := await since(stack, before)) and b"frames" in said

            await until(done, workers)
            for path in (settings.data_dir / "status").glob("*.json"):
                scraped = json.loads(path.read_text()).get("metrics")
                if scraped is None:  # of the replay stage beside analyze
                    continue
                for key in (planted.canaries["metrics.api_key"], "wrong"):
                    answer = await http.get(scraped, headers={"x-api-key": key})
                    told[f"metrics of {path.stem}"] = answer.content
        for worker in workers:
            told[f"argv {worker.pid}"] = Path(f"/proc/{worker.pid}/cmdline").read_bytes()
    finally:
        for number, said in enumerate(await asyncio.gather(*map(ended, workers))):
            told[f"output {number}"] = said.encode()
    return told


async def _asked(http: httpx.AsyncClient, door: EndpointSettings, planted: Planted) -> list[bytes]:
    """The answers of a door to keys and tokens, right and wrong, and to much that is wrong in other ways."""
    key, secret = planted.canaries[f"{door.section}.api_key"], planted.canaries[f"{door.section}.jwt.secret"]
    claims = {"iss": ISSUER, "aud": "rewatch", "exp": int(time.time()) + 600, "scope": "read"}
    token, old = (
        jwt.encode({"alg": "HS256"}, claims | more, jwk.OctKey.import_key(secret)) for more in ({}, {"exp": 1})
    )
    planted.canaries[f"a token of {door.section}"] = token.rpartition(".")[2]
    planted.canaries[f"an old token of {door.section}"] = old.rpartition(".")[2]
    planted.canaries[f"a wrong key at {door.section}"] = wrong = f"{MARK}wrong-{secrets.token_hex(16)}"
    told = []
    for credential in ("", key, token, old, wrong):
        headers = {"x-api-key": credential}
        for method, path in (
            ("GET", "/api/health"),
            ("GET", "/pipeline"),
            ("GET", f"/api/events?before={credential}x"),
            ("POST", "/api/upload?camera=none-such"),
            ("POST", "/detect"),
            ("POST", f"/login?key={credential}"),
            ("GET", "/metrics"),
            ("GET", "/nothing"),
        ):
            answer = await http.request(method, door.url + path, headers=headers, content=b"\xff\xd8no picture")
            told.append(answer.content.replace(f"before={credential}x".encode(), b"") + repr(answer.headers).encode())
    form = {"key": key, "next": "/pipeline"}
    answer = await http.post(f"{door.url}/login", data=form, headers={"origin": door.url})
    return [*told, answer.content + repr(answer.headers).encode()]


async def test_nothing_that_fails_tells_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where every service is away: errors, waits and tracebacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REWATCH_DATA_DIR", str(tmp_path / "data"))
    away = "http://127.0.0.1:9"
    names = ("ingest.snapshots.gate.url", "clickhouse.url", "llm.url", "detector.url")
    planted = plant(
        monkeypatch,
        dict.fromkeys(names, away) | {"images": "s3://bucket"},
        REWATCH_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:9",
        REWATCH_KAFKA__SECURITY_PROTOCOL="SASL_PLAINTEXT",
        REWATCH_KAFKA__SASL_USERNAME="me",
        REWATCH_LOG_LEVEL="debug",
    )
    settings = load()
    workers = [await run("infra.worker", stage) for stage in ("gateway", "ingest", "analyze")]
    told: dict[str, bytes] = {}
    try:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:

            async def up() -> bool:  # the others wait for the broker, and say so
                return (await http.get(f"{settings.gateway.url}/health")).status_code == 200

            await until(up, workers)
            told |= {f"gateway {n}": said for n, said in enumerate(await _asked(http, settings.gateway, planted))}
            told |= await asyncio.to_thread(commanded)
    finally:
        for number, said in enumerate(await asyncio.gather(*map(ended, workers))):
            told[f"output {number}"] = said.encode()
    told |= below(settings.data_dir)
    assert planted.told_in(told) == {}
