"""Synthetic pictures and questions: coloured shapes, each with a digit on it, on textured backgrounds.

Most of a picture is background, and most questions are about details in a few patches, so it matters which vision tokens
stay. Everything is drawn from one seed: the same seed gives the same picture and questions on every machine.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 144
COLORS = {
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (240, 220, 50),
    "green": (44, 160, 60),
    "cyan": (50, 200, 215),
    "blue": (35, 80, 200),
    "purple": (135, 60, 175),
    "pink": (240, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
KINDS = ("existence", "color", "shape", "count", "position", "digit")
MAX_THINGS = 5
SMALLEST, LARGEST = 22, 32  # side of a thing in pixels
CLEAR_DISTANCE = 18  # the least distance in pixels of two centres whose relation is asked

# Digits as 5 x 7 bitmaps, one integer a row. Without a font file the pixels are the same on every machine.
DIGIT_ROWS = (
    (14, 17, 19, 21, 25, 17, 14),
    (4, 12, 4, 4, 4, 4, 14),
    (14, 17, 1, 2, 4, 8, 31),
    (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2),
    (31, 16, 30, 1, 1, 17, 14),
    (6, 8, 16, 30, 17, 17, 14),
    (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14),
    (14, 17, 17, 15, 1, 2, 12),
)
DIGIT_SCALE = 2  # pixels along one side of a bitmap cell


@dataclass(frozen=True)
class Thing:
    """One coloured shape: centre and side in pixels, and the digit drawn on it."""

    color: str
    shape: str
    digit: int
    x: int
    y: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels."""
        half = self.size // 2
        return self.x - half, self.y - half, self.x - half + self.size, self.y - half + self.size

    @property
    def digit_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the digit; it is lower in a triangle, whose top is too narrow."""
        width, height = 5 * DIGIT_SCALE, 7 * DIGIT_SCALE
        left = self.x - width // 2
        top = self.y - height // 2 + (self.size // 6 if self.shape == "triangle" else 0)
        return left, top, left + width, top + height


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background_seed: int


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def sample_scene(rng: Random, num_things: int) -> Scene:
    """A scene of up to `num_things` things that do not touch; no two share both colour and shape."""
    things: list[Thing] = []
    for _ in range(40 * num_things):
        thing = sample_thing(rng)
        if len(things) < num_things and all(apart(thing, other) for other in things):
            things.append(thing)
    return Scene(tuple(things), rng.randrange(2**31))


def any_scene(rng: Random) -> Scene:
    """A scene with 1 to MAX_THINGS things."""
    return sample_scene(rng, rng.randint(1, MAX_THINGS))


def sample_thing(rng: Random) -> Thing:
    size = rng.randint(SMALLEST, LARGEST)
    low, high = size // 2 + 2, IMAGE_SIZE - size // 2 - 2
    color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
    return Thing(color, shape, rng.randrange(10), rng.randint(low, high), rng.randint(low, high), size)


def apart(thing: Thing, other: Thing) -> bool:
    gap = (thing.size + other.size) // 2 + 2
    return thing.name != other.name and max(abs(thing.x - other.x), abs(thing.y - other.y)) >= gap


def draw_scene(scene: Scene) -> Image.Image:
    """The picture, RGB, IMAGE_SIZE square."""
    noise = np.random.default_rng(scene.background_seed)
    image = draw_background(noise)
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = shade(thing, noise)
        draw_shape(canvas, thing, fill)
        draw_digit(canvas, thing, fill)
    return image


def shade(thing: Thing, noise: np.random.Generator) -> tuple[int, ...]:
    """The thing's colour with a small random deviation."""
    jitter = noise.integers(-18, 19, size=3)
    return tuple(int(value) for value in np.clip(np.array(COLORS[thing.color]) + jitter, 0, 255))


def draw_background(noise: np.random.Generator) -> Image.Image:
    """A muted colour with soft blotches, fine grain and up to three thin lines."""
    base = noise.integers(90, 200) + noise.integers(-14, 15, size=3)
    blotches = Image.fromarray(noise.integers(0, 256, size=(6, 6), dtype=np.uint8))
    soft = np.asarray(blotches.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR), dtype=np.int16) // 6 - 21
    grain = noise.integers(-9, 10, size=(IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.int16)
    pixels = np.clip(base.astype(np.int16) + soft[:, :, None] + grain, 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    for _ in range(noise.integers(0, 4)):
        grey = int(noise.integers(60, 220))
        canvas.line([int(value) for value in noise.integers(0, IMAGE_SIZE, size=4)], fill=(grey, grey, grey))
    return image


def draw_shape(canvas: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...] | int) -> None:
    """Draw the thing's shape filled with a colour, or on a label map with a number."""
    left, top, right, bottom = thing.box
    if thing.shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=fill)
    elif thing.shape == "square":
        inset = thing.size // 12  # a full square would be much larger than the other shapes
        canvas.rectangle((left + inset, top + inset, right - inset, bottom - inset), fill=fill)
    else:
        corners = OUTLINES[thing.shape]
        canvas.polygon([(left + u * thing.size, top + v * thing.size) for u, v in corners], fill=fill)


def draw_digit(canvas: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...]) -> None:
    """Black on light things, white on dark ones."""
    red, green, blue = fill
    ink = (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else (255, 255, 255)
    left, top, _, _ = thing.digit_box
    for row, bits in enumerate(DIGIT_ROWS[thing.digit]):
        for column in range(5):
            if bits >> (4 - column) & 1:
                x, y = left + column * DIGIT_SCALE, top + row * DIGIT_SCALE
                canvas.rectangle((x, y, x + DIGIT_SCALE - 1, y + DIGIT_SCALE - 1), fill=ink)


def star_outline() -> list[tuple[float, float]]:
    """Ten corners of a five-pointed star in the unit square, wide enough for a digit."""
    angles = [np.pi * corner / 5 - np.pi / 2 for corner in range(10)]
    radii = [0.54 if corner % 2 == 0 else 0.29 for corner in range(10)]
    return [(float(0.5 + r * np.cos(a)), float(0.53 + r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "triangle": [(0.5, -0.04), (1.04, 1.0), (-0.04, 1.0)],
    "diamond": [(0.5, -0.06), (1.06, 0.5), (0.5, 1.06), (-0.06, 0.5)],
    "star": star_outline(),
    "cross": [(a / 3, b / 3) for a, b in
              [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]],
}  # fmt: skip


def ask(scene: Scene, kind: str, rng: Random) -> Question | None:
    """One question of the kind, or None if the scene allows no unambiguous one."""
    return ASKERS[kind](scene, rng)


def ask_existence(scene: Scene, rng: Random) -> Question:
    """As in POPE, yes and no are equally frequent; half of the absent things share colour or shape with a real one."""
    real = rng.choice(scene.things)
    if rng.random() < 0.5:
        return Question("existence", f"Is there a {real.name} in the image?", "yes")
    present = {thing.name for thing in scene.things}
    while True:
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        twist = rng.random()
        color = real.color if twist < 0.25 else color
        shape = real.shape if 0.25 <= twist < 0.5 else shape
        if f"{color} {shape}" not in present:
            return Question("existence", f"Is there a {color} {shape} in the image?", "no")


def ask_color(scene: Scene, rng: Random) -> Question | None:
    shapes = [thing.shape for thing in scene.things]
    alone = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("color", f"What color is the {thing.shape}?", thing.color)


def ask_shape(scene: Scene, rng: Random) -> Question | None:
    colors = [thing.color for thing in scene.things]
    alone = [thing for thing in scene.things if colors.count(thing.color) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("shape", f"What shape is the {thing.color} object?", thing.shape)


def ask_count(scene: Scene, rng: Random) -> Question:
    return Question("count", "How many objects are in the image?", str(len(scene.things)))


def ask_position(scene: Scene, rng: Random) -> Question | None:
    """Asks left or right, above or below, for two centres at least CLEAR_DISTANCE apart on that axis."""
    pairs = [
        (one, other, axis)
        for one in scene.things
        for other in scene.things
        for axis in ("x", "y")
        if abs(getattr(one, axis) - getattr(other, axis)) >= CLEAR_DISTANCE
    ]
    if not pairs:
        return None
    one, other, axis = rng.choice(pairs)
    first, second = ("left", "right") if axis == "x" else ("above", "below")
    between = "left or right of" if axis == "x" else "above or below"
    answer = first if getattr(one, axis) < getattr(other, axis) else second
    return Question("position", f"Is the {one.name} {between} the {other.name}?", answer)


def ask_digit(scene: Scene, rng: Random) -> Question:
    thing = rng.choice(scene.things)
    return Question("digit", f"What digit is on the {thing.name}?", str(thing.digit))


ASKERS = {
    "existence": ask_existence,
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "digit": ask_digit,
}


def describe(scene: Scene) -> Question:
    """Every thing in reading order. This trains the model to look everywhere; it is never used for scoring."""
    ordered = sorted(scene.things, key=lambda thing: (thing.y, thing.x))
    return Question("describe", "Describe the image.", ", ".join(f"{thing.name} {thing.digit}" for thing in ordered))
