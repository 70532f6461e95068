"""The video demo's held-out questions: new clips, one question each, in equal parts of every kind.

Training draws its clips from integer seeds, these come from named ones, so no clip is shared.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice
from random import Random
from statistics import mean
from typing import Any

from ..demo import clips, scenes
from .base import Sample, Task


class DemoVideo(Task):
    """`score` is accuracy in percent by exact answer; beside it stands the accuracy of each kind of question.

    A kind's answers are equally often right (clips.ANSWERS), so guessing scores `chance(kind)`.
    """

    name = "demo-video"
    max_new_tokens = 8
    default_samples = 320

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        return islice(map(held_out, count()), limit)

    def correct(self, answer: str, sample: Sample) -> float:
        return float(answer.strip().lower() == sample.answer)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        by_kind = defaultdict(list)
        for record in records:
            by_kind[record["kind"]].append(record["correct"])
        if not by_kind:
            raise ValueError("no records to score; was --limit 0?")
        return {
            "score": 100 * mean(record["correct"] for record in records),
            **{kind: 100 * mean(by_kind[kind]) for kind in clips.KINDS if kind in by_kind},
        }


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
    """Percent that guessing scores."""
    return 100 / len(clips.ANSWERS[kind])
