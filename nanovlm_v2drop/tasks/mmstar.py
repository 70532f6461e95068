"""MMStar: 1,500 multiple-choice questions that cannot be answered without the picture, of 18 kinds in 6 categories.

Paper: https://arxiv.org/abs/2403.20330. Data, prompt and scoring follow lmms-eval's mmstar task.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from .base import NO_LIMIT, Sample, accuracy_of
from .multiple_choice import begins_with_letter, letter_in
from .parquet import ParquetTask
from .rows import Row

PROMPT = "\nAnswer with the option's letter from the given choices directly"  # lmms-eval writes no full stop here


class MmStar(ParquetTask):
    """MMStar as lmms-eval asks and scores it; the options stand in the question."""

    name = "mmstar"
    max_new_tokens = NO_LIMIT
    score_name = "mean accuracy of 18 kinds, %"
    repo_id = "Lin-Chen/MMStar"
    split = "val"
    config = "mmstar.parquet"
    columns = ("image", "question", "answer", "l2_category")
    kind_columns = ("l2_category",)

    def sample(self, row: Row) -> Sample:
        return Sample(
            sample_id=row.sample_id,
            text=row.text("question").strip().replace(" Please answer yes or no.", "") + PROMPT,
            images=(row.picture("image"),),
            answer=row.one_of("answer", "ABCD"),
            kind=row.text("l2_category"),
        )

    def correct(self, answer: str, sample: Sample) -> float:
        return float(letter_in(answer) == sample.answer)

    def is_settled(self, text: str) -> bool:
        return begins_with_letter(text)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """`score`: the unweighted mean of the kinds' accuracies, in percent; `pooled`: the share of right answers."""
        pooled, *kinds = accuracy_of(records, self.name).items()
        return {"score": fmean(value for _, value in kinds), "pooled": pooled[1], **dict(kinds)}
