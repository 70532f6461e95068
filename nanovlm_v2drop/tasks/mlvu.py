"""MLVU dev: 2,174 multiple-choice questions of seven kinds about videos of 3 minutes to 2 hours.

Paper: https://arxiv.org/abs/2406.04264. Data, prompt and scoring follow lmms-eval's mlvu_dev task.
"""

from collections.abc import Collection, Sequence
from statistics import fmean
from typing import Any

from .base import Sample, accuracy_of
from .multiple_choice import begins_with_letter, letter_in
from .rows import Row
from .video_files import VideoTask

PROMPT = "\nOnly give the best option.\nBest option: ("
KINDS = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")


class Mlvu(VideoTask):
    """MLVU dev as lmms-eval asks and scores it; the options stand in the question."""

    name = "mlvu"
    max_new_tokens = 16
    score_name = "mean accuracy of 7 kinds, %"
    repo_id = "sy1998/MLVU_dev"
    columns = ("video_name", "question", "answer", "task_type")
    kind_columns = ("task_type",)

    def sample(self, row: Row) -> Sample:
        kind, video = row.text("task_type"), row.text("video_name")
        if kind not in KINDS:
            raise ValueError(f"{row.place}: the task_type {kind!r} is none of MLVU's; is this {self.repo_id}?")
        return Sample(
            sample_id=row.sample_id,
            text=row.text("question") + PROMPT,
            images=(),
            answer=row.one_of("answer", "ABCD"),
            kind=kind,
            group=video,
            video=self.video([video], row),
        )

    def correct(self, answer: str, sample: Sample) -> float:
        return float(letter_in(answer) == sample.answer)

    def is_settled(self, text: str) -> bool:
        return begins_with_letter(text)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """`score`: the unweighted mean of the seven kinds, in percent; as in lmms-eval, a kind without a question is 0."""
        found = accuracy_of(records, self.name)
        return {**found, "score": fmean(found.get(kind, 0) for kind in KINDS), "pooled": found["score"]}

    def summary_of_draw(self, records: Sequence[dict[str, Any]], kinds: Collection[str]) -> dict[str, float]:
        """The mean holds that of the other kinds in place of one that the resampling lacks."""
        found = self.summary(records)
        return {**found, "score": found["score"] * len(kinds) / sum(kind in found for kind in kinds)}
