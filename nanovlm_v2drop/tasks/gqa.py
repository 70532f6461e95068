"""GQA: questions about objects, attributes and relations in 398 pictures, answered in a word.

Paper: https://arxiv.org/abs/1902.09506. Data, prompt and scoring follow lmms-eval's gqa task (test-dev balanced, 12,578
questions). Questions and pictures are two sets of data; `imageId` joins them.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .base import SHORT_ANSWER_PROMPT, Sample
from .parquet import ParquetTask, dataset_files, read_rows
from .rows import Row, decode_picture
from .vqa import exact_match

PICTURES = "testdev_balanced_images"


class Gqa(ParquetTask):
    """GQA as lmms-eval asks and scores it: exact match without case and punctuation."""

    name = "gqa"
    max_new_tokens = 16
    score_name = "exact match, %"
    repo_id = "lmms-lab-encoder/GQA"
    split = "testdev"
    config = "testdev_balanced_instructions"
    columns = ("question", "answer", "imageId")

    @cached_property
    def picture_files(self) -> Sequence[Path]:
        return dataset_files(self.repo_id, self.split, self.data_dir, PICTURES)

    @property
    def files(self) -> Sequence[Path]:
        return [*self.row_files, *self.picture_files]

    @cached_property
    def pictures(self) -> dict[str, tuple[Any, str]]:
        """The encoded pictures, with the place of each, by their ids."""
        rows = read_rows(self.picture_files, ("id", "image"))
        return {row.key("id"): (row.values["image"], f"{row.place}, column image") for row in rows}

    def sample(self, row: Row) -> Sample:
        name = row.key("imageId")
        if name not in self.pictures:
            raise ValueError(f"{row.place}: {self.picture_files[0].parent} holds no picture {name}; fetch the data again")
        return Sample(
            sample_id=row.sample_id,
            text=row.text("question") + SHORT_ANSWER_PROMPT,
            images=(decode_picture(*self.pictures[name]),),
            answer=row.text("answer"),
            kind="",
            group=name,
        )

    def correct(self, answer: str, sample: Sample) -> float:
        return float(exact_match(answer, sample.answer))
