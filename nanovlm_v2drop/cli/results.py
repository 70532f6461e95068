"""What a finished run leaves behind: summary.json, galleries.json, results.csv, report.html, and the tables on screen."""

import argparse
import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..evaluation.averages import average_tables
from ..evaluation.machine import machine_name
from ..evaluation.output import write_whole
from ..evaluation.plans import Plan, first_seeds
from ..evaluation.records import Record, read_records
from ..evaluation.summary import resample_rows, run_summary, summarise, summarise_bias
from ..loading.text_model import TextModel
from ..loading.zoo import VisionLanguageModel
from ..models.parallel import Processes
from ..report.averages import print_averages
from ..report.gallery import board_of, describe_gallery
from ..report.page import write_page
from ..report.results_csv import write_csv
from ..report.tables import console_for, print_details, print_scores
from ..tasks import Sample, Task
from .arguments import typed_command


@dataclass(frozen=True)
class Answered:
    """One task that was answered: with which plans, the samples to draw, and the ids of all samples."""

    task: Task
    plans: Sequence[Plan]
    shown: Sequence[Sample]
    sample_ids: Sequence[str]


def write_results(
    vlm: VisionLanguageModel, answered: Sequence[Answered], output: Path, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Score all answers and write the files of a run into `output`; returns the object that ends a run.

    `about`: fields that stand in it beside the scores, such as `provenance`.
    """
    records = read_records(output, {own.task.name: own.sample_ids for own in answered})
    galleries = [gallery for own in answered for gallery in describe_galleries(vlm, own, records)]
    resampled = {own.task.name: resample_rows(own.task, own.plans, records) for own in answered}
    rows = [row for own in answered for row in summarise(vlm, own.task, own.plans, records, resampled[own.task.name])]
    tables = average_tables(rows, vlm.name, [plan for own in answered for plan in own.plans], resampled)
    bias = [entry for own in answered for entry in summarise_bias(own.task, own.plans, records)]
    run = {**run_summary(vlm, rows), **about, "averages": tables, "position_bias": bias, "output": str(output)}
    for name, content in (("summary.json", run), ("galleries.json", galleries)):
        write_whole(output / name, json.dumps(content, indent=1) + "\n")
    write_csv(rows, output / "results.csv")
    write_page(output)
    return run


def print_results(run: Mapping[str, Any], verbose: bool) -> None:
    """The scores, every other table with `verbose`, and last the path of the report."""
    console = console_for(verbose)
    print_scores(run["results"], console)
    print_averages(run, console)
    if verbose:
        print_details(run["results"], run["position_bias"], console)
    print(f"report: {Path(run['output']) / 'report.html'}")


def provenance(vlm: VisionLanguageModel | TextModel, arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """What is needed to make these numbers again."""
    return {
        "command": shlex.join(typed_command(arguments.typed)),
        "accounting": arguments.accounting,
        "ablation": arguments.ablation,
        "machine": machine_name(vlm.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("nanovlm-v2drop", "torch")}},
        "processes": processes.world_size,
        "tensor_parallel": processes.tensor_parallel,
    }


def describe_galleries(vlm: VisionLanguageModel, answered: Answered, records: Sequence[Record]) -> list[dict[str, Any]]:
    """What each plan kept of the samples that are drawn."""
    found = {(record.plan, record.sample_id): record for record in records if record.task == answered.task.name}
    num_layers = vlm.config.text_config.num_hidden_layers
    return [
        describe_gallery(
            answered.task.name,
            sample,
            board_of(vlm, sample.request),
            [(plan, found[plan.key, sample.sample_id]) for plan in first_seeds(answered.plans)],
            num_layers,
        )
        for sample in answered.shown
    ]
