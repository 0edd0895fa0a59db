"""Which prompt judges a camera: pointers and versions folded, followed on the real broker, bad records skipped."""

import asyncio
import collections

import msgspec
import pytest
from structlog.testing import capture_logs

from schemas import prompts
from streams import codec
from streams.errors import UnavailableError
from streams.kafka import Kafka
from streams.prompts import Prompts, UnknownVersionError
from tests.infra.prompt_kit import changed, in_memory, pointer

DEFAULT = prompts.default()
STRICT = prompts.deliveries_strict_nights()
ON_LOG = (DEFAULT.to_record(1, "first"), STRICT.to_record(2, "second"), pointer(DEFAULT.digest, at=3))


def test_without_a_pointer_the_version_in_the_tree_judges() -> None:
    assert in_memory()[0].of("door") == DEFAULT


def test_a_cameras_own_pointer_wins_until_it_is_taken_back() -> None:
    known, table = in_memory([*ON_LOG, pointer(STRICT.digest, "yard")])
    assert (known.of("yard"), known.of("door")) == (STRICT, DEFAULT)
    table.put(pointer("", "yard"))
    assert known.of("yard") == DEFAULT
    assert list(known.active()) == ["default"]


def test_a_pointer_to_a_version_that_is_not_there_is_waited_for() -> None:
    known, table = in_memory([*ON_LOG, pointer("0" * 32, "door")])
    with pytest.raises(
        UnavailableError, match=r"0000.* for camera door: .*not in `prompts`.*rollback --camera door` "
    ) as waits:
        known.of("door")
    assert waits.value.waiting_on == "settings"
    assert known.of("yard") == DEFAULT
    table.put(pointer(STRICT.digest, "door"))
    assert known.of("door") == STRICT


BAD = {
    "another digest": msgspec.structs.replace(STRICT.to_record(1), digest="f" * 32),
    "its text changed": msgspec.structs.replace(DEFAULT.to_record(9), parameters='{"temperature":2}'),
    "a template that does not parse": msgspec.structs.replace(STRICT.to_record(1), template='{"system": "{{"}'),
    "no template": msgspec.structs.replace(DEFAULT.to_record(9), template="garbage"),
    "neither": msgspec.structs.replace(DEFAULT.to_record(9), kind="draft"),
    "a pointer to nothing": pointer(""),
    "a pointer for nobody": pointer(STRICT.digest, scope=""),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_record_is_refused_and_what_held_before_holds_on(bad) -> None:
    known, table = in_memory([*ON_LOG, bad])
    assert known._refuse(bad)
    assert known.of("door") == DEFAULT
    assert set(known.versions()) == {DEFAULT.digest, STRICT.digest}
    assert [record.digest for record in known.history("default")] == [DEFAULT.digest]
    assert table.get("active/default").digest == DEFAULT.digest


def test_what_a_version_was_refused_for_is_told_to_who_waits_for_it() -> None:
    broken = msgspec.structs.replace(STRICT.to_record(1), digest="f" * 32)
    known, _ = in_memory([broken, pointer("f" * 32)])
    with pytest.raises(UnavailableError, match="its content has digest"):
        known.of("door")


@pytest.mark.parametrize(
    ("moves", "before"),
    [
        ([], None),
        (["a"], None),
        (["a", "b"], "a"),
        (["a", "b", "b"], "a"),
        (["a", "b", "a"], "b"),
        (["a", "b", "c"], "b"),
    ],
)
def test_before_is_the_pointer_that_was_in_force_before(moves: list[str], before: str | None) -> None:
    known, _ = in_memory([pointer(digest * 32) for digest in moves])
    assert known.before("default") == (None if before is None else before * 32)


def test_before_a_cameras_first_pointer_it_had_everyones() -> None:
    known, table = in_memory([*ON_LOG, pointer(STRICT.digest, "yard")])
    assert known.before("yard") == ""
    table.put(pointer("", "yard"))
    assert known.before("yard") == STRICT.digest


def test_of_one_name_the_newest_is_meant_and_a_beginning_of_several_is_refused(monkeypatch) -> None:
    old, new = changed("shop", user="old"), changed("shop", user="new")
    known, _ = in_memory([new.to_record(9), old.to_record(5)])
    assert known.find("shop") == new
    assert known.find(old.digest[:8].upper()) == old
    assert known.find("deliveries-strict-nights") == STRICT
    with pytest.raises(UnknownVersionError, match=r"no prompt version 'shp'.*shop"):
        known.find("shp")
    for nothing in ("", old.digest[:3], "zz"):
        with pytest.raises(UnknownVersionError):
            known.find(nothing)
    monkeypatch.setattr("streams.prompts._SHORTEST", 1)
    known, _ = in_memory(changed(f"v{n}", user=f"{n}").to_record(1) for n in range(17))
    common = collections.Counter(digest[0] for digest in known.versions()).most_common(1)[0][0]
    with pytest.raises(UnknownVersionError, match="beginning of several"):
        known.find(common)


async def test_pointing_where_it_points_already_writes_nothing() -> None:
    known, table = in_memory(ON_LOG)
    assert not await known.point("default", DEFAULT.digest, "")
    assert not await known.point("yard", "", "")
    assert not await known.add(STRICT, "")
    assert len(table.records) == len(ON_LOG)
    assert await known.point("yard", STRICT.digest, "why")
    assert known.history("yard")[0].comment == "why"


async def test_registering_chooses_only_where_nobody_has_chosen() -> None:
    known, _ = in_memory()
    await known.register(DEFAULT, "first")
    await known.register(STRICT, "second")
    assert known.of("door") == DEFAULT
    assert set(known.versions()) == {DEFAULT.digest, STRICT.digest}


@pytest.mark.real
async def test_followers_see_a_promotion_at_once_and_skip_what_is_bad(kafka: Kafka) -> None:
    here, there = Prompts(kafka), Prompts(kafka)
    camera = f"cam-{kafka.settings.system}"
    own = changed(camera, user=camera)
    async with here.table.following():
        before = here.table.skipped
        assert here.of(camera) != own
        with capture_logs() as logs:
            await there.add(own, "mine")
            await there.point(camera, own.digest, "mine")
            bad = msgspec.structs.replace(own.to_record(1), parameters="[]")
            producer = kafka.producer()
            await producer.start()
            for key, value in ((f"version/{own.digest}", codec.encode("prompts", bad)[0]), ("bad", b"garbage")):
                await producer.send_and_wait("prompts", key=key.encode(), value=value, partition=0)
            await producer.stop()
            async with asyncio.timeout(10):
                while here.table.skipped < before + 2:
                    await asyncio.sleep(0.02)
        assert here.of(camera) == own
        told = [entry["error"] for entry in logs if entry["event"] == "control record skipped"]
        assert any("parameters are not a JSON object" in why for why in told)
        assert any("not in Confluent's framing" in why for why in told)
    await there.table.load()
    assert len(there.history(camera)) == 1
    assert there.before(camera) == ""
