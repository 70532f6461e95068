"""POPE: is an object in the picture? 9,000 yes/no questions in three categories of growing difficulty.

Paper: https://arxiv.org/abs/2305.10355 (random, popular and adversarial objects; half of the truths are yes).

Two scorings are in use. They differ on any answer that is not the bare word:
- LLaVA's eval_pope.py reads the first sentence: "no" if it has the word No, no or not, otherwise "yes". It therefore reads
  an empty answer as "yes".
- lmms-eval compares the whole answer, in lower case, with "yes" or "no". It counts "Yes." as wrong. It does not count an
  answer that is neither word as a miss, so its recall and F1 are then too high.

Papers report F1 or accuracy, and call both POPE. LLaVA-1.5's paper gives F1 per category (7B: 87.3 random, 86.1 popular,
84.2 adversarial). V2Drop's 85.9 for LLaVA-1.5-7B is the mean of these three: compare it with 100 * f1_mean_of_categories,
never with score.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .base import SHORT_ANSWER_PROMPT, Sample
from .parquet import ParquetTask, read_rows, unique_ids
from .rows import Row

REPO_ID = "lmms-lab-encoder/POPE"
CATEGORIES = ("random", "popular", "adversarial")


class Pope(ParquetTask):
    """POPE as lmms-eval asks it (9,000 questions pooled) and as LLaVA scores it."""

    name = "pope"
    score_name = "accuracy by the first sentence (LLaVA), %"
    max_new_tokens = 128
    repo_id = REPO_ID
    id_columns = ("category", "question_id")
    columns = (*id_columns, "question", "answer", "image_source", "image")
    kind_columns = ("answer", "category")
    key_metrics = (
        *("f1_random", "f1_popular", "f1_adversarial", "f1_mean_of_categories", "yes_ratio"),
        *("exact_f1", "exact_accuracy"),
    )
    reported: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "llava-1.5-7b": {"f1_random": 0.873, "f1_popular": 0.861, "f1_adversarial": 0.842, "f1_mean_of_categories": 0.859},
    }

    def sample_ids(self) -> list[str]:
        """CATEGORY-ID: `question_id` counts from the start in every category, and again for every source of pictures."""
        rows = list(read_rows(self.row_files, self.id_columns))
        return unique_ids([f"{category_of(row)}-{row.key('question_id')}" for row in rows], rows)

    def sample(self, row: Row) -> Sample:
        return Sample(
            sample_id=row.sample_id,
            text=row.text("question").strip() + SHORT_ANSWER_PROMPT,
            images=(row.picture("image"),),
            answer=row.yes_or_no("answer", REPO_ID),
            kind=row.text("category"),
            group=row.key("image_source"),
        )

    def correct(self, answer: str, sample: Sample) -> float:
        """Return 1.0 where LLaVA's reading of the answer is the ground truth, else 0.0."""
        return float(first_sentence_label(answer) == sample.answer)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Compute POPE under both scorings, all samples pooled.

        Keys: score is accuracy in percent; every other number is a share, 0 to 1.
        - accuracy, precision, recall, f1: by LLaVA's first sentence, "yes" being the positive class.
        - yes_ratio: the share of *answers* that are yes (lmms-eval prints the share of truths under this name).
        - f1_random, f1_popular, f1_adversarial: f1 within each category present; f1_mean_of_categories: their mean.
        - exact_accuracy, exact_f1: by lmms-eval's equality. Far below accuracy and f1, they tell of answers that are
          not the bare word.
        A ratio over nothing, such as the precision of a model that never says yes, is 0 as in lmms-eval.
        """
        if not records:
            raise ValueError("POPE has no record to score; evaluate at least one sample")
        labelled = labelled_answers(records)
        exact = rates_of([(record["text"].strip().lower(), record["answer"]) for record in records])
        rates = rates_of(labelled)
        return {
            "score": 100 * rates["accuracy"],
            **rates,
            "yes_ratio": sum(label == "yes" for label, _ in labelled) / len(labelled),
            **f1_by_category(records),
            "exact_accuracy": exact["accuracy"],
            "exact_f1": exact["f1"],
        }


def first_sentence_label(answer: str) -> str:
    """Read "yes" or "no" from an answer as LLaVA's eval_pope.py does, its case and its default of "yes" included."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def category_of(row: Row) -> str:
    category = row.text("category")
    if category not in CATEGORIES:
        raise ValueError(f"{row.place}: category {category!r} is none of POPE's; is this {REPO_ID}?")
    return category


def labelled_answers(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(first_sentence_label(record["text"]), record["answer"]) for record in records]


def rates_of(labelled: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Compute accuracy, precision, recall and f1 of (answer, truth) pairs; an answer may be neither yes nor no."""
    hits = labelled.count(("yes", "yes"))
    precision = ratio(hits, hits + labelled.count(("yes", "no")))
    recall = ratio(hits, hits + labelled.count(("no", "yes")))
    return {
        "accuracy": sum(label == truth for label, truth in labelled) / len(labelled),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
    }


def f1_by_category(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    scores = {}
    for category in CATEGORIES:
        members = [record for record in records if record["kind"] == category]
        if members:
            scores[f"f1_{category}"] = rates_of(labelled_answers(members))["f1"]
    return {**scores, "f1_mean_of_categories": ratio(sum(scores.values()), len(scores))}


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
