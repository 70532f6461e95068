"""MMBench-EN dev: 1,164 multiple-choice questions, each asked up to four times with its options rotated.

Paper: https://arxiv.org/abs/2307.06281. Data, prompt and scoring follow lmms-eval's mmbench_en_dev_static task, which reads
letters by rules alone. (Its mmbench_en_dev task asks a paid judge about answers that no rule reads.)

Circular: a question counts as right if the answers to all its rotations are right. Papers report this number.
Vanilla: the first rotation alone, with the same rules. lmms-eval has no task for it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from .base import NO_LIMIT, Sample, accuracy_of, spread
from .multiple_choice import LETTER_PROMPT, letter_in
from .parquet import ParquetTask, read_rows
from .rows import Row

OPTIONS = ("A", "B", "C", "D")
NAMED = ("A", "B", "C", "D", "E")  # E is none of the options, but an answer may name it
ROTATION = 1_000_000  # index = ROTATION * rotation + question
WRITTEN = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
QUANTIFIED = 3  # in an answer of more words, "A" may be the article


class MmBench(ParquetTask):
    """MMBench-EN dev as lmms-eval asks and scores it; `score` is circular."""

    name = "mmbench"
    max_new_tokens = NO_LIMIT
    smallest_limit = 4
    until = ("ASSISTANT:",)
    score_name = "circular accuracy by static rules, %"
    key_metrics = ("score", "vanilla")
    repo_id = "lmms-lab-encoder/MMBench"
    split = "dev"
    config = "en"
    columns = ("index", "image", "question", "hint", *OPTIONS, "answer", "category")

    @cached_property
    def indices(self) -> list[int]:
        """The index of each row. Raises ValueError for one that is given twice."""
        found: dict[int, Row] = {}
        for row in read_rows(self.row_files, ("index",)):
            if not (name := row.key("index")).isdecimal() or int(name) in found:
                raise ValueError(f"{row.place}: the index {name} is no number of its own; is this {self.repo_id}?")
            found[int(name)] = row
        return list(found)

    def sample_ids(self) -> list[str]:
        return [str(index) for index in self.indices]

    def num_samples(self, limit: int | None = None) -> int:
        """Reads two columns where there is a limit."""
        rows = self.positions(limit)
        return super().num_samples() if rows is None else len(rows)

    def positions(self, limit: int | None) -> list[int] | None:
        """The rows of as many whole questions as fit, the same number of every category."""
        if limit is None:
            return None
        questions: dict[int, list[int]] = defaultdict(list)
        categories: dict[int, tuple[str, ...]] = {}
        for position, row in enumerate(read_rows(self.row_files, ("index", "category"))):
            question = int(row.key("index")) % ROTATION
            questions[question].append(position)
            categories[question] = (row.text("category"),)
        rotations, strata = list(questions.values()), [categories[question] for question in questions]
        for number in range(min(limit, len(rotations)), 0, -1):
            rows = [position for chosen in spread(strata, number) for position in rotations[chosen]]
            if len(rows) <= limit:
                return rows
        raise ValueError(f"a limit of {limit} is less than one MMBench question, which has up to 4 rotations; give 4 or more")

    def sample(self, row: Row) -> Sample:
        options = {letter: text for letter in OPTIONS if (text := row.text_or_none(letter)) is not None}
        return Sample(
            sample_id=row.sample_id,
            text=prompt_of(row.text("question"), row.text_or_none("hint"), options),
            images=(row.picture("image"),),
            answer=row.one_of("answer", "ABCD"),
            kind=row.text("category"),
            group=str(int(row.sample_id) % ROTATION),
            references=tuple(f"{letter}. {text}" for letter, text in options.items()),
        )

    def correct(self, answer: str, sample: Sample) -> float:
        options = {line[0]: line.removeprefix(f"{line[0]}. ") for line in sample.references}
        return float(letter_by_rules(answer, options) == sample.answer)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """`score`: circular accuracy; `vanilla`: accuracy of the first rotations; and circular accuracy by category. Percent.

        A question whose first rotation is missing is left out, as in lmms-eval.
        """
        rotations: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            rotations[record["group"]].append(record)
        asked = [(first_of(own), min(one["correct"] for one in own)) for own in rotations.values()]
        questions = [(first, hit) for first, hit in asked if first is not None]
        circular = accuracy_of([{**first, "correct": hit} for first, hit in questions], self.name)
        vanilla = accuracy_of([first for first, _ in questions], self.name)["score"]
        return {"score": circular.pop("score"), "vanilla": vanilla, **circular}


def prompt_of(question: str, hint: str | None, options: Mapping[str, str]) -> str:
    """Hint, question and options. lmms-eval leaves an empty line before the instruction."""
    lines = [f"{letter}. {text}" for letter, text in options.items() if text not in ("", "nan")]
    listed = "\n".join(["There are several options:", *lines]).rstrip("\n")
    asked = f"{question} {listed}" if hint is None or hint == "nan" else f"{hint} {question} {listed}"
    return f"{asked}\n{LETTER_PROMPT}"


def letter_by_rules(answer: str, options: Mapping[str, str]) -> str:
    """The letter of an answer: by its words, else by the only option whose text it contains, else by `letter_in`."""
    return letter_by_words(answer) or letter_by_text(answer, options) or letter_in(answer, "".join(options))


def letter_by_words(answer: str) -> str:
    """The only letter that is a word of the answer, or else the only one that is a word with the same signs around it."""
    words = answer.split()
    alone = only(letter for letter in NAMED if letter in words)
    if alone and not (alone == "A" and len(words) > QUANTIFIED):
        return alone
    return next((found for form in WRITTEN if (found := only(each for each in NAMED if form.format(each) in words))), "")


def letter_by_text(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the only option whose text stands in the answer. As in lmms-eval, "nan" is the text of a missing option."""
    return only(letter for letter, text in options.items() if text.lower() in answer.lower())


def only(letters: Iterable[str]) -> str:
    """The letter if there is exactly one, else ""."""
    found = list(letters)
    return found[0] if len(found) == 1 else ""


def first_of(rotations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return next((record for record in rotations if int(record["sample_id"]) < ROTATION), None)
