"""The demo's held-out questions: new scenes, one question each, in equal parts of every kind.

Training draws its scenes from integer seeds, these come from named ones, so no scene is shared.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, islice
from random import Random
from statistics import mean
from typing import Any

from ..demo import scenes
from .base import Sample, Task


class Demo(Task):
    """`score` is accuracy in percent by exact answer; beside it stands the accuracy of each kind of question."""

    name = "demo"
    max_new_tokens = 8
    default_samples = 360

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
            **{kind: 100 * mean(by_kind[kind]) for kind in scenes.KINDS if kind in by_kind},
        }


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
