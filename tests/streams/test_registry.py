"""Telling a schema registry our schemas: what it has then reads every record, and what goes wrong names its fix."""

import io
import json
from collections.abc import Iterator
from typing import Any

import fastavro
import httpx
import pytest
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from schemas import avro_schemas
from streams import codec
from streams.errors import UnavailableError
from streams.kafka import KafkaSettings
from streams.registry import RegistryError, SchemaRegistry, Told
from streams.topics import TOPICS
from tests.examples import RECORDS
from tests.streams.fake_registry import FakeRegistry

OTHER = {"type": "record", "name": "Other", "fields": [{"name": "a", "type": "int"}]}


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    made = FakeRegistry().start()
    yield made
    made.stop()


async def register(registry: FakeRegistry, **settings: Any) -> list[Told]:
    async with SchemaRegistry(KafkaSettings(schema_registry_url=registry.url, **settings)) as told:
        return await told.register()


def read_elsewhere(registry: FakeRegistry, value: bytes) -> Any:
    """A record as a stranger's consumer reads it: by the id in its frame, asking the registry and nobody else."""
    assert value[:1] == b"\x00"
    answer = httpx.get(f"{registry.url}/schemas/ids/{int.from_bytes(value[1:5], 'big')}").raise_for_status()
    body = io.BytesIO(value[5:])
    found = fastavro.schemaless_reader(body, fastavro.parse_schema(json.loads(answer.json()["schema"])), None)
    assert body.read() == b""
    return found


def test_no_two_schemas_have_one_id() -> None:
    ids = [codec.schema_id(one) for topic in avro_schemas.topics() for one in avro_schemas.by_fingerprint(topic)]
    assert len(set(ids)) == len(ids)
    assert set(TOPICS) == set(avro_schemas.topics())


async def test_every_record_of_every_topic_can_be_read_by_what_the_registry_was_told(registry: FakeRegistry) -> None:
    told = await register(registry)
    assert {one.subject for one in told} == {f"{topic}-value" for topic in TOPICS}
    assert all(one.registered and not one.there and not one.others for one in told)
    for topic, record in RECORDS.items():
        value, _ = codec.encode(topic, record)
        found = read_elsewhere(registry, value)
        assert set(found) == set(record.__struct_fields__), topic
    # Also what was written by versions before this one, in the order in which they came.
    for topic in avro_schemas.topics():
        ids = [codec.schema_id(one) for one in avro_schemas.documents(topic)]
        assert registry.subjects[f"{topic}-value"] == dict(enumerate(ids, start=1))
        assert [json.loads(registry.schemas[one])["name"] for one in ids]
    assert registry.modes == {}


async def test_registering_again_changes_nothing_and_a_new_version_is_added_behind_the_others(
    registry: FakeRegistry,
) -> None:
    await register(registry)
    before = json.dumps([registry.subjects, registry.schemas])
    registry.asked.clear()
    assert all(one.there and not one.registered for one in await register(registry))
    assert json.dumps([registry.subjects, registry.schemas]) == before
    assert {method for method, _ in registry.asked} == {"GET"}
    # As after an upgrade: the newest is not known yet.
    newest = registry.subjects["labels-value"].pop(2)
    del registry.schemas[newest]
    [added] = [one for one in await register(registry) if one.registered]
    assert added == Told("labels-value", (newest,), 1, ())
    assert registry.subjects["labels-value"][2] == newest


async def test_a_version_that_was_deleted_is_registered_again_under_another_number(registry: FakeRegistry) -> None:
    await register(registry)
    registry.deleted |= {("frames-value", 1)}
    [again] = [one for one in await register(registry) if one.registered]
    assert again.subject == "frames-value"
    assert registry.subjects["frames-value"][2] == registry.subjects["frames-value"][1]


async def test_one_that_was_killed_while_it_imported_is_gone_on_with(registry: FakeRegistry) -> None:
    await register(registry)
    registry.modes["frames-value"] = "IMPORT"
    await register(registry)
    assert registry.modes == {}


async def test_a_mode_that_somebody_set_stays(registry: FakeRegistry) -> None:
    registry.modes["frames-value"] = "READWRITE"
    await register(registry)
    assert registry.modes == {"frames-value": "READWRITE"}


async def test_what_goes_with_ours_stays_and_is_named(registry: FakeRegistry) -> None:
    newer = json.loads(next(iter(avro_schemas.documents("alerts").values())))
    newer["fields"].append({"name": "added", "type": "int", "default": 0})
    registry.put("alerts-value", newer, 7)
    told = {one.subject: one for one in await register(registry)}
    assert told["alerts-value"].others == (1,)
    assert set(registry.subjects["alerts-value"]) == {1, 2}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r.put("frames-value", OTHER, 7), "frames-value .* version 1, id 7, which does not go with"),
        (
            lambda r: r.put("frames-value", OTHER, codec.schema_id(avro_schemas.fingerprint("frames"))),
            "another schema under our id",
        ),
        (lambda r: setattr(r, "mode", "READONLY"), "READONLY"),
        (lambda r: r.modes.update({"frames-value": "READONLY"}), "frames-value is READONLY"),
        (lambda r: setattr(r, "login", "me:secret-word"), "REWATCH_KAFKA__SCHEMA_REGISTRY_PASSWORD"),
        (lambda r: setattr(r, "wrong", lambda _: PlainTextResponse("<html>")), "is no schema registry"),
        (lambda r: setattr(r, "wrong", lambda _: PlainTextResponse("?", 302)), "HTTP 302"),
    ],
)
async def test_what_does_not_go_is_said_before_anything_is_changed(registry: FakeRegistry, spoil, says: str) -> None:
    spoil(registry)
    before = json.dumps([registry.subjects, registry.schemas, registry.modes])
    with pytest.raises(RegistryError, match=says) as refused:
        await register(registry)
    assert "kafka.schema_registry" in str(refused.value)
    assert json.dumps([registry.subjects, registry.schemas, registry.modes]) == before


async def test_a_registry_without_import_mode_is_refused_with_the_version_that_has_it(registry: FakeRegistry) -> None:
    registry.imports = False
    with pytest.raises(RegistryError, match=r"Redpanda 25\.3"):
        await register(registry)
    assert registry.schemas == {}
    assert registry.modes == {}


async def test_one_that_fails_on_the_way_leaves_no_subject_importing(registry: FakeRegistry) -> None:
    def fail(request: Request) -> Response | None:
        return (
            PlainTextResponse("no leader", 503)
            if request.url.path == "/subjects/labels-value/versions" and (request.method == "POST")
            else None
        )

    registry.wrong = fail
    with pytest.raises(UnavailableError, match="no leader") as away:
        await register(registry)
    assert away.value.waiting_on == "schema registry"
    assert registry.modes == {}
    registry.wrong = lambda _: None
    await register(registry)
    assert registry.subjects["labels-value"]


async def test_the_password_opens_it_and_one_that_is_away_is_waited_for(registry: FakeRegistry) -> None:
    registry.login = "me:secret-word"
    login = {"schema_registry_user": "me", "schema_registry_password": SecretStr("secret-word")}
    assert await register(registry, **login)
    registry.stop()
    with pytest.raises(UnavailableError, match=r"kafka\.schema_registry_url") as away:
        await register(registry, **login)
    assert "secret-word" not in str(away.value)
    with pytest.raises(RegistryError, match="belong together"):
        await register(registry, schema_registry_user="me")
