"""The paper's claims on the demo: each finding is printed as it is decided, and all of them stand in the report."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..evaluation.loading import load_model
from ..evaluation.output import claimed
from ..evaluation.plans import prompt_shape
from ..evaluation.summary import run_summary
from ..loading.specs import MODELS
from ..models.parallel import ALONE
from ..report.tables import console_for
from ..research.ablations import ABLATIONS
from ..research.claims import check_shape, find_claims, ledger_plans, not_the_demo
from ..research.findings import Finding, write_ledger
from ..tasks import load_task
from .planning import output_folder
from .results import Answered, provenance, write_results
from .runs import PICTURES

PANELS = ("metric", "layers", "steps")  # ablations that the ledger answers too


def run_claims(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decide all claims; returns the object that ends the run, whose results are the findings."""
    if arguments.model in MODELS and arguments.model != "demo":
        raise not_the_demo(arguments.model)  # before gigabytes are fetched
    vlm, task, output = load_model(arguments), load_task("demo"), output_folder(arguments)
    shape = prompt_shape(vlm, task.first_sample().request)
    check_shape(vlm.name, shape)  # before the folder is made
    print(f"output: {output}", flush=True)
    with claimed(output):
        findings = print_each(find_claims(vlm, task, output, arguments.limit))
    about = provenance(vlm, arguments, ALONE)
    run = {**run_summary(vlm, [asdict(finding) for finding in findings]), **about}
    (output / "claims.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    write_ledger(output, findings, about["command"])
    samples = list(task.samples(task.default_samples if arguments.limit is None else arguments.limit))
    answered = Answered(task, ledger_plans(shape), samples[:PICTURES], [sample.sample_id for sample in samples])
    panels = {name: [plan.label for plan in ABLATIONS[name](shape)] for name in PANELS}
    write_results(vlm, [answered], output, {**about, "claims": run["results"], "panels": panels})
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
