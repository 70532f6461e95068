"""MME: 14 abilities, and for every picture two questions, one whose truth is yes and one whose truth is no.

Paper: https://arxiv.org/abs/2306.13394. Prompt, parsing and scores follow lmms-eval's mme task.

A category scores 100 * (share of questions right) + 100 * (share of pictures with both questions right): 0 to 200.
LLaVA's paper reports the ten perception categories alone as MME (1510.7 for LLaVA-1.5-7B). V2Drop's paper adds the four of
cognition (1862), as most work on token dropping does.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import nan
from typing import Any, ClassVar

from .base import SHORT_ANSWER_PROMPT, Sample, spread
from .parquet import ParquetTask, read_rows
from .rows import Row

REPO_ID = "lmms-lab-encoder/MME"
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
READ = 4  # characters of an answer
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Mme(ParquetTask):
    """MME as lmms-eval asks and scores it: 2,374 questions about 1,187 pictures."""

    name = "mme"
    score_name = "points, perception + cognition"
    max_new_tokens = 16
    smallest_limit = 2
    repo_id = REPO_ID
    id_columns = ("category", "question_id")
    columns = (*id_columns, "question", "answer", "image")
    key_metrics = ("score", "perception", "cognition", "accuracy", "accuracy_plus")
    reported: ClassVar[Mapping[str, Mapping[str, float]]] = {"llava-1.5-7b": {"perception": 1510.7, "score": 1862.0}}

    def sample_ids(self) -> list[str]:
        """PICTURE#1 and PICTURE#2, in the order of the data; with the category where two of them name a picture alike."""
        keys = [(row.text("category"), row.key("question_id")) for row in read_rows(self.row_files, self.id_columns)]
        categories = Counter(picture for _, picture in set(keys))
        asked: Counter[tuple[str, str]] = Counter()
        ids = []
        for category, picture in keys:
            asked[category, picture] += 1
            name = picture if categories[picture] == 1 else f"{category}/{picture}"
            ids.append(f"{name}#{asked[category, picture]}")
        return ids

    def num_samples(self, limit: int | None = None) -> int:
        return super().num_samples(None if limit is None else limit // 2 * 2)

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        """Give the questions in the order of the data; see `positions`."""
        if limit is not None and limit < self.smallest_limit:
            raise ValueError(f"a limit of {limit} is less than one MME picture, which has 2 questions; give 2 or more")
        self.num_rows()
        self.pictures()  # a picture without its pair is an error before anything is evaluated
        return super().samples(limit)

    def positions(self, limit: int | None) -> list[int] | None:
        """The rows of limit // 2 whole pictures, as many of every category.

        With fewer than 14 pictures some category is missing, which max_score of the summary tells.
        """
        if limit is None:
            return None
        pictures = self.pictures()
        pairs, chosen = list(pictures.values()), spread([(category,) for category, _ in pictures], limit // 2)
        return [position for index in chosen for position in pairs[index]]

    def pictures(self) -> dict[tuple[str, str], list[int]]:
        """The two rows of each picture; see `pair_by_picture`."""
        rows = read_rows(self.row_files, self.id_columns)
        return pair_by_picture((row.text("category"), row.key("question_id")) for row in rows)

    def sample(self, row: Row) -> Sample:
        question = row.text("question").strip().replace(" Please answer yes or no.", "")
        return Sample(
            sample_id=row.sample_id,
            text=question + SHORT_ANSWER_PROMPT,
            images=(row.picture("image"),),
            answer=row.yes_or_no("answer", REPO_ID),
            kind=row.text("category"),
            group=row.sample_id.rpartition("#")[0],
        )

    def correct(self, answer: str, sample: Sample) -> float:
        """Return 1.0 where the answer reads as the ground truth, else 0.0."""
        return float(parse_answer(answer) == sample.answer)

    def is_settled(self, text: str) -> bool:
        read = cleaned(text)
        return len(read) >= READ or (len(read) > 1 and parse_answer(text) != "other")

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Compute MME's scores; records must hold both questions of every picture.

        Keys, c being a category that is present:
        - score: the total, perception + cognition, 0 to 2800 on the full benchmark; max_score is its limit for the
          categories present, so 2800 says that none is missing.
        - perception (ten categories, 0 to 2000), cognition (four, 0 to 800), and c itself, 0 to 200.
        - accuracy, c_accuracy: share of questions right; accuracy_plus, c_accuracy_plus: share of pictures with both
          right; 0 to 1.
        """
        if not records:
            raise ValueError("MME has no record to score; evaluate at least one picture, which is 2 samples")
        pairs_right = pairs_right_of(records)
        accuracies = {category: sum(pairs) / (2 * len(pairs)) for category, pairs in pairs_right.items()}
        accuracies_plus = {category: pairs.count(2) / len(pairs) for category, pairs in pairs_right.items()}
        scores = {category: 100 * (accuracies[category] + accuracies_plus[category]) for category in pairs_right}
        all_pairs = [right for pairs in pairs_right.values() for right in pairs]
        return {
            "score": sum(scores.values()),
            "max_score": 200.0 * len(scores),
            "perception": float(sum(scores.get(category, 0.0) for category in PERCEPTION)),
            "cognition": float(sum(scores.get(category, 0.0) for category in COGNITION)),
            "accuracy": sum(all_pairs) / (2 * len(all_pairs)),
            "accuracy_plus": all_pairs.count(2) / len(all_pairs),
            **scores,
            **{f"{category}_accuracy": value for category, value in accuracies.items()},
            **{f"{category}_accuracy_plus": value for category, value in accuracies_plus.items()},
        }

    def summary_of_draw(self, records: Sequence[dict[str, Any]], kinds: Collection[str]) -> dict[str, float]:
        """The sums over categories hold the mean of the other categories in place of one that the resampling lacks."""
        found = self.summary(records)
        sums = {"score": PERCEPTION + COGNITION, "perception": PERCEPTION, "cognition": COGNITION}
        for name, categories in sums.items():
            asked, drawn = (sum(category in there for category in categories) for there in (kinds, found))
            found[name] *= asked / drawn if drawn else nan
        return found


def parse_answer(answer: str) -> str:
    """Read "yes", "no" or "other" from an answer: the word itself, y or n, or the word within the first 4 characters.

    As in lmms-eval, "Not sure" is "no" by this rule, and "I know" (no "no" within "i kn") is "other".
    """
    text = cleaned(answer)
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    if "yes" in text[:READ]:
        return "yes"
    return "no" if "no" in text[:READ] else "other"


def cleaned(answer: str) -> str:
    return answer.lower().strip().replace(".", "")


def pair_by_picture(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
    """Join the positions of the two questions of each picture; a key is (category, picture)."""
    pictures: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        pictures[key].append(position)
    for (category, picture), positions in pictures.items():
        if category not in PERCEPTION + COGNITION:
            raise ValueError(f"picture {picture}: MME has no category {category!r}; is this {REPO_ID}?")
        if len(positions) != 2:
            raise ValueError(
                f"MME picture {picture} has {len(positions)} question(s), not 2, and is scored as a pair; "
                "take samples by samples(limit), which keeps pairs whole, and evaluate each once"
            )
    return pictures


def pairs_right_of(records: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Count, for each picture of each category, how many of its two answers are right."""
    right: dict[str, list[int]] = defaultdict(list)
    pictures = pair_by_picture((record["kind"], record["group"]) for record in records)
    for (category, _), positions in pictures.items():
        right[category].append(sum(parse_answer(records[i]["text"]) == records[i]["answer"] for i in positions))
    return right
