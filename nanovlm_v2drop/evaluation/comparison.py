"""Finished runs side by side: scores on the questions that all of them answered, and differences paired by question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    runs = matched(runs)
    keys = list(dict.fromkeys(key for run in runs for key in run.rows))
    tasks = {name: load_task(name) for name, _, _ in keys}
    compared = [compare_row(tasks[key[0]], key, [run.answers(key) for run in runs]) for key in keys]
    if all(own is None for comparison in compared for own in comparison.differences):
        raise ValueError("the runs share no method and budget, so there is nothing to compare")
    return compared


def matched(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs with one key for rows that asked for one share, also where prompts of other sizes give it another mean."""
    keys: dict[tuple[str, str, float], Key] = {}

    def first_key(key: Key, row: Mapping[str, Any]) -> Key:
        share = row.get("asked_share")
        return key if share is None else keys.setdefault((*key[:2], share), key)

    return [replace(run, rows={first_key(key, row): row for key, row in run.rows.items()}) for run in runs]


def compare_row(task: Task, key: Key, answers: Sequence[Answers]) -> Comparison:
    shared = shared_samples(task, answers)
    kept = [[[one for one in seed if one["sample_id"] in shared] for seed in own] for own in answers]
    check_same_questions(key, kept)
    scores = [resample(task, own) if own and own[0] else None for own in kept]
    base = scores[0]
    differences = [None if base is None or own is None else difference(own, base) for own in scores[1:]]
    questions = max((len(own.sample_ids) for own in scores if own is not None), default=0)
    return Comparison(key, questions, scores, differences)


def group_of(answer: Mapping[str, Any]) -> str:
    return str(answer["group"] or answer["sample_id"])


def shared_samples(task: Task, answers: Sequence[Answers]) -> set[str]:
    """The samples that every seed of every run answered; samples that the task scores as one are there all or not at all."""
    by_seed = [{one["sample_id"]: group_of(one) for one in seed} for own in answers for seed in own]
    shared = set.intersection(*map(set, by_seed)) if by_seed else set()
    if task.smallest_limit == 1:
        return shared
    torn = {group for groups in by_seed for sample_id, group in groups.items() if sample_id not in shared}
    return {sample_id for sample_id in shared if by_seed[0][sample_id] not in torn}


def check_same_questions(key: Key, answers: Sequence[Answers]) -> None:
    asked: dict[str, str] = {}
    for one in (one for own in answers for seed in own for one in seed):
        if asked.setdefault(one["sample_id"], one["question"]) != one["question"]:
            raise ValueError(f"the runs asked different questions as {one['sample_id']} of {key[0]}; they cannot be compared")
