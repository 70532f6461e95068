"""What is shown while a run goes on: the plan, a bar with the remaining time, and how to continue after a stop."""

import shlex
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..evaluation.plans import Plan
from ..tasks import Sample
from .arguments import typed_command

FIRST_ANSWERS = 20  # of these the remaining time is estimated


class RunProgress:
    """Counts the questions of all tasks, shows bars on stderr, and says after the first answers how long the rest will take.

    Args:
        questions: for each task the number of its questions.
        runs: for each task the number of answers to one question: methods, budgets and seeds.
        answered: for each (task, sample id) the number of answers that an earlier start has left; they cost no time now.
        shown: False in all processes but the first.
    """

    def __init__(
        self,
        questions: Mapping[str, int],
        runs: Mapping[str, int],
        answered: Mapping[tuple[str, str], int],
        shown: bool,
    ) -> None:
        self.questions, self.runs, self.answered = questions, runs, answered
        self.done, self.fresh_answers, self.told = 0, 0, False
        self.console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bars = Progress(*columns, *times, console=self.console, disable=not shown)
        self.started = time.perf_counter()

    @property
    def total(self) -> int:
        return sum(self.questions.values())

    def follow(self, batches: Iterable[Sequence[Sample]], task: str, description: str) -> Iterator[Sequence[Sample]]:
        """The samples of one task, counted as they are answered."""
        bar = self.bars.add_task(description, total=self.questions[task])
        for samples in batches:
            fresh = (self.runs[task] - self.answered.get((task, sample.sample_id), 0) for sample in samples)
            self.count(len(samples), sum(max(answers, 0) for answers in fresh))
            self.bars.advance(bar, len(samples))
            yield samples

    def count(self, questions: int, fresh_answers: int) -> None:
        """More questions are done, for which that many answers were made now."""
        self.done += questions
        self.fresh_answers += fresh_answers
        if not self.told and self.fresh_answers >= FIRST_ANSWERS and self.left:
            self.told = True
            if not self.bars.disable:
                self.console.print(f"expected time: {duration(self.seconds_left())} for the other {self.left} questions")

    @property
    def left(self) -> int:
        return self.total - self.done

    def seconds_left(self) -> float:
        answers = sum(self.questions[task] * self.runs[task] for task in self.questions)
        per_answer = (time.perf_counter() - self.started) / self.fresh_answers
        return per_answer * (answers - sum(self.answered.values()) - self.fresh_answers)

    @contextmanager
    def continued_with(self, command: str) -> Iterator[None]:
        """Shows the bars; a KeyboardInterrupt in here says how far the run has come, and the command that continues it."""
        try:
            with self.bars:
                self.started = time.perf_counter()
                yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped after {self.done:,} of {self.total:,}; go on with: {command}") from None


def answered_before(records: Iterable[tuple[str, str, str]], plans: Mapping[str, Sequence[Plan]]) -> Counter[tuple[str, str]]:
    """How many of `plans` (by task) have answered each (task, sample id), from (task, plan key, sample id) of records."""
    wanted = {(task, plan.key) for task, own in plans.items() for plan in own}
    return Counter((task, sample_id) for task, key, sample_id in records if (task, key) in wanted)


def plan_line(task: str, questions: int, plans: Sequence[Plan], seeds: int) -> str:
    """What one task will cost: questions x runs, and how often methods that draw at random do so."""
    runs = "1 run" if len(plans) == 1 else f"{len(plans)} runs"
    line = f"{task}: {questions:,} questions x {runs} = {questions * len(plans):,} answers"
    if not any(plan.kind is not None and plan.kind.seeded for plan in plans):
        return line
    return f"{line}; 1 seed (see --seeds)" if seeds == 1 else f"{line}; {seeds} seeds"


def duration(seconds: float) -> str:
    """About how long: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def resume_command(argv: Sequence[str], output: Path, processes: int = 1) -> str:
    """The command that continues a run."""
    words = typed_command(argv)
    if not any(word == "--output" or word.startswith("--output=") for word in words):
        words += ["--output", str(output)]
    if "--resume" not in words:
        words += ["--resume"]
    if processes > 1:
        words = ["torchrun", "--nproc-per-node", str(processes), *words[1:]]
    return shlex.join(words)
