"""The paper's claims, on the demo or on benchmarks: findings are printed as they are decided and stand in the report."""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..dropping.budget import Shape
from ..evaluation.loading import load_model
from ..evaluation.machine import machine_name
from ..evaluation.output import claimed
from ..evaluation.plans import prompt_shape
from ..evaluation.records import read_records
from ..evaluation.summary import run_summary
from ..loading.zoo import VisionLanguageModel
from ..models.parallel import ALONE
from ..report.tables import console_for
from ..research.ablations import ABLATIONS
from ..research.claims import check_shape, find_claims, ledger_plans
from ..research.claims_on_benchmarks import benchmark_plans, find_on_benchmarks, paper_table
from ..research.findings import Finding, write_ledger
from ..tasks import load_task
from .arguments import is_demo
from .planning import output_folder
from .results import Answered, provenance, write_results
from .runs import PICTURES, answer_tasks, check_before_loading

PANELS = ("metric", "layers", "steps")  # ablations that the ledger answers too


def run_claims(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decide all claims; returns the object that ends the run, whose results are the findings."""
    return run_on_demo(arguments) if is_demo(arguments.model) else run_on_benchmarks(arguments)


def run_on_demo(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decide the claims that the demo can decide."""
    vlm, task, output = load_model(arguments), load_task("demo"), output_folder(arguments)
    shape = prompt_shape(vlm, task.first_sample().request)
    check_shape(vlm.name, shape)  # before the folder is made
    print(f"output: {output}", flush=True)
    with claimed(output):
        findings = print_each(find_claims(vlm, task, output, arguments.limit))
        samples = list(task.samples(task.default_samples if arguments.limit is None else arguments.limit))
        answered = Answered(task, ledger_plans(shape), samples[:PICTURES], [sample.sample_id for sample in samples])
        return write_claims(vlm, arguments, output, [answered], findings, shape)


def run_on_benchmarks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer every benchmark with all plans, then decide the claims that need official weights; --resume continues."""
    tasks, output = [load_task(name, arguments.data) for name in arguments.tasks], output_folder(arguments)
    requests = check_before_loading(tasks, output, arguments)
    vlm = load_model(arguments)
    shapes = {task.name: prompt_shape(vlm, requests[task.name]) for task in tasks}
    table = paper_table(vlm.name, list(shapes))
    plans = {name: benchmark_plans(shape, table) for name, shape in shapes.items()}
    with claimed(output):
        answered = answer_tasks(vlm, tasks, shapes, plans, output, arguments, ALONE)
        records = read_records(output, {own.task.name: own.sample_ids for own in answered})
        command = f"python train_free_eval.py --claims --model {arguments.model}"
        asked = [(task, plans[task.name]) for task in tasks]
        on_gpu = vlm.device.type == "cuda"
        found = find_on_benchmarks(table, asked, records, command, machine_name(vlm.device), on_gpu)
        return write_claims(vlm, arguments, output, answered, print_each(found), shapes[tasks[0].name])


def write_claims(
    vlm: VisionLanguageModel,
    arguments: argparse.Namespace,
    output: Path,
    answered: Sequence[Answered],
    findings: Sequence[Finding],
    shape: Shape,
) -> dict[str, Any]:
    """Write claims.json, claims.md and the files of any run; returns the object that ends the run."""
    about = provenance(vlm, arguments, ALONE)
    run = {**run_summary(vlm, [asdict(finding) for finding in findings]), **about}
    (output / "claims.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    write_ledger(output, findings, about["command"])
    panels = {name: [plan.label for plan in ABLATIONS[name](shape)] for name in PANELS}
    write_results(vlm, answered, output, {**about, "claims": run["results"], "panels": panels})
    print(f"report: {output / 'report.html'}")
    return run


def print_each(findings: Iterable[Finding]) -> list[Finding]:
    """Print every finding as soon as it is decided; returns all of them."""
    console, decided = console_for(wide=False), list[Finding]()
    for finding in findings:
        console.print(f"{finding.verdict}: {finding.claim}", style="bold")
        console.print(f"  paper: {finding.paper}\n  here: {finding.measured}\n  by: {finding.decides}")
        decided.append(finding)
    return decided
