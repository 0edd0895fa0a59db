"""The demo's footage: a day of small stories at three cameras, as JPEG folders with EXIF times.

Each story has a timeline, ground truth for every frame, and the risk levels that its riskiest event should
reach. The same seed writes the same bytes.
"""

import math
import random
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image

from infra.models.actors import Actor, Carry
from infra.models.scene import Box, Light, Placed, View, Weather, render, seated

#: A day before any machine runs this, so that capture times are never in the future.
DEFAULT_DAY = date(2026, 3, 14)
DEFAULT_SEED = 20260314
CAMERAS = ("front-door", "driveway", "back-yard")
#: The driveway's camera has twice the resolution: its JPEGs exceed 64 KB and go to the image store.
_SIZES = {"front-door": (640, 360), "driveway": (1280, 720), "back-yard": (640, 360)}
_QUALITY = 86
_EXIF_IFD, _DATETIME_ORIGINAL, _OFFSET_ORIGINAL, _SUBSEC_ORIGINAL = 0x8769, 0x9003, 0x9011, 0x9291

CameraKind = Literal["front-door", "driveway", "back-yard"]
Path3 = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Role:
    """One actor's part.

    Attributes:
        kind: Its class.
        way: (second, u, v) points, walked in straight lines; absent before and after.
        carry: What a person carries.
        rider: A person sits on it (bicycle and motorcycle).
        who: Roles of a story with the same number look the same; 0: the role's own place in the cast.
    """

    kind: str
    way: Path3
    carry: Carry = "nothing"
    rider: bool = False
    who: int = 0


@dataclass(frozen=True)
class Story:
    """What happens at one camera.

    Attributes:
        name: Short name, unique.
        camera: Camera id.
        at: Local time at which the first frame is taken.
        seconds: Length; a frame is taken every second.
        weather: Light and sensor.
        roles: The cast.
        levels: Risk levels that the story's riskiest event may have; empty if no event should arise.
    """

    name: str
    camera: CameraKind
    at: time
    seconds: int
    weather: Weather
    roles: tuple[Role, ...]
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Frame:
    """One written JPEG and what is truly in it."""

    path: Path
    camera: str
    story: str
    captured_at: datetime
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Footage:
    """All that was written: one folder per camera below `directory`."""

    directory: Path
    stories: tuple[Story, ...]
    frames: tuple[Frame, ...]


def _pace(start: int, end: int, u: float, v: float) -> Path3:
    """Two steps to and fro, for ever: someone who waits. Never further than 0.06 from (u, v)."""
    offsets = (0.0, 0.05, 0.02, -0.04, -0.01, 0.04)
    return tuple((t, u + offsets[i % 6], v + 0.02 * math.sin(1.3 * i)) for i, t in enumerate(range(start, end + 1, 2)))


def _sky(light: Light, rain: float = 0.0) -> Weather:
    return Weather(light, rain=rain, noise=4.0 if light == "infrared" else 2.5)


_PARCEL: Carry = "parcel"

STORIES: tuple[Story, ...] = (
    Story("quiet night", "front-door", time(3, 30), 4, _sky("infrared", rain=0.6), (), ()),
    Story(
        "cat at noon",
        "front-door",
        time(12, 5),
        12,
        _sky("day"),
        (Role("cat", ((0, 0.08, 0.72), (6, 0.5, 0.66), (12, 0.96, 0.8))),),
        ("low",),
    ),
    Story(
        "parcel delivered",
        "front-door",
        time(14, 20),
        14,
        _sky("day"),
        (
            Role("truck", ((0, 0.25, 0.24), (14, 0.25, 0.24))),
            Role("person", ((0, 0.42, 0.36), (6, 0.5, 0.9)), carry=_PARCEL, who=9),
            Role("person", ((7, 0.5, 0.9), (13, 0.42, 0.36)), who=9),
        ),
        ("low",),
    ),
    Story(
        "visitor loiters at the door by night",
        "front-door",
        time(23, 14),
        42,
        _sky("infrared"),
        (Role("person", ((0, 0.2, 0.36), (4, 0.46, 0.6), *_pace(6, 42, 0.5, 0.86))),),
        ("high", "critical"),
    ),
    Story(
        "walking the dog",
        "driveway",
        time(7, 30),
        8,
        _sky("day"),
        (
            Role("person", ((0, 0.06, 0.4), (8, 0.94, 0.42))),
            Role("dog", ((0, 0.16, 0.46), (8, 1.02, 0.48))),
        ),
        ("low",),
    ),
    Story(
        "street traffic",
        "driveway",
        time(11, 10),
        10,
        _sky("day"),
        (
            Role("bus", ((0, 0.1, 0.2), (4, 0.95, 0.2))),
            Role("motorcycle", ((3, 0.9, 0.33), (7, 0.1, 0.33)), rider=True),
            Role("truck", ((6, 0.1, 0.22), (10, 0.95, 0.22))),
        ),
        ("low",),
    ),
    Story(
        "car comes home",
        "driveway",
        time(17, 45),
        10,
        _sky("dusk"),
        (Role("car", ((0, 0.95, 0.24), (3, 0.5, 0.26), (7, 0.52, 0.7), (10, 0.52, 0.7))),),
        ("low",),
    ),
    Story(
        "unknown car by night",
        "driveway",
        time(1, 20),
        8,
        _sky("infrared"),
        (Role("car", ((0, 0.05, 0.26), (4, 0.42, 0.28), (8, 0.9, 0.28))),),
        ("medium",),
    ),
    Story(
        "birds in the morning",
        "back-yard",
        time(8, 10),
        8,
        _sky("day"),
        (
            Role("bird", ((0, 0.3, 0.7), (8, 0.5, 0.78))),
            Role("bird", ((1, 0.62, 0.9), (8, 0.5, 0.94))),
        ),
        ("low",),
    ),
    Story(
        "someone in the garden by day",
        "back-yard",
        time(15, 30),
        12,
        _sky("day"),
        (Role("person", ((0, 0.2, 0.42), (4, 0.4, 0.5), (12, 0.62, 0.48))),),
        ("medium",),
    ),
    Story(
        "two people at the back by night",
        "back-yard",
        time(2, 40),
        40,
        _sky("infrared"),
        (
            Role("person", ((0, 0.16, 0.6), *_pace(2, 38, 0.24, 0.68), (40, 0.16, 0.6))),
            Role("person", ((3, 0.5, 0.4), *_pace(6, 38, 0.44, 0.58))),
        ),
        ("high", "critical"),
    ),
)


def _where(way: Path3, t: float) -> tuple[float, float, float, float] | None:
    """Place and velocity (u, v, du, dv per second) at a second, or None when off stage."""
    for (t0, u0, v0), (t1, u1, v1) in pairwise(way):
        if t0 <= t <= t1:
            share = (t - t0) / (t1 - t0)
            du, dv = (u1 - u0) / (t1 - t0), (v1 - v0) / (t1 - t0)
            return u0 + share * (u1 - u0), v0 + share * (v1 - v0), du, dv
    return None


def cast(story: Story, second: float, seed: int) -> list[Placed]:
    """The actors of a story as they stand at a second."""
    placed = []
    for number, role in enumerate(story.roles):
        where = _where(role.way, second)
        if where is None:
            continue
        u, v, du, dv = where
        # Walking to or from the camera shows the front; so does a car that turns in.
        head_on = abs(dv) > 0.7 * abs(du)
        if role.kind == "car":
            last = role.way[-1][2]
            head_on = head_on or (du == 0 and last > 0.5)
        actor = Actor(
            role.kind,
            random.Random(f"{seed}/{story.name}/{role.who or number}").randrange(10**9),
            facing=1 if du >= 0 else -1,
            view="front" if head_on and role.kind in ("person", "car") else "side",
            phase=2.1 * second,
            carry=role.carry,
        )
        placed.append(Placed(actor, u, v))
        if role.rider:
            placed.append(seated(placed[-1]))
    return placed


def _exif(at: datetime) -> Image.Exif:
    exif = Image.Exif()
    ifd = exif.get_ifd(_EXIF_IFD)
    ifd[_DATETIME_ORIGINAL] = at.strftime("%Y:%m:%d %H:%M:%S")
    ifd[_OFFSET_ORIGINAL] = at.strftime("%z")[:3] + ":" + at.strftime("%z")[3:]
    ifd[_SUBSEC_ORIGINAL] = f"{at.microsecond // 1000:03d}"
    return exif


def write_footage(
    directory: Path,
    seed: int = DEFAULT_SEED,
    cameras: tuple[str, ...] = CAMERAS,
    day: date = DEFAULT_DAY,
    drift_s: int = 0,
) -> Footage:
    """Renders every story of the given cameras into `directory/<camera>/<capture time>.jpg`.

    Args:
        directory: Made if missing. Existing files of the same names are replaced.
        seed: Changes places, clothes and noise, not the stories.
        cameras: Which of CAMERAS to write.
        day: The (UTC) day on which it all happens.
        drift_s: By how much a story may begin earlier or later, seconds, drawn from the seed.

    Returns:
        The frames in the order of their cameras and capture times, with ground truth.

    Raises:
        ValueError: A camera that has no stories.
    """
    unknown = set(cameras) - set(CAMERAS)
    if unknown:
        raise ValueError(f"no footage for the cameras {sorted(unknown)}: choose from {', '.join(CAMERAS)}")
    frames = []
    told = sorted((s for s in STORIES if s.camera in cameras), key=lambda s: (cameras.index(s.camera), s.at))
    for story in told:
        folder = directory / story.camera
        folder.mkdir(parents=True, exist_ok=True)
        view = View(story.camera, random.Random(f"{seed}/{story.camera}").randrange(10**9))
        drift = random.Random(f"{seed}/{story.name}/at").randint(-drift_s, drift_s)
        start = datetime.combine(day, story.at, UTC) + timedelta(seconds=drift, milliseconds=250)
        for second in range(story.seconds):
            at = start + timedelta(seconds=second)
            caption = f"{story.camera}  {at:%Y-%m-%d %H:%M:%S}"
            noise = random.Random(f"{seed}/{story.name}/{second}").randrange(10**9)
            image, boxes = render(
                view, cast(story, second, seed), story.weather, size=_SIZES[story.camera], seed=noise, caption=caption
            )
            path = folder / f"{at:%Y%m%dT%H%M%S}{at.microsecond // 1000:03d}Z.jpg"
            image.save(path, quality=_QUALITY, exif=_exif(at))
            frames.append(Frame(path, story.camera, story.name, at, tuple(boxes)))
    return Footage(directory, tuple(told), tuple(frames))
