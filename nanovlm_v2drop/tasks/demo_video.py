"""The video demo's held-out questions: new clips, one question each, in equal parts of every kind.

Training draws its clips from integer seeds and this task from named seeds, so they share no clip.
"""

from itertools import count
from random import Random

from ..demo import clips, scenes
from .base import Sample
from .synthetic import SyntheticTask


class DemoVideo(SyntheticTask):
    """Questions about clips, scored like every SyntheticTask.

    All answers of a kind (clips.ANSWERS) are right equally often, so guessing scores `chance(kind)`.
    """

    name = "demo-video"
    about_videos = True
    kinds = clips.KINDS
    default_samples = 320

    def sample(self, number: int) -> Sample:
        return held_out(number)


def held_out(number: int) -> Sample:
    """The sample of that number; kinds take turns, and so do the answers of a kind."""
    kind = clips.KINDS[number % len(clips.KINDS)]
    answers = clips.ANSWERS[kind]
    wanted = answers[number // len(clips.KINDS) % len(answers)]
    drawn = (draw_question(f"held-out clip {number} {attempt}", kind) for attempt in count())
    clip, question = next((clip, question) for clip, question in drawn if question and question.answer == wanted)
    frames = tuple(clips.draw_clip(clip))
    return Sample(f"{kind}-{number}", question.text, (), question.answer, kind, video=frames)


def draw_question(seed: str, kind: str) -> tuple[clips.Clip, scenes.Question | None]:
    rng = Random(seed)
    clip = clips.any_clip(rng)
    return clip, clips.ask(clip, kind, rng)


def chance(kind: str) -> float:
    """The score of guessing, in percent."""
    return 100 / len(clips.ANSWERS[kind])
