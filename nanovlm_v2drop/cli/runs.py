"""Methods side by side over benchmarks."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..dropping.budget import Shape
from ..evaluation.evaluate import check_resumable, evaluate_batches
from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.output import claimed
from ..evaluation.plans import Plan, prompt_shape
from ..evaluation.records import read_records
from ..evaluation.summary import model_line, run_summary
from ..loading.zoo import VisionLanguageModel
from ..models.parallel import Processes
from ..processing.prompts import Request
from ..research.ablations import ABLATIONS
from ..tasks import Task, load_task
from .checks import check_takes_video
from .earlier import earlier_plans, note_plans
from .planning import output_folder, plans_for
from .progress import RunProgress, answered_before, plan_line, resume_command
from .results import Answered, print_results, provenance, write_results

PICTURES = 4  # samples whose kept tokens are drawn


def evaluate_tasks(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Run every task in a folder that no other run writes to; the first process returns the object that ends the run."""
    tasks = [load_task(name, arguments.data) for name in arguments.tasks]
    output = processes.agreed(output_folder(arguments))  # its default name holds the time
    requests = check_before_loading(tasks, output, arguments)
    vlm = load_model(arguments)
    with claimed(output, processes):
        return run_tasks(vlm, tasks, requests, output, arguments, processes)


def run_tasks(
    vlm: VisionLanguageModel,
    tasks: Sequence[Task],
    requests: Mapping[str, Request],
    output: Path,
    arguments: argparse.Namespace,
    processes: Processes,
) -> dict[str, Any]:
    """Answer every task; the first process prints the tables and writes the results."""
    shapes = {task.name: prompt_shape(vlm, requests[task.name]) for task in tasks}
    plans = {name: plans_for(shape, arguments) for name, shape in shapes.items()}
    answered = answer_tasks(vlm, tasks, shapes, plans, output, arguments, processes)
    if not processes.is_first:
        return run_summary(vlm, [])
    about = {**provenance(vlm, arguments, processes), "panels": ablation_panels(arguments, shapes)}
    summary = write_results(vlm, answered, output, about)
    print_results(summary, arguments.verbose)
    return summary


def answer_tasks(
    vlm: VisionLanguageModel,
    tasks: Sequence[Task],
    shapes: Mapping[str, Shape],
    plans: dict[str, list[Plan]],
    output: Path,
    arguments: argparse.Namespace,
    processes: Processes,
) -> list[Answered]:
    """Answer every task with its plans; what an interruption leaves is continued with the command that is printed."""
    progress = announce(vlm, tasks, plans, output, arguments, processes)
    with progress.continued_with(resume_command(arguments.typed, output, processes.world_size)):
        run = BenchmarkRun(vlm, output, arguments, processes, progress)
        return [run.answer(task, shapes[task.name], plans[task.name]) for task in tasks]


def check_before_loading(tasks: Sequence[Task], output: Path, arguments: argparse.Namespace) -> dict[str, Request]:
    """The first request of every task; raises for methods, data and answers with which the run would fail later."""
    find_methods(arguments.methods)
    for task in tasks:
        check_resumable(task, output, arguments.resume)
    if videos := [task.name for task in tasks if task.about_videos]:
        check_takes_video(arguments.model, f"--tasks {videos[0]}")  # before videos are fetched
    return {task.name: task.first_sample().request for task in tasks}


def announce(
    vlm: VisionLanguageModel,
    tasks: Sequence[Task],
    plans: dict[str, list[Plan]],
    output: Path,
    arguments: argparse.Namespace,
    processes: Processes,
) -> RunProgress:
    """Print where results go, what runs and how much; returns the counter of this run."""
    questions = {task.name: task.num_samples(arguments.limit) for task in tasks}
    if processes.is_first:
        print(f"output: {output}")
        print(model_line(vlm))
        for name, own in plans.items():
            print(plan_line(name, questions[name], own, arguments.seeds), flush=True)
    before = ((record.task, record.plan, record.sample_id) for record in read_records(output))
    runs = {name: len(own) for name, own in plans.items()}
    return RunProgress(questions, runs, answered_before(before, plans), processes.is_first)


@dataclass(frozen=True)
class BenchmarkRun:
    """What stays the same from task to task."""

    vlm: VisionLanguageModel
    output: Path
    arguments: argparse.Namespace
    processes: Processes
    progress: RunProgress

    def answer(self, task: Task, shape: Shape, plans: list[Plan]) -> Answered:
        """Answer one task with `plans`; those of earlier starts that answered the same samples are shown too."""
        given = self.arguments
        options = {"limit": given.limit, "batch_size": given.batch_size, "resume": given.resume}
        batches = evaluate_batches(self.vlm, task, plans, self.output, **options, processes=self.processes)
        sample_ids = list[str]()
        for samples in self.progress.follow(batches, task.name, f"{self.vlm.name} on {task.name}"):
            if not sample_ids and self.processes.is_first:
                note_plans(given, self.output)
            sample_ids += [sample.sample_id for sample in samples]
        shown = list(islice(task.samples(task.default_samples if given.limit is None else given.limit), PICTURES))
        if not self.processes.is_first:
            return Answered(task, plans, shown, sample_ids)
        earlier, left_out = earlier_plans(task.name, shape, plans, sample_ids, given, self.output)
        for line in left_out:
            self.progress.console.print(line)
        return Answered(task, [*plans, *earlier], shown, sample_ids)


def ablation_panels(arguments: argparse.Namespace, shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """For each ablation the labels of its rows, so that the report gives each question a panel of its own."""
    return {
        name: list(dict.fromkeys(plan.label for shape in shapes.values() for plan in ABLATIONS[name](shape)))
        for name in arguments.ablation or ()
    }
