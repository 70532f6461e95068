"""SEED-Image: the 14,233 multiple-choice questions of SEED-Bench about one picture.

Paper: https://arxiv.org/abs/2307.16125. Data, prompt and scoring follow lmms-eval's seedbench task (its metric seed_image).
"""

from collections.abc import Collection
from functools import cached_property

from .base import NO_LIMIT, Sample, spread
from .multiple_choice import LETTER_PROMPT, option_lines
from .parquet import ParquetTask, read_rows
from .rows import Row

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class SeedImage(ParquetTask):
    """SEED-Image: an answer's first character, in any case, is its letter, so "Because" is B."""

    name = "seed-image"
    max_new_tokens = NO_LIMIT
    until = ("ASSISTANT:",)
    repo_id = "lmms-lab-encoder/SEED-Bench"
    columns = ("image", "question", *CHOICES, "answer")

    @cached_property
    def image_rows(self) -> list[int]:
        """The rows about pictures; the data also hold questions about videos."""
        rows = read_rows(self.row_files, ("data_type",))
        return [number for number, row in enumerate(rows) if row.text("data_type") == "image"]

    def num_samples(self, limit: int | None = None) -> int:
        """Reads one column. Raises ValueError for files without a question about a picture."""
        super().num_samples()
        if not self.image_rows:
            raise ValueError(f"{self.files[0]} holds no row whose data_type is image; is this {self.repo_id}?")
        return len(self.image_rows) if limit is None else min(limit, len(self.image_rows))

    def positions(self, limit: int | None) -> Collection[int]:
        if limit is None:
            return self.image_rows
        return [self.image_rows[index] for index in spread([()] * len(self.image_rows), limit)]

    def sample(self, row: Row) -> Sample:
        choices = [row.key(choice) for choice in CHOICES]
        return Sample(
            sample_id=row.sample_id,
            text=f"{row.text('question')}\n{option_lines(choices)}{LETTER_PROMPT}",
            images=row.pictures("image"),
            answer=row.one_of("answer", "ABCD"),
            kind="",
        )

    def correct(self, answer: str, sample: Sample) -> float:
        return float(answer.strip()[:1].lower() == sample.answer.lower())

    def is_settled(self, text: str) -> bool:
        return bool(text.strip())
