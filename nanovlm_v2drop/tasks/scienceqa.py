"""ScienceQA-IMG: the 2,017 school questions of ScienceQA's test split that come with a picture.

Paper: https://arxiv.org/abs/2209.09513. Data, prompt and scoring follow lmms-eval's scienceqa_img task, which reads answers
as LLaVA does.
"""

from .base import Sample
from .multiple_choice import LETTER_PROMPT, option_lines
from .parquet import ParquetTask
from .rows import Row


class ScienceQa(ParquetTask):
    """ScienceQA-IMG: right is the bare letter in any case, or an answer that begins with the letter in capitals and a stop."""

    name = "scienceqa"
    max_new_tokens = 16
    repo_id = "lmms-lab-encoder/ScienceQA"
    config = "ScienceQA-IMG"
    columns = ("image", "question", "choices", "answer", "hint")

    def sample(self, row: Row) -> Sample:
        choices, hint = row.options("choices"), row.text_or_none("hint")
        context = f"Context: {hint}\n" if hint else ""
        return Sample(
            sample_id=row.sample_id,
            text=f"{context}{row.text('question')}\n{option_lines(choices)}{LETTER_PROMPT}",
            images=(row.picture("image"),),
            answer=row.letter("answer", len(choices)),
            kind="",
        )

    def correct(self, answer: str, sample: Sample) -> float:
        if answer.lower() == sample.answer.lower():
            return 1.0
        return float(answer[:1].isupper() and answer[1:2] == "." and answer[0].lower() == sample.answer.lower())

    def is_settled(self, text: str) -> bool:
        return len(text.strip()) > 1
