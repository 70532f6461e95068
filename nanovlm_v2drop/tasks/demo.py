"""The demo's held-out questions: new scenes, one question each, in equal parts of every kind.

Training draws its scenes from integer seeds and this task from named seeds, so they share no scene.
"""

from itertools import count
from random import Random

from ..demo import scenes
from .base import Sample
from .synthetic import SyntheticTask


class Demo(SyntheticTask):
    """Questions about pictures of scenes, scored like every SyntheticTask."""

    name = "demo"
    kinds = scenes.KINDS
    default_samples = 360

    def sample(self, number: int) -> Sample:
        return held_out(number)


def held_out(number: int) -> Sample:
    """The sample of that number; kinds take turns, and so do the answers yes and no."""
    kind = scenes.KINDS[number % len(scenes.KINDS)]
    wanted = ("yes", "no")[number // len(scenes.KINDS) % 2]
    drawn = (draw_question(f"held-out {number} {attempt}", kind) for attempt in count())
    scene, question = next((s, q) for s, q in drawn if q is not None and (kind != "existence" or q.answer == wanted))
    return Sample(f"{kind}-{number}", question.text, (scenes.draw_scene(scene),), question.answer, kind)


def draw_question(seed: str, kind: str) -> tuple[scenes.Scene, scenes.Question | None]:
    rng = Random(seed)
    scene = scenes.any_scene(rng)
    return scene, scenes.ask(scene, kind, rng)
