"""Synthetic clips and questions: the things of scenes.py stay, move, appear or vanish in front of a still background.

Most questions need several frames. Everything is drawn from one seed: the same seed gives the same clip and questions on
every machine.
"""

from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLORS, IMAGE_SIZE, SHAPES, Question, Thing, draw_background, draw_digit, draw_shape, sample_thing, shade

FRAMES = 8
MAX_ACTORS = 4
ACTIONS = {"stay": "stays", "move": "moves", "appear": "appears", "vanish": "vanishes"}
ACTION_WEIGHTS = {"stay": 0.1, "move": 0.54, "appear": 0.18, "vanish": 0.18}  # most moves leave the picture and are drawn again
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SLOWEST, FASTEST = 7, 12  # pixels from one frame to the next
GAP = 4  # the least number of pixels between two paths
CLEAR_FRAMES = 2  # the least number of frames between two events whose order is asked

# The possible answers of every kind. Held-out questions take them in turn, so all answers are equally frequent.
ANSWERS = {
    "existence": ("yes", "no"),
    "color": tuple(COLORS),
    "digit": tuple(str(digit) for digit in range(10)),
    "direction": tuple(DIRECTIONS),
    "order": ("before", "after"),
    "half": ("first", "second"),
    "count": tuple(str(count) for count in range(1, MAX_ACTORS + 1)),
    "action": tuple(ACTIONS),
}
KINDS = tuple(ANSWERS)


@dataclass(frozen=True)
class Actor:
    """A thing and its one action.

    `thing` has its place in frame 0. `event` is the first frame with the thing ("appear") or without it ("vanish"). `speed`
    is in pixels a frame, towards `direction` ("move").
    """

    thing: Thing
    action: str
    event: int = 0
    direction: str = ""
    speed: int = 0

    def at(self, frame: int) -> Thing | None:
        """The thing at its place in a frame, or None if the frame does not show it."""
        if (self.action == "appear" and frame < self.event) or (self.action == "vanish" and frame >= self.event):
            return None
        right, down = DIRECTIONS.get(self.direction, (0, 0))
        return replace(self.thing, x=self.thing.x + frame * self.speed * right, y=self.thing.y + frame * self.speed * down)

    @property
    def path(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of the box around all its places."""
        last = replace(self, action="move").at(FRAMES - 1) or self.thing
        lefts, tops, rights, bottoms = zip(self.thing.box, last.box, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)


@dataclass(frozen=True)
class Clip:
    actors: tuple[Actor, ...]
    background_seed: int

    def things(self, frame: int) -> list[Thing]:
        """The things that a frame shows."""
        return [thing for thing in (actor.at(frame) for actor in self.actors) if thing is not None]


def any_clip(rng: Random) -> Clip:
    """A clip with 1 to MAX_ACTORS actors; a single actor is half as frequent as each other number."""
    return sample_clip(rng, rng.choices(range(1, MAX_ACTORS + 1), (1, 2, 2, 2))[0])


def sample_clip(rng: Random, num_actors: int) -> Clip:
    """A clip of up to `num_actors` actors whose paths do not touch; no two share both colour and shape."""
    actors: list[Actor] = []
    for _ in range(60 * num_actors):
        actor = sample_actor(rng)
        if len(actors) < num_actors and inside(actor) and all(apart(actor, other) for other in actors):
            actors.append(actor)
    return Clip(tuple(actors), rng.randrange(2**31))


def sample_actor(rng: Random) -> Actor:
    thing = sample_thing(rng)
    action = rng.choices(list(ACTION_WEIGHTS), list(ACTION_WEIGHTS.values()))[0]
    if action == "move":
        return Actor(thing, action, direction=rng.choice(list(DIRECTIONS)), speed=rng.randint(SLOWEST, FASTEST))
    return Actor(thing, action, event=0 if action == "stay" else rng.randint(1, FRAMES - 1))


def inside(actor: Actor) -> bool:
    left, top, right, bottom = actor.path
    return min(left, top) >= 2 and max(right, bottom) <= IMAGE_SIZE - 2


def apart(actor: Actor, other: Actor) -> bool:
    (left, top, right, bottom), (left2, top2, right2, bottom2) = actor.path, other.path
    distance = max(left2 - right, left - right2, top2 - bottom, top - bottom2)
    return actor.thing.name != other.thing.name and distance >= GAP


def draw_clip(clip: Clip) -> list[Image.Image]:
    """FRAMES pictures, RGB, IMAGE_SIZE square. Only the pixels of acting things differ between frames."""
    noise = np.random.default_rng(clip.background_seed)
    background = draw_background(noise)
    fills = [shade(actor.thing, noise) for actor in clip.actors]
    return [draw_frame(background, clip, fills, frame) for frame in range(FRAMES)]


def draw_frame(background: Image.Image, clip: Clip, fills: list[tuple[int, ...]], frame: int) -> Image.Image:
    image = background.copy()
    canvas = ImageDraw.Draw(image)
    for actor, fill in zip(clip.actors, fills, strict=True):
        thing = actor.at(frame)
        if thing is not None:
            draw_shape(canvas, thing, fill)
            draw_digit(canvas, thing, fill)
    return image


def ask(clip: Clip, kind: str, rng: Random) -> Question | None:
    """One question of the kind, or None if the clip allows no unambiguous one."""
    return ASKERS[kind](clip, rng)


def ask_existence(clip: Clip, rng: Random) -> Question:
    """Yes and no are equally frequent; half of the absent things share colour or shape with a real one."""
    real = rng.choice(clip.actors).thing
    if rng.random() < 0.5:
        return Question("existence", f"Is there a {real.name} in the video?", "yes")
    present = {actor.thing.name for actor in clip.actors}
    while True:
        color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
        twist = rng.random()
        color = real.color if twist < 0.25 else color
        shape = real.shape if 0.25 <= twist < 0.5 else shape
        if f"{color} {shape}" not in present:
            return Question("existence", f"Is there a {color} {shape} in the video?", "no")


def ask_color(clip: Clip, rng: Random) -> Question | None:
    """Asks about an action that exactly one thing does."""
    actions = [actor.action for actor in clip.actors]
    alone = [actor for actor in clip.actors if actor.action != "stay" and actions.count(actor.action) == 1]
    if not alone:
        return None
    actor = rng.choice(alone)
    return Question("color", f"What color is the object that {ACTIONS[actor.action]}?", actor.thing.color)


def ask_digit(clip: Clip, rng: Random) -> Question:
    thing = rng.choice(clip.actors).thing
    return Question("digit", f"What digit is on the {thing.name}?", str(thing.digit))


def ask_direction(clip: Clip, rng: Random) -> Question | None:
    moving = [actor for actor in clip.actors if actor.action == "move"]
    if not moving:
        return None
    actor = rng.choice(moving)
    return Question("direction", f"In which direction does the {actor.thing.name} move?", actor.direction)


def ask_order(clip: Clip, rng: Random) -> Question | None:
    """Asks about two things that both appear or both vanish, at least CLEAR_FRAMES apart."""
    pairs = [
        (one, other)
        for one in clip.actors
        for other in clip.actors
        if one.action == other.action and abs(one.event - other.event) >= CLEAR_FRAMES
    ]
    if not pairs:
        return None
    one, other = rng.choice(pairs)
    text = f"Does the {one.thing.name} {one.action} before or after the {other.thing.name}?"
    return Question("order", text, "before" if one.event < other.event else "after")


def ask_half(clip: Clip, rng: Random) -> Question | None:
    """Never asks about an event in the middle frame."""
    middle = FRAMES // 2
    timed = [actor for actor in clip.actors if actor.event not in (0, middle)]
    if not timed:
        return None
    actor = rng.choice(timed)
    text = f"Does the {actor.thing.name} {actor.action} in the first or the second half of the video?"
    return Question("half", text, "first" if actor.event < middle else "second")


def ask_count(clip: Clip, rng: Random) -> Question | None:
    """Asks about the whole video, or about its last frame if that shows anything."""
    if rng.random() < 0.5:
        return Question("count", "How many objects are in the whole video?", str(len(clip.actors)))
    left = len(clip.things(FRAMES - 1))
    return Question("count", "How many objects are there at the end of the video?", str(left)) if left else None


def ask_action(clip: Clip, rng: Random) -> Question:
    """Every action that occurs in the clip is equally likely to be the answer."""
    action = rng.choice(sorted({actor.action for actor in clip.actors}))
    actor = rng.choice([actor for actor in clip.actors if actor.action == action])
    return Question("action", f"What does the {actor.thing.name} do?", action)


ASKERS = {
    "existence": ask_existence,
    "color": ask_color,
    "digit": ask_digit,
    "direction": ask_direction,
    "order": ask_order,
    "half": ask_half,
    "count": ask_count,
    "action": ask_action,
}


def describe(clip: Clip) -> Question:
    """Every thing in reading order, with its action and the direction or frame of it.

    This trains the model to look everywhere. It is never used for scoring.
    """
    ordered = sorted(clip.actors, key=lambda actor: (actor.thing.y, actor.thing.x))
    parts = (f"{actor.thing.name} {actor.thing.digit} {deed(actor)}" for actor in ordered)
    return Question("describe", "Describe the video.", ", ".join(parts))


def deed(actor: Actor) -> str:
    detail = {"stay": "", "move": actor.direction}.get(actor.action, str(actor.event))
    return f"{actor.action} {detail}".rstrip()
