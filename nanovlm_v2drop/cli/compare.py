"""`nanovlm-v2drop compare RUN RUN2`: scores of finished runs side by side, with differences that are paired by question."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..evaluation.bootstrap import Resampled, difference, interval, resample
from ..evaluation.records import Record, read_records
from ..report.tables import console_for, plus_minus, printable
from ..tasks import Task, load_task

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


def print_comparison(folders: Sequence[Path], form: str) -> int:
    """Print finished runs beside the first of them, in one of WRITERS; returns the exit status."""
    try:
        print(WRITERS[form](folders, compare([read_run(folder) for folder in folders])))
    except (ValueError, OSError) as error:
        print(f"nanovlm-v2drop: {error}", file=sys.stderr)
        return 2
    return 0


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


def columns_of(runs: Sequence[Path]) -> list[str]:
    """task, method, asked, questions, score of run 1, and for each other run its score and the difference to run 1."""
    names = ["task", "method", "asked", "questions", "run 1"]
    for number in range(2, len(runs) + 1):
        names += [f"run {number}", f"{number} - 1"]
    return names


def cells_of(comparison: Comparison) -> list[str]:
    task, label, asked = comparison.key
    first, *others = comparison.scores
    cells = [task, label, "-" if asked is None else f"{asked:g}", f"{comparison.questions}", score_cell(first)]
    for own, gain in zip(others, comparison.differences, strict=True):
        cells += [score_cell(own), difference_cell(gain)]
    return cells


def score_cell(own: Resampled | None) -> str:
    return "-" if own is None else plus_minus(own.score, interval(own.draws))


def difference_cell(gain: tuple[float, list[float]] | None) -> str:
    return "-" if gain is None else f"{gain[0]:+.1f} [{gain[1][0]:+.1f}, {gain[1][1]:+.1f}]"


def as_table(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    console = console_for(wide=len(runs) > 2)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns_of(runs):
        table.add_column(name, no_wrap=name == "method", justify="left" if name in ("task", "method") else "right")
    for comparison in comparisons:
        table.add_row(*(Text(printable(cell)) for cell in cells_of(comparison)))
    with console.capture() as captured:
        console.print(table)
    legend = [f"run {number}: {folder}" for number, folder in enumerate(runs, 1)]
    return "\n".join([*legend, captured.get().rstrip(), "differences are paired by question, with 95 % intervals"])


def as_markdown(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    names = columns_of(runs)
    lines = [names, ["---"] * 2 + ["---:"] * (len(names) - 2), *map(cells_of, comparisons)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    return "\n".join([*(f"Run {number}: `{folder}`." for number, folder in enumerate(runs, 1)), "", *table])


def as_latex(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    names = columns_of(runs)
    rows = [" & ".join(map(latex_text, cells)) + r" \\" for cells in (names, *map(cells_of, comparisons))]
    legend = [f"% run {number}: {folder}" for number, folder in enumerate(runs, 1)]
    begin = r"\begin{tabular}{ll" + "r" * (len(names) - 2) + "}"
    return "\n".join([*legend, begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def as_csv(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    """One line a row and run, with plain numbers."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ("score", "score_low", "score_high", "difference", "difference_low", "difference_high")
    writer.writerow(["task", "method", "asked", "questions", "run", *fields])
    for comparison in comparisons:
        gains = [None, *comparison.differences]
        for folder, own, gain in zip(runs, comparison.scores, gains, strict=True):
            if own is not None:
                numbers = [round(own.score, 3), *interval(own.draws), *([] if gain is None else [round(gain[0], 3), *gain[1]])]
                writer.writerow([*comparison.key, comparison.questions, folder, *numbers])
    return file.getvalue().rstrip("\n")


WRITERS: Mapping[str, Callable[[Sequence[Path], Sequence[Comparison]], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
}
