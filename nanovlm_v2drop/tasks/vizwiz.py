"""VizWiz-VQA: 4,319 questions (validation split) that blind people asked about their own photographs.

Paper: https://arxiv.org/abs/1802.08218. Data, prompt and scoring follow lmms-eval's vizwiz_vqa_val task.
"""

from .base import SHORT_ANSWER_PROMPT
from .rows import Row
from .textvqa import TextVqa

UNANSWERABLE_PROMPT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(TextVqa):
    """VizWiz-VQA, scored as TextVQA."""

    name = "vizwiz"
    score_name = "VQA accuracy, %"
    repo_id = "lmms-lab-encoder/VizWiz-VQA"
    split = "val"

    def prompt(self, row: Row) -> str:
        return row.text("question").capitalize() + UNANSWERABLE_PROMPT + SHORT_ANSWER_PROMPT
