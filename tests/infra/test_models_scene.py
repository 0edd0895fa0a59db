"""The renderer and the stories: repeatable, with ground truth that is true."""

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from infra.models.actors import CLASSES, Actor, sprite
from infra.models.scene import KINDS, Placed, View, Weather, random_scene, render
from infra.models.stories import DEFAULT_SEED, STORIES, cast, write_footage

CLEAR = Weather(noise=0.0)


def _person(u: float, v: float) -> Placed:
    return Placed(Actor("person", 5, view="front"), u, v)


def test_same_seed_same_pixels_and_boxes():
    first, second, other = random_scene(3), random_scene(3), random_scene(4)
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not np.array_equal(first[0], other[0])


def test_boxes_lie_inside_the_image_and_are_no_slivers():
    seen = set()
    for seed in range(60):
        for box in random_scene(seed, (320, 180))[1]:
            assert 0 <= box.x0 < box.x1 <= 1
            assert 0 <= box.y0 < box.y1 <= 1
            assert min(box.x1 - box.x0, box.y1 - box.y0) >= 0.012
            seen.add(box.label)
    assert seen == set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_is_drawn_standing_on_the_ground(kind: str):
    drawn = sprite(Actor(kind, 1), 60)
    bounds = drawn.getchannel("A").getbbox()
    assert bounds is not None
    assert drawn.height - bounds[3] <= 3


def test_box_is_tight_around_what_changed():
    view = View("back-yard", 2)
    empty, _ = render(view, [], CLEAR)
    image, (box,) = render(view, [_person(0.45, 0.6)], CLEAR)
    changed = np.abs(np.asarray(image, int) - np.asarray(empty, int)).sum(2) > 60
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert box.y0 * 360 == pytest.approx(rows[0], abs=3)
    # The shadow is wider than the feet, so only the body's upper half tells left and right.
    upper = np.flatnonzero(changed[rows[0] : rows[0] + 60].any(0))
    assert box.x0 * 640 == pytest.approx(upper[0], abs=3)
    assert box.x1 * 640 == pytest.approx(upper[-1], abs=3)
    assert len(columns) > 0


def test_nearer_is_larger():
    view = View("front-door", 2)
    (far,), (near,) = (render(view, [_person(0.5, v)], CLEAR)[1] for v in (0.4, 0.8))
    assert (near.y1 - near.y0) == pytest.approx(2 * (far.y1 - far.y0), rel=0.1)


@pytest.mark.parametrize(("u", "labels"), [(0.45, ["truck"]), (0.272, ["truck"]), (0.24, ["person", "truck"])])
def test_who_is_mostly_hidden_by_a_truck_has_no_box(u: float, labels: list[str]):
    truck = Placed(Actor("truck", 1), 0.5, 0.5)
    boxes = render(View("street", 2), [_person(u, 0.4), truck], CLEAR)[1]
    assert [b.label for b in boxes] == labels


@pytest.mark.parametrize("kind", KINDS)
def test_infrared_has_no_colour(kind: str):
    image, _ = render(View(kind, 2), [_person(0.5, 0.6)], Weather("infrared"))  # type: ignore[arg-type]
    r, g, b = (np.asarray(image, int)[..., i] for i in range(3))
    assert np.abs(r - g).max() <= 8
    assert np.abs(r - b).max() <= 8


def test_footage_carries_its_times_in_order_and_repeats_byte_for_byte(tmp_path):
    footage = write_footage(tmp_path / "a", cameras=("back-yard",))
    again = write_footage(tmp_path / "b", cameras=("back-yard",))
    names = [f.path.name for f in footage.frames]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    for first, second in zip(footage.frames, again.frames, strict=True):
        assert first.path.read_bytes() == second.path.read_bytes()
    frame = footage.frames[7]
    with Image.open(frame.path) as image:
        ifd = image.getexif().get_ifd(0x8769)
    taken = datetime.strptime(f"{ifd[0x9003]} {ifd[0x9011]}", "%Y:%m:%d %H:%M:%S %z")
    assert taken + timedelta(milliseconds=int(ifd[0x9291])) == frame.captured_at
    assert frame.captured_at < datetime.now(UTC)


def test_a_camera_without_stories_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"attic.*front-door, driveway, back-yard"):
        write_footage(tmp_path, cameras=("attic",))


def test_stories_of_a_camera_never_share_a_window():
    # Windows close after 30 s without news: less distance would merge two stories into one event.
    for camera in {s.camera for s in STORIES}:
        told = sorted((s for s in STORIES if s.camera == camera), key=lambda s: s.at)
        for first, second in pairwise(told):
            day = datetime(2026, 1, 1, tzinfo=UTC).date()
            end = datetime.combine(day, first.at) + timedelta(seconds=first.seconds)
            assert datetime.combine(day, second.at) - end > timedelta(seconds=60)


def test_a_loiterer_keeps_moving_but_stays():
    # Moving, or the pipeline takes the person for furniture; within 8 % of the diagonal, or it is no loitering.
    story = next(s for s in STORIES if "loiters" in s.name)
    spots = [cast(story, t, DEFAULT_SEED)[0] for t in range(8, story.seconds)]
    x, y = np.array([p.u * 640 for p in spots]), np.array([p.v * 270 for p in spots])
    reach = np.hypot(x[:, None] - x, y[:, None] - y).max()
    assert reach < 0.08 * np.hypot(640, 360)
    assert (np.abs(np.diff(x)) > 2).mean() > 0.8


def test_every_story_has_levels_exactly_if_it_has_a_cast():
    for story in STORIES:
        assert bool(story.roles) == bool(story.levels)
        assert set(story.levels) <= {"low", "medium", "high", "critical"}


def test_weather_and_noise_do_not_move_the_boxes():
    view, things = View("driveway", 9), [_person(0.4, 0.5), Placed(Actor("cat", 3), 0.6, 0.8)]
    plain = render(view, things, CLEAR)[1]
    rough = replace(CLEAR, light="infrared", rain=1.0, noise=7.0, blur=1.0)
    assert render(view, things, rough, seed=random.Random(1).randrange(99))[1] == plain
