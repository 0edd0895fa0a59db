"""`rewatch camera` on a fake topic: what may be set, and what is refused with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest

from infra.cli import cameras
from infra.cli.cameras import Change, ChangeError, changed, model_classes
from infra.config import Settings, load
from schemas.records import Camera
from tests.infra.cli_kit import answer, invoke

NOTHING = Change(None, None, {}, None)


class FakeTable:
    """A `ControlTable` in memory."""

    def __init__(self) -> None:
        self.latest: dict[str, Camera] = {}

    def get(self, key: str) -> Camera | None:
        return self.latest.get(key)

    def all(self) -> dict[str, Camera]:
        return dict(self.latest)

    async def append(self, record: Camera) -> None:
        self.latest[record.camera_id] = record


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTable:
    monkeypatch.chdir(tmp_path)
    found = FakeTable()

    async def load_table(_: Settings) -> FakeTable:
        return found

    monkeypatch.setattr(cameras, "_table", load_table)
    frames(monkeypatch, there=False)
    return found


def frames(monkeypatch: pytest.MonkeyPatch, *, there: bool) -> None:
    async def has_frames(*_: object) -> bool:
        return there

    monkeypatch.setattr(cameras, "_has_frames", has_frames)


def camera(**other: Any) -> Camera:
    base = {"camera_id": "front", "name": "front", "time_zone": "UTC", "zones": (), "partition": None, "updated_at": 1}
    return Camera(**(base | {"window": load().windows.record()} | other))  # type: ignore[arg-type]


def test_add_takes_the_defaults_of_the_settings_and_what_is_said(table: FakeTable) -> None:
    added = answer("camera", "add", "front", "--name", "Front door", "--open-on", "person, car", "--idle", "10")
    assert (added["name"], added["time_zone"]) == ("Front door", "UTC")
    assert added["window"]["open_on"] == ["person", "car"]
    assert (added["window"]["idle_ms"], added["window"]["max_ms"]) == (10_000, 90_000)
    assert table.latest["front"].window.idle_ms == 10_000


def test_set_changes_what_is_said_and_nothing_else(table: FakeTable) -> None:
    invoke("camera", "add", "front", "--name", "Front door", "--threshold", "0.6")
    before = table.latest["front"]
    assert invoke("camera", "set", "front", "--max-frames", "20").exit_code == 0
    after = table.latest["front"]
    assert after.window.max_frames == 20
    assert (after.name, after.window.threshold) == (before.name, before.window.threshold)


def test_adding_twice_is_1_and_names_set(table: FakeTable) -> None:
    invoke("camera", "add", "front")
    result = invoke("camera", "add", "front")
    assert result.exit_code == 1
    assert "rewatch camera set front" in result.stderr


def test_setting_an_unknown_camera_is_1_and_names_what_is_near(table: FakeTable) -> None:
    invoke("camera", "add", "front")
    assert "did you mean front?" in invoke("camera", "set", "frnt", "--name", "x").stderr
    result = invoke("camera", "set", "garage", "--name", "x")
    assert result.exit_code == 1
    assert "rewatch camera add garage" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("Front Door",), "no camera id"),
        (("../etc",), "no camera id"),
        (("front", "--time-zone", "Mars/Olympus"), "--time-zone"),
        (("front", "--time-zone", "../../etc/passwd"), "--time-zone"),
        (("front", "--threshold", "1.5"), "threshold"),
        (("front", "--idle", "200"), "raise max_s"),
        (("front", "--open-on", ","), "open_on"),
        (("front", "--partition", "16"), "0 to 15"),
        (("front", "--open-on", "car", "--fast-label", "person"), "fast_label"),
    ],
)
def test_what_cannot_be_set_is_2_and_names_the_fix(table: FakeTable, arguments: tuple[str, ...], says: str) -> None:
    result = invoke("camera", "add", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert table.latest == {}


def test_setting_nothing_is_2(table: FakeTable) -> None:
    assert invoke("camera", "set", "front").exit_code == 2


def test_a_camera_with_frames_is_not_moved_to_another_partition(
    table: FakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = answer("camera", "add", "front")
    here, other = added["partition"], (added["partition"] + 1) % 16
    frames(monkeypatch, there=True)
    result = invoke("camera", "set", "front", "--partition", str(other))
    assert result.exit_code == 1
    assert f"partition {here}" in result.stderr
    # A pin to where it lives already moves nothing.
    assert answer("camera", "set", "front", "--partition", str(here))["pinned"] is True


def test_a_camera_without_frames_can_be_pinned(table: FakeTable) -> None:
    assert answer("camera", "add", "front", "--partition", "3")["partition"] == 3
    assert answer("camera", "set", "front", "--partition", "5")["partition"] == 5


def test_ls_says_where_each_camera_lives(table: FakeTable) -> None:
    assert "camera add" in invoke("camera", "ls").output
    invoke("camera", "add", "yard", "--partition", "3")
    invoke("camera", "add", "front")
    assert [c["camera_id"] for c in answer("camera", "ls")] == ["front", "yard"]
    assert "3 (pinned)" in invoke("camera", "ls").output


def test_classes_are_held_against_the_model_where_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "person", "1": "car"}}))
    settings = load()
    here = settings.model_copy(
        update={"detector": settings.detector.model_copy(update={"model_path": str(tmp_path)})},
    )
    assert model_classes(here) == ("person", "car")
    with pytest.raises(ChangeError, match=r"persn.*did you mean person\?"):
        changed(camera(), NOTHING._replace(window={"open_on": ("persn",)}), here, 2)
    elsewhere = settings.model_copy(
        update={"detector": settings.detector.model_copy(update={"model_path": "vendor/model"})},
    )
    assert model_classes(elsewhere) is None
    assert "person" in (model_classes(settings) or ()), "the demo's"
    named = settings.detector.model_copy(update={"model_path": "rtdetr_v2_r18vd"})
    assert model_classes(settings.model_copy(update={"detector": named})) is None, "a model that is not here"
    window = {"open_on": ("person", "gnu")}
    assert changed(camera(), NOTHING._replace(window=window), elsewhere, 2).window.open_on == ("person", "gnu")


def test_zones_outlive_a_change() -> None:
    from schemas.records import Zone

    zones = (Zone(name="gate", polygon=(0.0, 0.0, 1.0, 0.0, 1.0, 1.0)),)
    assert changed(camera(zones=zones), NOTHING._replace(name="x"), load(), 2).zones == zones
