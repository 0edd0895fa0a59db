"""Rejected files put back: tried once more, with what became of them said in the transaction that took them."""

import json

import pytest

from processors.ingest.rejected import Letter, NotThereError, find, put_back
from processors.ingest.settings import FolderSettings
from schemas.records import DeadLetterStatus
from streams import codec
from streams.messages import Incoming
from tests.processors.ingest_kit import jpeg, png
from tests.processors.test_ingest_folder import Inbox, inbox, log

__all__ = ["inbox", "log"]  # fixtures


def letters(made: Inbox) -> list[Letter]:
    found = []
    for letter in made.log.dead_letters():
        said = json.loads(letter.detail)
        found.append(Letter(letter.origin, letter.camera_id, letter.attempt, **said))
    return found


def statuses(made: Inbox) -> list[tuple[str, str]]:
    emits = [emit for emit in made.log.records if emit.topic == "dead_letter_status"]
    assert {emit.partition for emit in emits} <= {0}
    read = [codec.decode(Incoming(e.topic, "", 0, 0, e.key, e.value, e.headers), DeadLetterStatus) for e in emits]
    assert {status.by for status in read} <= {"ingest"}
    return [(status.origin, status.status) for status in read]


@pytest.mark.parametrize("data", [png(), b"", bytes(10_000_001)], ids=["no JPEG", "empty", "too long"])
async def test_a_file_whose_reason_stays_is_rejected_again_and_its_letter_stays_open(inbox, data):
    settings = FolderSettings(root=inbox.root)
    inbox.put("front/sub/x.jpg", data, age=100)
    await inbox.watch().sweep()
    for attempt in (2, 3):
        (*_, last) = letters(inbox)
        assert put_back(settings, last) == inbox.root / "front/sub/x.jpg"
        await inbox.watch().sweep()
        assert [letter.attempts for letter in letters(inbox)] == list(range(1, attempt + 1))
    origin = letters(inbox)[0].origin
    assert {letter.origin for letter in letters(inbox)} == {origin}
    assert statuses(inbox) == [(origin, "open")] * 2
    assert inbox.files() == ["front/.rejected/sub/x.jpg", "front/.rejected/sub/x.jpg.reason.txt"]


async def test_a_file_that_can_be_taken_now_resolves_its_letter(inbox):
    inbox.put("front/x.jpg", jpeg(1), age=100)
    few = inbox.watch()
    few._appenders.settings = few._appenders.settings.model_copy(update={"max_pixels": 10})
    await few.sweep()
    (letter,) = letters(inbox)
    put_back(FolderSettings(root=inbox.root), letter)
    inbox.put("front/other.jpg", jpeg(2), age=100)
    await inbox.watch(after="delete").sweep()
    assert sorted(inbox.names()) == ["other.jpg", "x.jpg"]
    assert statuses(inbox) == [(letter.origin, "resolved")]
    assert inbox.files() == []


async def test_another_file_in_the_place_of_one_that_was_put_back_resolves_nothing(inbox):
    inbox.put("front/x.jpg", png(), age=100)
    await inbox.watch().sweep()
    (letter,) = letters(inbox)
    put_back(FolderSettings(root=inbox.root), letter)
    inbox.put("front/x.jpg", jpeg(1), age=100)
    await inbox.watch(after="delete").sweep()
    assert inbox.names() == ["x.jpg"]
    assert statuses(inbox) == []


async def test_a_place_that_is_taken_is_left_alone(inbox):
    inbox.put("front/x.jpg", png(), age=100)
    await inbox.watch().sweep()
    inbox.put("front/x.jpg", jpeg(1), age=0)
    (letter,) = letters(inbox)
    assert put_back(FolderSettings(root=inbox.root), letter) == inbox.root / "front/x~2.jpg"
    await inbox.watch().sweep()
    assert [one.origin for one in letters(inbox)] == [letter.origin] * 2


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "", "y.jpg"])
def test_a_letter_s_name_leads_nowhere_else(tmp_path, name):
    (tmp_path / "front" / ".rejected").mkdir(parents=True)
    (tmp_path / "front" / "x.jpg").write_bytes(b"x")
    letter = Letter("folder:front/x.jpg@0", "front", 1, name, 1, 1)
    with pytest.raises(NotThereError):
        find(FolderSettings(root=tmp_path), letter)


def test_a_file_that_was_left_where_it_is_is_named(tmp_path):
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "x.jpg").write_bytes(b"x")
    letter = Letter("folder:front/x.jpg@0", "front", 1, "x.jpg", 1, 1)
    with pytest.raises(NotThereError, match="after is leave"):
        find(FolderSettings(root=tmp_path, after="leave"), letter)
