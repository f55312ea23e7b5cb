"""The grammar of the built-in corpus: scenes of two shapes, their captions and their pictures.

A caption is "a {size} {colour} {shape} [is] {relation} a {size} {colour} {shape}": 2 sizes x 10 colours x
7 shapes x 4 relations. A fifth of the (colour, shape) pairs is held out: test scenes are made of these alone
and no other scene has one, while every colour and every shape is seen in both.
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

SIZES = ("small", "large")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 225, 60),
    "green": (40, 150, 60),
    "blue": (40, 80, 215),
    "purple": (125, 45, 165),
    "pink": (245, 150, 190),
    "brown": (115, 70, 35),
    "black": (22, 22, 22),
    "white": (238, 238, 238),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart")
RELATIONS = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}
"""Each relation and its opposite."""
IMAGE_SIDE = 96  # pixels
RADII = {"small": (9.0, 12.0), "large": (17.0, 20.0)}  # pixels, drawn uniformly
MARGIN = 2.0  # pixels between a shape and the border
GAP = 4.0  # fewest pixels between the shapes
OVERSAMPLING = 4  # drawn this much larger, for smooth edges
GREY = 160  # background: unlike each of the colours


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two things that differ in colour and shape, and how the first lies to the second."""

    first: Thing
    relation: str
    second: Thing
    verb: bool = True
    """Whether the caption says "is"."""

    @property
    def caption(self) -> str:
        """What is spoken."""
        return f"a {self.first} {'is ' if self.verb else ''}{self.relation} a {self.second}"

    @property
    def distractors(self) -> tuple[str, ...]:
        """Wrong captions in nearly the same words: relation, colours, shapes, places swapped."""
        first, second = self.first, self.second
        return tuple(
            scene.caption
            for scene in (
                replace(self, relation=RELATIONS[self.relation]),
                replace(
                    self,
                    first=replace(first, colour=second.colour),
                    second=replace(second, colour=first.colour),
                ),
                replace(self, first=replace(first, shape=second.shape), second=replace(second, shape=first.shape)),
                replace(self, first=second, second=first),
            )
        )


def held_out_pairs(seed: int) -> frozenset[tuple[str, str]]:
    """The 14 of 70 (colour, shape) pairs that only the test split shows: two colours of each shape."""
    rng = np.random.default_rng((seed, 1))
    colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
    return frozenset(
        (str(colour), str(shape))
        for (i, colour), (j, shape) in itertools.product(enumerate(colours), enumerate(shapes))
        if (i + j) % 5 == 0
    )


def draw_scenes(num: int, held_out: bool, seed: int) -> list[Scene]:
    """`num` scenes of held-out pairs alone, or of the others alone; none comes twice before all have come."""
    hidden = held_out_pairs(seed)
    things = [
        Thing(size, colour, shape)
        for size, colour, shape in itertools.product(SIZES, COLOURS, SHAPES)
        if ((colour, shape) in hidden) == held_out
    ]
    scenes = [
        (first, relation, second)
        for first, second in itertools.product(things, things)
        if first.colour != second.colour and first.shape != second.shape
        for relation in RELATIONS
    ]
    rng = np.random.default_rng((seed, 2, int(held_out)))
    order, verbs = rng.permutation(len(scenes)), rng.random(num) < 0.5
    chosen = [scenes[order[i % len(order)]] for i in range(num)]
    return [
        Scene(first, relation, second, bool(verb))
        for (first, relation, second), verb in zip(chosen, verbs, strict=True)
    ]


def draw_image(scene: Scene, rng: np.random.Generator) -> bytes:
    """The scene as a PNG of 96 x 96 pixels: both shapes whole, apart from each other, on one axis."""
    from PIL import Image, ImageDraw

    grey = int(rng.integers(GREY - 8, GREY + 9))
    image = Image.new("RGB", (IMAGE_SIDE * OVERSAMPLING,) * 2, (grey,) * 3)
    draw = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip((scene.first, scene.second), place(scene, rng), strict=True):
        paint = tuple(int(c) for c in np.clip(np.add(COLOURS[thing.colour], rng.integers(-10, 11, 3)), 0, 255))
        corners = [((x + radius * u) * OVERSAMPLING, (y + radius * v) * OVERSAMPLING) for u, v in outline(thing.shape)]
        draw.polygon(corners, fill=paint)
    file = io.BytesIO()
    image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BOX).save(file, "PNG")
    return file.getvalue()


def place(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius (x, y, radius) of both things in pixels, y downwards; none leaves its radius' box."""
    horizontal = scene.relation.startswith("to the")
    first_leads = scene.relation in ("above", "to the left of")
    radii = [rng.uniform(*RADII[thing.size]) for thing in (scene.first, scene.second)]
    ahead, behind = radii if first_leads else radii[::-1]
    free = IMAGE_SIDE - 2 * MARGIN - GAP - 2 * (ahead + behind)
    before, between = free * rng.dirichlet((1, 1, 1))[:2]
    leading = MARGIN + before + ahead
    trailing = leading + ahead + GAP + between + behind
    along = (leading, trailing) if first_leads else (trailing, leading)
    middle = rng.uniform(IMAGE_SIDE / 3, IMAGE_SIDE * 2 / 3)
    placed = []
    for position, radius in zip(along, radii, strict=True):
        edge = MARGIN + radius
        across = float(np.clip(middle + rng.uniform(-4, 4), edge, IMAGE_SIDE - edge))
        placed.append((position, across, radius) if horizontal else (across, position, radius))
    return placed


def outline(shape: str) -> list[tuple[float, float]]:
    """The shape's corners within [-1, 1] x [-1, 1], y downwards."""
    turn = [2 * math.pi * i / 60 for i in range(60)]
    if shape == "circle":
        return [(math.cos(t), math.sin(t)) for t in turn]
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.8), (-1, 0.8)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if shape == "star":
        return [
            (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
            for i in range(10)
            for r in [(1, 0.42)[i % 2]]
        ]
    if shape == "cross":
        a = 0.32
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    assert shape == "heart", shape
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turn
    ]
