"""TextVQA: 5,000 questions about text in pictures, each answered by ten people.

Paper: https://arxiv.org/abs/1904.08920. Data, prompts and scoring follow lmms-eval's textvqa_val task. It asks without OCR
tokens (`textvqa`). LLaVA-1.5's own evaluation gives the model the tokens that an OCR system has read in the picture
(`textvqa-ocr`; lmms-eval's option `ocr: true`).
"""

from collections.abc import Sequence
from typing import ClassVar

from .base import NO_LIMIT, SHORT_ANSWER_PROMPT, Sample
from .parquet import ParquetTask
from .rows import Row
from .vqa import vqa_accuracy


class TextVqa(ParquetTask):
    """TextVQA without OCR tokens; lmms-eval writes all letters but the first of a question small."""

    name = "textvqa"
    max_new_tokens = NO_LIMIT
    until = ("ASSISTANT:",)
    score_name = "VQA accuracy without OCR tokens, %"
    repo_id = "lmms-lab-encoder/textvqa"
    split = "validation"
    columns: ClassVar[tuple[str, ...]] = ("image", "question", "answers")

    def prompt(self, row: Row) -> str:
        return row.text("question").capitalize() + SHORT_ANSWER_PROMPT

    def sample(self, row: Row) -> Sample:
        truths = row.texts("answers")
        return Sample(row.sample_id, self.prompt(row), (row.picture("image"),), most_given(truths), "", references=truths)

    def correct(self, answer: str, sample: Sample) -> float:
        return vqa_accuracy(answer, sample.references)


class TextVqaOcr(TextVqa):
    """TextVQA with the OCR tokens of the data between question and instruction."""

    name = "textvqa-ocr"
    score_name = "VQA accuracy with OCR tokens, %"
    columns = (*TextVqa.columns, "ocr_tokens")

    def prompt(self, row: Row) -> str:
        question, tokens = row.text("question").capitalize(), ", ".join(row.texts("ocr_tokens"))
        return f"{question}\nReference OCR token: {tokens}{SHORT_ANSWER_PROMPT}"


def most_given(truths: Sequence[str]) -> str:
    """The answer that most people gave, for a reader of samples.jsonl; "" without any."""
    return max(truths, key=truths.count, default="")
