"""Finished runs side by side: scores on the questions that all of them answered, and differences paired by question."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tasks import Task, load_task
from .bootstrap import Resampled, difference, resample
from .records import Record, read_records

Key = tuple[str, str, float | None]  # task, label of the row, mean tokens that were asked for
Answers = list[list[dict[str, Any]]]  # the answers of every seed


@dataclass(frozen=True)
class FinishedRun:
    """The rows of a run's summary.json, and its answers by (task, plan)."""

    folder: Path
    rows: Mapping[Key, Mapping[str, Any]]
    records: Mapping[tuple[str, str], Sequence[Record]]

    def answers(self, key: Key) -> Answers:
        """The answers behind a row, one list a seed; empty where the run has no such row."""
        if key not in self.rows:
            return []
        plans = [(key[0], plan) for plan in self.rows[key]["plans"]]
        return [[vars(record) for record in self.records[plan]] for plan in plans if plan in self.records]


@dataclass(frozen=True)
class Comparison:
    """One method and budget: for each run its score on the questions that all of them answered, None without such a row.

    `differences`: for each run after the first its score minus the first run's, with a 95 % interval.
    """

    key: Key
    questions: int
    scores: Sequence[Resampled | None]
    differences: Sequence[tuple[float, list[float]] | None]


def read_run(folder: Path) -> FinishedRun:
    """Raises ValueError for a folder without a finished run."""
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished run: there is no summary.json; finish it with --resume")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["results"]
        found = {(row["task"], row["label"], row["asked_tokens"]): {**row, "plans": list(row["plans"])} for row in rows}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); write it again with --resume") from error
    records: dict[tuple[str, str], list[Record]] = {}
    for record in read_records(folder):
        records.setdefault((record.task, record.plan), []).append(record)
    return FinishedRun(folder, found, records)


def compare(runs: Sequence[FinishedRun]) -> list[Comparison]:
    """All rows of all runs; raises ValueError where runs share no row, or asked other questions under the same ids."""
    keys = list(dict.fromkeys(key for run in runs for key in run.rows))
    tasks = {name: load_task(name) for name, _, _ in keys}
    compared = [compare_row(tasks[key[0]], key, [run.answers(key) for run in runs]) for key in keys]
    if all(own is None for comparison in compared for own in comparison.differences):
        raise ValueError("the runs share no method and budget, so there is nothing to compare")
    return compared


def compare_row(task: Task, key: Key, answers: Sequence[Answers]) -> Comparison:
    shared = shared_groups([answers_of_run for answers_of_run in answers if answers_of_run])
    kept = [[[one for one in seed if group_of(one) in shared] for seed in own] for own in answers]
    check_same_questions(key, kept)
    scores = [resample(task, own) if own and own[0] else None for own in kept]
    base = scores[0]
    differences = [None if base is None or own is None else difference(own, base) for own in scores[1:]]
    questions = max((len(own.sample_ids) for own in scores if own is not None), default=0)
    return Comparison(key, questions, scores, differences)


def group_of(answer: Mapping[str, Any]) -> str:
    return str(answer["group"] or answer["sample_id"])


def shared_groups(answers: Sequence[Answers]) -> set[str]:
    """The pictures (samples where there are none) of which every seed of every run answered the same number of questions."""
    counts = [Counter(group_of(one) for one in seed) for own in answers for seed in own]
    return {group for group, count in counts[0].items() if all(other[group] == count for other in counts)} if counts else set()


def check_same_questions(key: Key, answers: Sequence[Answers]) -> None:
    asked: dict[str, str] = {}
    for one in (one for own in answers for seed in own for one in seed):
        if asked.setdefault(one["sample_id"], one["question"]) != one["question"]:
            raise ValueError(f"the runs asked different questions as {one['sample_id']} of {key[0]}; they cannot be compared")
