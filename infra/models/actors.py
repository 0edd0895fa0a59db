"""Drawings of the nine classes: antialiased sprites with alpha, sized in metres, deterministic from a seed.

They are silhouettes with clothes, wheels and tails, drawn large and scaled down. Sizes of the animals are
exaggerated (a cat of 0.5 m) so that they stay visible to a detector whose input is 320 pixels wide.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, ImageDraw

CLASSES = ("person", "bicycle", "car", "motorcycle", "bus", "truck", "bird", "cat", "dog")
View = Literal["side", "front"]
Pose = Literal["walk", "ride", "ride_motor"]
Carry = Literal["nothing", "parcel", "bag"]
Color = tuple[int, int, int]

#: Width and height in metres of each class's canvas; the drawing stands on its bottom centre.
_CANVAS = {
    "person": (1.7, 2.0),
    "bicycle": (2.0, 1.25),
    "car": (4.8, 1.7),
    "motorcycle": (2.4, 1.4),
    "bus": (9.6, 3.3),
    "truck": (6.6, 3.2),
    "bird": (0.9, 0.6),
    "cat": (1.1, 0.75),
    "dog": (1.5, 0.95),
}
_OVERSAMPLE = 3
_SKIN: tuple[Color, ...] = ((241, 204, 172), (224, 172, 130), (172, 120, 82), (110, 74, 52))
_FUR_DOG: tuple[Color, ...] = ((125, 82, 45), (62, 46, 36), (205, 172, 120), (44, 44, 46), (226, 220, 210))
_FUR_CAT: tuple[Color, ...] = ((226, 138, 62), (112, 112, 118), (34, 34, 36), (238, 234, 228), (150, 116, 80))
_GLASS: Color = (58, 76, 94)
_RUBBER: Color = (24, 24, 26)


@dataclass(frozen=True)
class Actor:
    """One thing to draw. `look` is the seed of its colours and build; the rest is its present posture."""

    kind: str
    look: int
    facing: int = 1
    view: View = "side"
    phase: float = 0.0
    pose: Pose = "walk"
    carry: Carry = "nothing"


@dataclass
class _Pen:
    """Draws in metres: x to the actor's front, y upwards from the ground, origin at the bottom centre."""

    width_m: float
    height_m: float
    scale: float
    facing: int
    image: Image.Image = field(init=False)
    draw: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        size = (max(1, round(self.width_m * self.scale)), max(1, round(self.height_m * self.scale)))
        self.image = Image.new("RGBA", size)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (self.facing * x + self.width_m / 2) * self.scale, (self.height_m - y) * self.scale

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (a, b), (c, d) = self.at(x0, y0), self.at(x1, y1)
        return min(a, c), min(b, d), max(a, c), max(b, d)

    def polygon(self, points: list[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([self.at(*p) for p in points], fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: Color) -> None:
        self.draw.ellipse(self.box(x - rx, y - ry, x + rx, y + ry), fill=color)

    def ring(self, x: float, y: float, *, radius: float, width: float, color: Color) -> None:
        box = self.box(x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse(box, outline=color, width=max(1, round(width * self.scale)))

    def block(self, x0: float, y0: float, x1: float, y1: float, color: Color, *, radius: float = 0.0) -> None:
        self.draw.rounded_rectangle(self.box(x0, y0, x1, y1), radius=radius * self.scale, fill=color)

    def limb(self, points: list[tuple[float, float]], width: float, color: Color) -> None:
        pixels = max(1, round(width * self.scale))
        xy = [self.at(*p) for p in points]
        self.draw.line(xy, fill=color, width=pixels, joint="curve")
        for x, y in (xy[0], xy[-1]):
            r = pixels / 2
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)


def shade(color: Color, factor: float) -> Color:
    """The colour made darker (< 1) or lighter (> 1)."""
    r, g, b = (max(0, min(255, int(c * factor))) for c in color)
    return r, g, b


def paint(rng: random.Random, low: int = 30, high: int = 235) -> Color:
    """A random colour whose channels lie in [low, high]."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _person(p: _Pen, rng: random.Random, a: Actor) -> None:
    skin, top, legs = rng.choice(_SKIN), paint(rng), paint(rng, 15, 130)
    hair, shoes = paint(rng, 10, 110), paint(rng, 10, 70)
    h, girth, hood = rng.uniform(0.92, 1.04), rng.uniform(0.9, 1.15), rng.random() < 0.3
    hip, shoulder = 0.92 * h, 1.45 * h
    swing = math.sin(a.phase)
    lean = 0.0
    if a.pose != "walk":
        # Seated: thighs forward to the pedals, arms to the handlebar.
        lean, crank = 0.2, 0.12 * swing
        hip, shoulder = (0.98, 1.46) if a.pose == "ride" else (0.85, 1.36)
        for s in (-1, 1):
            foot = (0.12 + s * crank, 0.34 + s * 0.12 * math.cos(a.phase))
            p.limb([(-0.16, hip), (0.24, hip - 0.18), foot], 0.15, shade(legs, 1 if s > 0 else 0.75))
            p.limb([foot, (foot[0] + 0.12, foot[1])], 0.1, shoes)
        p.limb([(-0.14, hip), (lean, shoulder - 0.1)], 0.36 * girth, top)
        p.limb([(lean, shoulder - 0.1), (0.52, hip + 0.12)], 0.11, shade(top, 0.8))
    elif a.view == "side":
        for s in (-1, 1):
            knee, foot = (s * swing * 0.18 + 0.03, hip * 0.52), (s * swing * 0.33, 0.06)
            color = shade(legs, 1 if s > 0 else 0.75)
            p.limb([(0, hip), knee, foot], 0.16 * girth, color)
            p.limb([foot, (foot[0] + 0.13, 0.05)], 0.09, shoes)
        p.limb([(-0.02, shoulder), (-0.02 - swing * 0.22, hip)], 0.11, shade(top, 0.7))
        p.limb([(0, hip + 0.04), (0.02, shoulder - 0.1)], 0.34 * girth, top)
        hand = (0.34, hip + 0.28) if a.carry == "parcel" else (swing * 0.24 + 0.05, hip - 0.02)
        p.limb([(0, shoulder - 0.03), (hand[0] * 0.5 - 0.06, hip + 0.24), hand], 0.11, shade(top, 0.85))
        p.ellipse(*hand, 0.06, 0.06, skin)
    else:
        for s in (-1, 1):
            lift = max(0.0, s * swing) * 0.1
            p.limb([(s * 0.1, hip), (s * 0.12, hip * 0.5), (s * 0.12, 0.07 + lift)], 0.17 * girth, legs)
            p.limb([(s * 0.12, 0.05 + lift), (s * 0.15, 0.05 + lift)], 0.11, shoes)
            elbow, hand = (s * 0.3 * girth, hip + 0.2), (s * 0.3 * girth, hip - 0.02 + s * swing * 0.06)
            p.limb([(s * 0.22 * girth, shoulder - 0.06), elbow, hand], 0.12, shade(top, 0.85))
            p.ellipse(*hand, 0.06, 0.06, skin)
        p.block(-0.25 * girth, hip - 0.05, 0.25 * girth, shoulder, top, radius=0.1)
    head = (lean + (0.04 if a.view == "side" else 0.0), shoulder + 0.17)
    p.limb([(lean, shoulder - 0.02), head], 0.12, skin)
    p.ellipse(*head, 0.115, 0.145, skin)
    cap = top if hood else hair
    p.draw.pieslice(p.box(head[0] - 0.125, head[1] - 0.13, head[0] + 0.125, head[1] + 0.16), 180, 360, fill=cap)
    if a.view == "side":
        p.ellipse(head[0] - 0.06, head[1] + 0.02, 0.08, 0.12, cap)
    if a.carry == "parcel":
        x = 0.36 if a.view == "side" else 0.0
        p.block(x - 0.2, hip + 0.1, x + 0.2, hip + 0.42, (176, 132, 84))
        p.block(x - 0.03, hip + 0.1, x + 0.03, hip + 0.42, (208, 180, 130))
    elif a.carry == "bag":
        p.block(-0.36, hip + 0.05, -0.14, shoulder - 0.05, paint(rng, 20, 120), radius=0.06)


def _wheel(p: _Pen, x: float, radius: float) -> None:
    p.ellipse(x, radius, radius, radius, _RUBBER)
    p.ellipse(x, radius, radius * 0.55, radius * 0.55, (150, 150, 156))
    p.ellipse(x, radius, radius * 0.2, radius * 0.2, (70, 70, 74))


def _car(p: _Pen, rng: random.Random, a: Actor) -> None:
    color = paint(rng, 35, 235)
    if a.view == "front":
        for s in (-1, 1):
            p.block(s * 0.84, 0, s * 0.58, 0.4, _RUBBER, radius=0.05)
        p.polygon([(-0.66, 0.85), (-0.54, 1.42), (0.54, 1.42), (0.66, 0.85)], shade(color, 0.9))
        p.polygon([(-0.58, 0.88), (-0.49, 1.34), (0.49, 1.34), (0.58, 0.88)], _GLASS)
        p.block(-0.88, 0.2, 0.88, 0.92, color, radius=0.14)
        p.block(-0.4, 0.36, 0.4, 0.56, shade(color, 0.35), radius=0.04)
        p.block(-0.2, 0.24, 0.2, 0.34, (230, 230, 226))
        for s in (-1, 1):
            p.ellipse(s * 0.66, 0.64, 0.15, 0.1, (250, 246, 214))
        return
    roof = rng.uniform(-0.15, 0.1)
    p.block(-2.1, 0.26, 2.12, 0.86, color, radius=0.2)
    p.polygon([(-1.75, 0.8), (-1.1 + roof, 1.44), (0.55 + roof, 1.44), (1.2, 0.82)], color)
    p.polygon([(-1.45, 0.84), (-1.02 + roof, 1.34), (-0.32, 1.34), (-0.32, 0.84)], _GLASS)
    p.polygon([(-0.22, 0.84), (-0.22, 1.34), (0.48 + roof, 1.34), (0.95, 0.84)], _GLASS)
    p.limb([(-0.27, 0.3), (-0.27, 0.84)], 0.02, shade(color, 0.7))
    p.block(-2.1, 0.26, 2.1, 0.4, shade(color, 0.65), radius=0.06)
    p.block(1.95, 0.6, 2.12, 0.76, (250, 244, 200), radius=0.03)
    p.block(-2.1, 0.6, -1.98, 0.78, (200, 40, 36), radius=0.03)
    for x in (-1.3, 1.3):
        p.ellipse(x, 0.34, 0.42, 0.42, shade(color, 0.4))
        _wheel(p, x, 0.34)


def _truck(p: _Pen, rng: random.Random) -> None:
    cab, load = paint(rng), paint(rng, 110, 240)
    p.block(-3.0, 0.42, 1.1, 2.95, load, radius=0.04)
    for i in range(1, 7):
        x = -3.0 + 4.1 * i / 7
        p.limb([(x, 0.5), (x, 2.9)], 0.03, shade(load, 0.82))
    p.block(-3.0, 0.42, 1.1, 0.62, shade(load, 0.5))
    p.polygon([(1.2, 0.35), (1.2, 2.3), (2.35, 2.3), (2.75, 1.45), (2.95, 1.3), (2.95, 0.35)], cab)
    p.polygon([(1.65, 1.4), (1.65, 2.1), (2.28, 2.1), (2.6, 1.4)], _GLASS)
    p.block(2.8, 0.65, 2.96, 0.9, (250, 244, 200))
    for x in (-2.3, -1.3, 2.1):
        _wheel(p, x, 0.48)


def _bus(p: _Pen, rng: random.Random) -> None:
    color = paint(rng, 70, 240)
    p.block(-4.4, 0.36, 4.4, 3.05, color, radius=0.22)
    for i in range(7):
        x = -4.15 + i * 1.12
        p.block(x, 1.55, x + 0.95, 2.65, _GLASS, radius=0.06)
    p.block(3.72, 1.35, 4.38, 2.7, shade(_GLASS, 1.2), radius=0.06)
    p.block(-4.4, 1.0, 4.4, 1.25, shade(color, 0.6))
    p.block(2.55, 0.5, 3.4, 2.6, shade(_GLASS, 0.8), radius=0.04)
    p.block(4.25, 0.6, 4.42, 0.85, (250, 244, 200))
    for x in (-2.8, 1.9):
        _wheel(p, x, 0.5)


def _cycle(p: _Pen, rng: random.Random, a: Actor) -> None:
    color = paint(rng, 40, 230)
    if a.kind == "bicycle":
        for x in (-0.52, 0.52):
            p.ring(x, 0.34, radius=0.34, width=0.05, color=_RUBBER)
            for k in range(3):
                t = a.phase + k * math.pi / 3
                dx, dy = 0.3 * math.cos(t), 0.3 * math.sin(t)
                p.limb([(x - dx, 0.34 - dy), (x + dx, 0.34 + dy)], 0.015, (140, 140, 144))
        seat, crank, head = (-0.2, 0.85), (-0.05, 0.33), (0.38, 0.82)
        frame = [(-0.52, 0.34), crank, seat, (-0.52, 0.34)], [crank, head, seat], [head, (0.52, 0.34)]
        for part in frame:
            p.limb(list(part), 0.055, color)
        p.limb([seat, (-0.22, 0.95)], 0.05, color)
        p.limb([(-0.34, 0.97), (-0.1, 0.97)], 0.08, (24, 24, 26))
        p.limb([head, (0.36, 1.04), (0.5, 1.06)], 0.05, (40, 40, 44))
        return
    for x in (-0.7, 0.74):
        _wheel(p, x, 0.33)
        p.ring(x, 0.33, radius=0.33, width=0.1, color=_RUBBER)
    p.polygon([(-0.42, 0.35), (-0.3, 0.72), (0.35, 0.72), (0.42, 0.4), (0.2, 0.25), (-0.25, 0.25)], (72, 72, 78))
    p.polygon([(-0.15, 0.72), (0.0, 0.95), (0.36, 0.95), (0.5, 0.72)], color)
    p.polygon([(-0.85, 0.82), (-0.8, 0.7), (-0.1, 0.68), (-0.1, 0.8)], (28, 28, 30))
    p.polygon([(-1.0, 0.68), (-0.8, 0.74), (-0.45, 0.6), (-0.8, 0.55)], color)
    p.limb([(0.74, 0.33), (0.46, 0.95), (0.36, 1.12)], 0.09, (120, 120, 126))
    p.limb([(0.36, 1.12), (0.24, 1.14)], 0.07, (24, 24, 26))
    p.ellipse(0.58, 0.9, 0.12, 0.12, (246, 240, 200))
    p.limb([(-0.2, 0.28), (-0.95, 0.3)], 0.1, (170, 170, 176))


def _dog(p: _Pen, rng: random.Random, a: Actor) -> None:
    fur = rng.choice(_FUR_DOG)
    dark = shade(fur, 0.7)
    swing = 0.13 * math.sin(a.phase)
    for x, s, c in ((-0.36, -1, dark), (0.3, 1, dark), (-0.3, 1, fur), (0.36, -1, fur)):
        p.limb([(x, 0.42), (x + s * swing * 0.4, 0.22), (x + s * swing, 0.04)], 0.09, c)
    p.ellipse(0.0, 0.5, 0.47, 0.17, fur)
    p.ellipse(0.28, 0.52, 0.2, 0.2, fur)
    p.limb([(-0.42, 0.55), (-0.56, 0.72), (-0.6, 0.84 + 0.03 * math.sin(3 * a.phase))], 0.07, fur)
    p.limb([(0.36, 0.58), (0.48, 0.76)], 0.18, fur)
    p.ellipse(0.52, 0.78, 0.14, 0.13, fur)
    p.limb([(0.56, 0.75), (0.7, 0.73)], 0.12, shade(fur, 0.85))
    p.ellipse(0.75, 0.75, 0.03, 0.03, (16, 16, 16))
    p.polygon([(0.4, 0.88), (0.36, 0.62), (0.46, 0.62), (0.5, 0.86)], dark)


def _cat(p: _Pen, rng: random.Random, a: Actor) -> None:
    fur = rng.choice(_FUR_CAT)
    dark = shade(fur, 0.75)
    swing = 0.08 * math.sin(a.phase)
    for x, s, c in ((-0.22, -1, dark), (0.2, 1, dark), (-0.18, 1, fur), (0.24, -1, fur)):
        p.limb([(x, 0.24), (x + s * swing, 0.03)], 0.07, c)
    p.ellipse(0.0, 0.29, 0.3, 0.13, fur)
    p.limb([(-0.26, 0.32), (-0.4, 0.4), (-0.42, 0.58), (-0.34, 0.68)], 0.06, fur)
    p.ellipse(0.31, 0.42, 0.13, 0.115, fur)
    for x in (0.22, 0.35):
        p.polygon([(x - 0.03, 0.48), (x + 0.02, 0.61), (x + 0.08, 0.48)], fur)
    p.ellipse(0.37, 0.44, 0.022, 0.022, (226, 230, 120))
    if fur[0] > 100:
        for x in (-0.12, 0.0, 0.12):
            p.limb([(x, 0.34), (x, 0.4)], 0.03, shade(fur, 0.6))


def _bird(p: _Pen, rng: random.Random, a: Actor) -> None:
    body = paint(rng, 20, 200)
    bob = 0.03 * math.sin(a.phase)
    for x in (-0.02, 0.06):
        p.limb([(x, 0.18), (x + 0.02, 0.02), (x + 0.07, 0.02)], 0.025, (214, 134, 46))
    p.ellipse(0.0, 0.26, 0.2, 0.12, body)
    p.polygon([(-0.12, 0.32), (-0.4, 0.2), (-0.38, 0.14), (-0.08, 0.2)], shade(body, 0.6))
    p.ellipse(-0.03, 0.28, 0.15, 0.07, shade(body, 0.75))
    p.limb([(0.1, 0.3), (0.16, 0.4 + bob)], 0.11, body)
    p.ellipse(0.18, 0.42 + bob, 0.085, 0.08, body)
    p.polygon([(0.24, 0.46 + bob), (0.38, 0.41 + bob), (0.24, 0.38 + bob)], (240, 172, 44))
    p.ellipse(0.2, 0.44 + bob, 0.018, 0.018, (10, 10, 10))


def sprite(actor: Actor, pixels_per_metre: float) -> Image.Image:
    """Draws an actor at a scale.

    Returns:
        An RGBA image whose bottom centre is the actor's place on the ground. Its alpha is the silhouette.
    """
    rng = random.Random(actor.look)
    width, height = _CANVAS[actor.kind]
    pen = _Pen(width, height, pixels_per_metre * _OVERSAMPLE, actor.facing)
    if actor.kind == "person":
        _person(pen, rng, actor)
    elif actor.kind == "car":
        _car(pen, rng, actor)
    elif actor.kind == "truck":
        _truck(pen, rng)
    elif actor.kind == "bus":
        _bus(pen, rng)
    elif actor.kind in ("bicycle", "motorcycle"):
        _cycle(pen, rng, actor)
    else:
        {"dog": _dog, "cat": _cat, "bird": _bird}[actor.kind](pen, rng, actor)
    return pen.image.reduce(_OVERSAMPLE)
