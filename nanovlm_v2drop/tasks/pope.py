"""POPE: is an object in the picture? 9,000 yes/no questions in three categories of growing difficulty.

Paper: https://arxiv.org/abs/2305.10355 (random, popular and adversarial objects; half of the truths are yes).

Two scorings are in use, and they differ on any answer that is not the bare word:
- LLaVA's eval_pope.py reads the first sentence: "no" if it has the word No, no or not, otherwise "yes". An empty or a
  wild answer is therefore a "yes".
- lmms-eval compares the whole answer, in lower case, with "yes" or "no". "Yes." is wrong there, and an answer that is
  neither word also escapes the count of misses, so that recall and F1 come out too high.

Papers mix F1 and accuracy under the one name POPE. LLaVA-1.5's paper gives F1 per category (7B: 87.3 random, 86.1
popular, 84.2 adversarial); V2Drop's 85.9 for LLaVA-1.5-7B is the mean of these three: compare it with
100 * f1_mean_of_categories, never with score.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .base import SHORT_ANSWER_PROMPT, Sample, Task, dataset_files, decode_picture, read_parquet_rows, spread, yes_or_no

REPO_ID = "lmms-lab-encoder/POPE"
CATEGORIES = ("random", "popular", "adversarial")


class Pope(Task):
    """POPE as lmms-eval asks it (9,000 questions pooled) and as LLaVA scores it."""

    name = "pope"
    max_new_tokens = 128

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Give the questions in the order of the data; a limit is spread over the categories and over yes and no."""
        files = dataset_files(REPO_ID, "test", self.data_dir)
        positions = None
        if limit is not None:
            rows = read_parquet_rows(files, ["answer", "category"])
            positions = spread([(row["answer"], row["category"]) for row in rows], limit)
        columns = ["question_id", "question", "answer", "category", "image_source", "image"]
        return map(_sample, read_parquet_rows(files, columns, positions))

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
        labelled = _labelled(records)
        exact = _rates([(record["text"].strip().lower(), record["answer"]) for record in records])
        rates = _rates(labelled)
        return {
            "score": 100 * rates["accuracy"],
            **rates,
            "yes_ratio": sum(label == "yes" for label, _ in labelled) / len(labelled),
            **_f1_by_category(records),
            "exact_accuracy": exact["accuracy"],
            "exact_f1": exact["f1"],
        }


def first_sentence_label(answer: str) -> str:
    """Read "yes" or "no" from an answer as LLaVA's eval_pope.py does, its case and its default of "yes" included."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _sample(row: dict[str, Any]) -> Sample:
    # question_id counts from the start in every category
    sample_id = f"{row['category']}-{row['question_id']}"
    if row["category"] not in CATEGORIES:
        raise ValueError(f"sample {sample_id}: category {row['category']!r} is none of POPE's; is this {REPO_ID}?")
    return Sample(
        sample_id=sample_id,
        text=row["question"].strip() + SHORT_ANSWER_PROMPT,
        images=(decode_picture(row["image"], sample_id),),
        answer=yes_or_no(row["answer"], sample_id, REPO_ID),
        kind=row["category"],
        group=str(row["image_source"]),
    )


def _labelled(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(first_sentence_label(record["text"]), record["answer"]) for record in records]


def _rates(labelled: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Compute accuracy, precision, recall and f1 of (answer, truth) pairs; an answer may be neither yes nor no."""
    hits = labelled.count(("yes", "yes"))
    precision = _ratio(hits, hits + labelled.count(("yes", "no")))
    recall = _ratio(hits, hits + labelled.count(("no", "yes")))
    return {
        "accuracy": sum(label == truth for label, truth in labelled) / len(labelled),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
    }


def _f1_by_category(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    scores = {}
    for category in CATEGORIES:
        members = [record for record in records if record["kind"] == category]
        if members:
            scores[f"f1_{category}"] = _rates(_labelled(members))["f1"]
    return {**scores, "f1_mean_of_categories": _ratio(sum(scores.values()), len(scores))}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
