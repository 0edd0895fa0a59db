"""Renders camera scenes in perspective, with occlusion, weather, infrared night and ground-truth boxes.

A camera hangs 2.6 m above flat ground: a thing's size follows from the image row where it stands. The same
arguments give the same pixels.
"""

import functools
import math
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from infra.models.actors import CLASSES, Actor, Color, Pose, shade, sprite

Light = Literal["day", "dusk", "infrared"]
Kind = Literal["front-door", "driveway", "back-yard", "street"]

KINDS: tuple[Kind, ...] = ("front-door", "driveway", "back-yard", "street")
_CAMERA_HEIGHT_M = 2.6
#: A box is ground truth when at least this share of the silhouette is seen, and it is not a sliver.
_MIN_VISIBLE, _MIN_SIDE = 0.3, 0.012


@dataclass(frozen=True)
class Placed:
    """An actor on the ground: u across the image (0..1), v from the horizon (0) to the lower edge (1)."""

    actor: Actor
    u: float
    v: float


@dataclass(frozen=True)
class Box:
    """Ground truth: corners as fractions of the image's width and height."""

    label: str
    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Weather:
    """How the camera sees: rain 0..1, sensor noise in grey levels, blur radius at 640 px, exposure factor."""

    light: Light = "day"
    rain: float = 0.0
    noise: float = 3.0
    blur: float = 0.0
    exposure: float = 1.0


@dataclass(frozen=True)
class View:
    """One fixed camera: what it looks at and the seed of the place."""

    kind: Kind
    seed: int


@dataclass(frozen=True)
class _Prop:
    """Something fixed that can hide actors behind it: a bush, a post, a bin."""

    kind: Literal["bush", "post", "bin"]
    u: float
    v: float
    look: int


def horizon(view: View) -> float:
    """The horizon's row as a fraction of the height: cameras look slightly down."""
    return random.Random(view.seed).uniform(0.2, 0.28)


def _gradient(image: Image.Image, top: float, bottom: float, first: Color, last: Color) -> None:
    rows = round(bottom) - round(top)
    if rows > 0:
        ramp = np.linspace(np.array(first), np.array(last), rows).astype(np.uint8)
        strip = np.repeat(ramp[:, None, :], image.width, axis=1)
        image.paste(Image.fromarray(strip), (0, round(top)))


def _muted(rng: random.Random, low: int, high: int) -> Color:
    """A near-grey: walls, roofs and skies are quieter than clothes and cars."""
    grey = rng.randint(low, high)
    r, g, b = (max(0, min(255, grey + rng.randint(-18, 18))) for _ in range(3))
    return r, g, b


def _house(d: ImageDraw.ImageDraw, rng: random.Random, foot: tuple[float, float], w: float, h: float) -> None:
    """A house front, `w` wide and `h` high below the roof, whose lower left corner is `foot`."""
    x, ground = foot
    wall = _muted(rng, 130, 225)
    d.rectangle((x, ground - h, x + w, ground), fill=wall)
    eaves = [(x - w * 0.06, ground - h), (x + w * 0.5, ground - h * 1.5), (x + w * 1.06, ground - h)]
    d.polygon(eaves, fill=shade(_muted(rng, 70, 150), 0.8))
    for i in range(3):
        left = x + w * (0.1 + 0.3 * i)
        box = (left, ground - h * 0.8, left + w * 0.16, ground - h * 0.45)
        d.rectangle(box, fill=(70, 88, 106), outline=(235, 235, 230))
    d.rectangle((x + w * 0.44, ground - h * 0.5, x + w * 0.56, ground), fill=shade(wall, 0.45))


def _fence(d: ImageDraw.ImageDraw, color: Color, width: float, top: float, bottom: float) -> None:
    board = width / 34
    for i in range(35):
        tint = shade(color, 0.92 + 0.1 * (i % 2))
        d.rectangle((i * board, top + (i % 3), (i + 1) * board - 1, bottom), fill=tint)
    for y in (0.25, 0.75):
        d.line((0, top + (bottom - top) * y, width, top + (bottom - top) * y), fill=shade(color, 0.75), width=2)


@dataclass(frozen=True)
class _Canvas:
    """A place being drawn: pixels, size, horizon row, and the place's own random numbers."""

    d: ImageDraw.ImageDraw
    rng: random.Random
    width: int
    height: int
    hz: float

    def row(self, v: float) -> float:
        return self.hz + v * (self.height - self.hz)

    def ground(self, points: list[tuple[float, float]], color: Color) -> None:
        """A patch of ground by (u, v) corners."""
        self.d.polygon([(u * self.width, self.row(v)) for u, v in points], fill=color)


def _street(c: _Canvas, asphalt: Color, near: float, kerb: Color) -> None:
    """Houses along the horizon and a road from there to v = `near`."""
    x = c.rng.uniform(-0.2, 0.0) * c.width
    while x < c.width:
        w = c.rng.uniform(0.2, 0.32) * c.width
        _house(c.d, c.rng, (x, c.hz + 0.03 * c.height), w, c.rng.uniform(0.09, 0.14) * c.height)
        x += w * c.rng.uniform(1.15, 1.5)
    c.d.rectangle((0, c.row(0.08), c.width, c.row(near)), fill=asphalt)
    c.d.rectangle((0, c.row(near), c.width, c.row(near + 0.05)), fill=kerb)
    middle = c.row(0.08 + (near - 0.08) * 0.42)
    for i in range(9):
        dash = (i * c.width / 8, middle, (i + 0.5) * c.width / 8, middle)
        c.d.line(dash, fill=(216, 214, 200), width=max(1, c.height // 160))


def _front_path(c: _Canvas, paving: Color) -> None:
    u = c.rng.uniform(0.4, 0.6)
    c.ground([(u - 0.03, 0.34), (u + 0.03, 0.34), (0.74, 1), (0.26, 1)], paving)
    for i in range(1, 6):
        y = c.row(0.36 + 0.12 * i)
        c.d.line((c.width * 0.26, y, c.width * 0.74, y), fill=shade(paving, 0.97), width=1)


def _drive(c: _Canvas, asphalt: Color) -> None:
    u = c.rng.uniform(0.25, 0.4)
    c.ground([(u, 0.32), (u + 0.32, 0.32), (0.98, 1), (0.06, 1)], shade(asphalt, 1.25))
    seam = (c.width * (u + 0.16), c.row(0.32), c.width * 0.52, c.height)
    c.d.line(seam, fill=shade(asphalt, 1.12), width=2)
    c.d.rectangle((0, c.row(-0.3), c.width * 0.1, c.row(0.5)), fill=_muted(c.rng, 150, 220))


def _yard(c: _Canvas, paving: Color) -> None:
    wood = c.rng.choice(((150, 112, 78), (126, 118, 108), (172, 150, 120)))
    _fence(c.d, wood, c.width, c.hz - 0.13 * c.height, c.row(0.1))
    c.ground([(0, 0.78), (1, 0.78), (1, 1), (0, 1)], paving)
    for i in range(9):
        joint = (i * c.width / 8, c.row(0.78), (i - 4) * c.width / 6 + c.width / 2, c.height)
        c.d.line(joint, fill=shade(paving, 0.9), width=1)
    _house(c.d, c.rng, (c.rng.uniform(0.62, 0.8) * c.width, c.row(0.22)), 0.2 * c.width, 0.2 * c.height)


@functools.lru_cache(maxsize=4)
def _background(view: View, width: int, height: int) -> Image.Image:
    rng = random.Random(view.seed)
    hz = rng.uniform(0.2, 0.28) * height  # the same first draw as horizon()
    image = Image.new("RGB", (width, height))
    c = _Canvas(ImageDraw.Draw(image), rng, width, height, hz)
    sky = rng.choice(((150, 186, 222), (176, 196, 212), (200, 204, 208), (206, 190, 176)))
    grass = rng.choice(((92, 118, 70), (104, 122, 78), (122, 128, 92), (84, 104, 66)))
    asphalt = shade(rng.choice(((104, 104, 108), (88, 88, 92), (122, 120, 116))), rng.uniform(0.85, 1.15))
    paving = rng.choice(((168, 162, 152), (150, 146, 142), (176, 164, 146), (140, 128, 116)))
    _gradient(image, 0, hz + 1, shade(sky, 0.85), shade(sky, 1.15))
    _gradient(image, hz, height, shade(grass, 0.85), shade(grass, 1.15))
    if view.kind != "back-yard":
        _street(c, asphalt, 0.5 if view.kind == "street" else 0.3, shade(paving, 1.05))
    if view.kind == "front-door":
        _front_path(c, paving)
    elif view.kind == "driveway":
        _drive(c, asphalt)
    elif view.kind == "back-yard":
        _yard(c, paving)
    else:
        c.ground([(0, 0.55), (1, 0.55), (1, 1), (0, 1)], paving)
    for _ in range(rng.randint(3, 8)):
        x, y = rng.uniform(0, width), c.row(rng.uniform(0.33, 1.0))
        s, tint = (y - hz) * rng.uniform(0.05, 0.16), rng.uniform(0.85, 1.15)
        patch = shade(paving, 0.95) if view.kind == "street" else shade(grass, tint)
        c.d.ellipse((x - 2 * s, y - s * 0.3, x + 2 * s, y + s * 0.3), fill=patch)
    return image.filter(ImageFilter.GaussianBlur(width / 900))


@functools.lru_cache(maxsize=4)
def _props(view: View) -> tuple[_Prop, ...]:
    rng = random.Random(view.seed + 1)
    kinds: list[Literal["bush", "post", "bin"]] = [
        rng.choice(("bush", "bush", "post", "bin")) for _ in range(rng.randint(1, 4))
    ]
    # At the sides, where they hide a passer-by for a step or two and never the door.
    return tuple(
        _Prop(
            k,
            rng.choice((rng.uniform(0.0, 0.22), rng.uniform(0.78, 1.0))),
            rng.uniform(0.4, 0.95),
            rng.randint(0, 10**6),
        )
        for k in kinds
    )


def _prop_sprite(prop: _Prop, scale: float) -> Image.Image:
    rng = random.Random(prop.look)
    w, h = {"bush": (1.5, 1.1), "post": (0.25, 2.4), "bin": (0.7, 1.1)}[prop.kind]
    big = scale * 2
    image = Image.new("RGBA", (max(2, round(w * big)), max(2, round(h * big))))
    d = ImageDraw.Draw(image)
    if prop.kind == "bush":
        green = rng.choice(((58, 92, 50), (72, 104, 60), (50, 78, 52)))
        for _ in range(26):
            x, y, r = rng.uniform(0.25, 0.75), rng.uniform(0.35, 0.8), rng.uniform(0.12, 0.24)
            fill = shade(green, rng.uniform(0.75, 1.25))
            d.ellipse(((x - r) * w * big, (y - r) * h * big, (x + r) * w * big, (y + r) * h * big), fill=fill)
    elif prop.kind == "post":
        d.rectangle((0, 0, image.width, image.height), fill=shade((190, 186, 178), rng.uniform(0.5, 1.2)))
        d.rectangle((0, 0, image.width * 0.35, image.height), fill=shade((150, 146, 140), rng.uniform(0.5, 1.2)))
    else:
        color = rng.choice(((50, 76, 58), (60, 62, 70), (44, 66, 110)))
        d.rounded_rectangle((0, h * big * 0.1, image.width, image.height), radius=big * 0.06, fill=color)
        d.rounded_rectangle((0, 0, image.width, h * big * 0.16), radius=big * 0.05, fill=shade(color, 1.3))
    return image.reduce(2)


@functools.lru_cache(maxsize=1)
def _noise_field() -> NDArray[np.float32]:
    """Normal noise drawn once: frames crop it at random places, which costs a tenth of drawing anew."""
    return np.random.default_rng(7).standard_normal((1100, 1700), dtype=np.float32)


def _weather(image: Image.Image, weather: Weather, rng: random.Random) -> Image.Image:
    width, height = image.size
    if weather.rain > 0:
        streaks = Image.new("L", image.size)
        d = ImageDraw.Draw(streaks)
        slant = rng.uniform(-0.2, 0.2)
        for _ in range(int(260 * weather.rain)):
            x, y, length = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.09) * height
            d.line((x, y, x + slant * length, y + length), fill=rng.randint(40, 110), width=max(1, height // 360))
        image.paste((205, 210, 216), mask=streaks)
    a: NDArray[np.floating[Any]] = np.asarray(image, dtype=np.float32)
    if weather.light == "infrared":
        # One grey channel, lit from the camera: bright below the middle, dark towards corners and sky.
        grey = a @ np.array((0.36, 0.44, 0.2), dtype=np.float32)
        rows, columns = np.ogrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        lamp = np.exp(-(((columns - 0.5) / 0.62) ** 2) - ((rows - 0.66) / 0.55) ** 2).astype(np.float32)
        grey = grey * (0.32 + 0.68 * lamp) * 0.92 + 8
        a = grey[..., None] * np.array((1.0, 1.02, 1.01), dtype=np.float32)
    elif weather.light == "dusk":
        a = a * np.array((0.62, 0.52, 0.56), dtype=np.float32) + np.array((10, 6, 14), dtype=np.float32)
    elif weather.rain > 0:
        a = a * 0.86 + 18
    field = _noise_field()
    top, left = rng.randint(0, field.shape[0] - height), rng.randint(0, field.shape[1] - width)
    grain = weather.noise * field[top : top + height, left : left + width, None]
    a = a * np.float32(weather.exposure) + grain
    out = Image.fromarray(a.clip(0, 255).astype(np.uint8))
    return out.filter(ImageFilter.GaussianBlur(weather.blur * width / 640)) if weather.blur > 0 else out


def _shadow(image: Image.Image, x: float, y: float, w: float, light: Light) -> None:
    strength = {"day": 90, "dusk": 50, "infrared": 40}[light]
    mask = Image.new("L", (max(2, round(w)), max(2, round(w * 0.16))))
    ImageDraw.Draw(mask).ellipse((0, 0, mask.width - 1, mask.height - 1), fill=strength)
    image.paste((16, 18, 22), (round(x - mask.width / 2), round(y - mask.height / 2)), mask)


def render(
    view: View,
    things: list[Placed],
    weather: Weather,
    *,
    size: tuple[int, int] = (640, 360),
    seed: int = 0,
    caption: str | None = None,
) -> tuple[Image.Image, list[Box]]:
    """Renders one frame.

    Args:
        view: The camera.
        things: The actors; those further down the image stand nearer and hide those behind them.
        weather: Light and sensor.
        size: Width and height in pixels.
        seed: Varies noise and rain between frames of the same scene.
        caption: Text that the camera writes into its upper left corner.

    Returns:
        The RGB image and a box for every actor of which enough is to be seen.
    """
    width, height = size
    image = _background(view, width, height).copy()
    hz = horizon(view) * height
    owner = np.full((height, width), -1, dtype=np.int16)
    whole: dict[int, int] = {}
    standing: list[Placed | _Prop] = sorted([*things, *_props(view)], key=lambda t: t.v)
    for index, thing in enumerate(standing):
        y = hz + thing.v * (height - hz)
        scale = thing.v * (height - hz) / _CAMERA_HEIGHT_M
        drawn = _prop_sprite(thing, scale) if isinstance(thing, _Prop) else sprite(thing.actor, scale)
        bounds = drawn.getchannel("A").getbbox()
        if bounds is None:
            continue
        x0, y0 = round(thing.u * width - drawn.width / 2), round(y - drawn.height)
        _shadow(image, thing.u * width, y, (bounds[2] - bounds[0]) * 1.1, weather.light)
        image.paste(drawn, (x0, y0), drawn)
        solid = np.asarray(drawn.getchannel("A")) > 128
        whole[index] = int(solid.sum())
        top, left = max(0, -y0), max(0, -x0)
        part = owner[max(0, y0) : y0 + drawn.height, max(0, x0) : x0 + drawn.width]
        part[solid[top : top + part.shape[0], left : left + part.shape[1]]] = index
    boxes = []
    for index, thing in enumerate(standing):
        if isinstance(thing, _Prop) or not whole.get(index):
            continue
        mine = owner == index
        if mine.sum() < _MIN_VISIBLE * whole[index]:
            continue
        ys, xs = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
        box = Box(thing.actor.kind, xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height)
        if min(box.x1 - box.x0, box.y1 - box.y0) >= _MIN_SIDE:
            boxes.append(box)
    image = _weather(image, weather, random.Random(seed))
    if caption:
        font = ImageFont.load_default(size=max(9, height // 28))
        d = ImageDraw.Draw(image)
        d.text(
            (width * 0.015, height * 0.02),
            caption,
            font=font,
            fill=(250, 250, 250),
            stroke_width=1,
            stroke_fill=(20, 20, 20),
        )
    return image, boxes


#: How far (v) each class stands from the camera: near enough to be seen, far enough to fit.
_RANGE = {
    "person": (0.27, 1.0),
    "bicycle": (0.33, 0.95),
    "car": (0.2, 0.8),
    "motorcycle": (0.3, 0.9),
    "bus": (0.12, 0.36),
    "truck": (0.14, 0.5),
    "bird": (0.5, 1.0),
    "cat": (0.42, 1.0),
    "dog": (0.36, 1.0),
}
_SHARE = {
    "person": 7.0,
    "bicycle": 2.0,
    "car": 3.5,
    "motorcycle": 2.0,
    "bus": 1.5,
    "truck": 2.0,
    "bird": 2.2,
    "cat": 2.4,
    "dog": 2.4,
}


def seated(cycle: Placed) -> Placed:
    """The rider of a bicycle or motorcycle; a hair nearer, so that the rider is drawn over the frame."""
    pose: Pose = "ride" if cycle.actor.kind == "bicycle" else "ride_motor"
    rider = replace(cycle.actor, kind="person", pose=pose, view="side", carry="nothing")
    return Placed(rider, cycle.u, cycle.v + 1e-4)


def _random_things(rng: random.Random) -> list[Placed]:
    things = []
    for _ in range(rng.choices((0, 1, 2, 3, 4), (10, 34, 30, 18, 8))[0]):
        kind = rng.choices(CLASSES, [_SHARE[c] for c in CLASSES])[0]
        low, high = _RANGE[kind]
        actor = Actor(
            kind,
            rng.randrange(10**9),
            facing=rng.choice((-1, 1)),
            view="front" if kind in ("person", "car") and rng.random() < 0.45 else "side",
            phase=rng.uniform(0, 2 * math.pi),
            carry=rng.choices(("nothing", "parcel", "bag"), (6, 2, 1))[0],
        )
        placed = Placed(actor, rng.uniform(0.02, 0.98), rng.uniform(low, high))
        things.append(placed)
        if kind in ("bicycle", "motorcycle") and rng.random() < 0.5:
            things.append(seated(placed))
    return things


def random_weather(rng: random.Random) -> Weather:
    """Half day, a third infrared night, the rest dusk; some rain, noise and blur."""
    light: Light = rng.choices(("day", "infrared", "dusk"), (50, 34, 16))[0]
    return Weather(
        light,
        rain=rng.uniform(0.2, 1.0) if rng.random() < 0.15 else 0.0,
        noise=rng.uniform(1.5, 7.0),
        blur=rng.uniform(0.3, 1.1) if rng.random() < 0.35 else 0.0,
        exposure=rng.uniform(0.8, 1.15),
    )


def random_scene(seed: int, size: tuple[int, int] = (640, 360)) -> tuple[Image.Image, list[Box]]:
    """A scene of a random place, light and cast: what the detector is trained and measured on."""
    rng = random.Random(seed)
    view = View(rng.choice(KINDS), rng.randrange(10**9))
    caption = f"{view.kind} {rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}" if rng.random() < 0.5 else None
    things, weather = _random_things(rng), random_weather(rng)
    return render(view, things, weather, size=size, seed=rng.randrange(10**9), caption=caption)
