"""AI2D: 3,088 multiple-choice questions (test split) about diagrams from school books.

Paper: https://arxiv.org/abs/1603.07396. Data, prompt and scoring follow lmms-eval's ai2d task.
"""

import re

from .base import Sample
from .multiple_choice import LETTER_PROMPT, option_lines
from .parquet import ParquetTask
from .rows import Row
from .vqa import exact_match, plain


class Ai2d(ParquetTask):
    """AI2D: right is the bare letter, apart from case and punctuation, or an answer that begins as "A."."""

    name = "ai2d"
    max_new_tokens = 16
    repo_id = "lmms-lab-encoder/ai2d"
    columns = ("image", "question", "options", "answer")

    def sample(self, row: Row) -> Sample:
        options = row.options("options")
        return Sample(
            sample_id=row.sample_id,
            text=f"{row.text('question')}\n{option_lines(options)}{LETTER_PROMPT}",
            images=(row.picture("image"),),
            answer=row.letter("answer", len(options)),
            kind="",
        )

    def correct(self, answer: str, sample: Sample) -> float:
        begins = re.match(r"\s*([A-Z])\.", answer)
        return float(exact_match(begins[1] if begins else answer, sample.answer))

    def is_settled(self, text: str) -> bool:
        bare = text.strip()
        return re.match(r"[A-Z]\.", bare) is not None or len(plain(bare)) > 1
