"""Drop layers for a model, from a few prompts: what every layer shows, the layers proposed for each budget, and their check."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice, product
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..dropping import V2Drop
from ..dropping.budget import Budget
from ..evaluation.loading import load_model
from ..evaluation.plans import out_of_reach, prompt_shape
from ..evaluation.summary import run_summary
from ..loading.zoo import VisionLanguageModel
from ..processing.prompts import Request
from ..report.tables import console_for
from ..research.calibration import STABLE, LayerRow, Prompts, Proposal, dense_answers, halves, layer_rows, propose
from ..research.calibration import stable_from as first_stable
from ..tasks import Task, load_task
from .arguments import typed_command
from .ask import question_about
from .planning import budgets_for

PROMPTS = 64  # of each task
LAYER_COLUMNS = ("layer", "rank corr.\nwith next", "same top\n{share}", "kept by\nvariation", "kept at\nrandom", "none\nkept")
PROPOSAL_COLUMNS = ("budget", "proposed", "change", "depth rule", "change", "difference, 95 % interval")


def run_calibration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what the prompts show and the proposed layers; returns the object that ends the run.

    Raises ValueError for prompts without a picture or video, and as `dense_answers` and `propose`.
    """
    asked = list(requests_of(arguments))
    vlm, console = load_model(arguments), console_for(wide=False)
    decoder, shape = vlm.model.language_model, replace(prompt_shape(vlm, asked[0]), alike=True)
    if not shape.num_vision_tokens:
        raise ValueError("the first prompt has no picture or video, so there is nothing to drop; calibrate with another task")
    budgets = budgets_for(shape, arguments)
    if unreached := [error for budget in budgets for error in out_of_reach([V2Drop], budget, shape).values()]:
        raise unreached[0]  # before anything is answered
    searching, checking = (answered(vlm, part, arguments.batch_size) for part in halves(asked))
    for budget, own in product(budgets, {own for batch in (*searching, *checking) for own in batch.shapes}):
        budget.schedule(V2Drop, own)  # raises for a prompt that cannot reach it, before layers are measured
    counts = [sum(len(batch.shapes) for batch in part) for part in (searching, checking)]
    about = f"{shape.num_layers} layers, {shape.num_vision_tokens} vision tokens"
    console.print(f"{vlm.name}: {about}; {counts[0]} prompts to search, {counts[1]} to check")
    share = budgets[0].mean_tokens(shape.num_vision_tokens) / shape.num_vision_tokens
    rows = list(layer_rows(decoder, searching, share))
    print_layers(rows, share, console)
    proposals = [propose(decoder, searching, checking, budget) for budget in budgets]
    print_proposals(proposals, arguments, console)
    layers = {"layers": [asdict(row) for row in rows], "stable_from": first_stable(rows)}
    return {**run_summary(vlm, [row_of(proposal) for proposal in proposals]), **layers}


def row_of(proposal: Proposal) -> dict[str, Any]:
    """A proposal in the object that ends the run."""
    means = [fmean(changes) if changes else None for changes in (proposal.changes, proposal.changes_by_rule)]
    return {
        "budget": str(proposal.budget),
        "layers": proposal.layers,
        "rule": proposal.rule,
        "recommended": proposal.recommended,
        "change": means[0],
        "change_by_rule": means[1],
        "gain_interval": proposal.gain_interval,
        "measured": proposal.measured,
    }


def requests_of(arguments: argparse.Namespace) -> Iterator[Request]:
    """--prompt about each picture of --image or about --video, else questions of --tasks."""
    if arguments.prompt is not None:
        about = question_about(arguments, arguments.prompt)
        yield from (Request(about.text, images=[image]) for image in about.images)
        yield from (Request(about.text, video=video) for video in about.videos)
        return
    for name in arguments.tasks:
        yield from questions_of(load_task(name, arguments.data), arguments.limit or PROMPTS)


def questions_of(task: Task, count: int) -> Iterator[Request]:
    """Questions that a run without --limit does not ask, where the task draws as many as one wants."""
    asked = task.default_samples or 0
    return (sample.request for sample in islice(task.samples(asked + count), asked, None))


def answered(vlm: VisionLanguageModel, requests: Sequence[Request], batch_size: int) -> list[Prompts]:
    return [dense_answers(vlm, requests[start : start + batch_size]) for start in range(0, len(requests), batch_size)]


def print_layers(rows: Sequence[LayerRow], share: float, console: Console) -> None:
    """One line for each layer, and from where on the ranking is stable."""
    console.print(f"right: change of the answer in nats if {share:.1%} or none stay from this layer on")
    table = table_of([column.format(share=f"{share:.1%}") for column in LAYER_COLUMNS])
    for row in rows:
        agreement = ("-" if value is None else f"{value:.2f}" for value in (row.correlation, row.overlap))
        changes = (f"{value:.3f}" for value in (row.by_variation, row.at_random, row.none_kept))
        table.add_row(str(row.layer), *agreement, *changes)
    console.print(table)
    first = first_stable(rows)
    stable = "no layer's ranking is repeated" if first is None else f"layer {first} is the first whose ranking is repeated"
    console.print(f"{stable} by the next one (correlation {STABLE:g} or more)\n")


def print_proposals(proposals: Sequence[Proposal], arguments: argparse.Namespace, console: Console) -> None:
    """Proposed layers beside the depth rule's, the verdict of the other prompts, and the options that set the layers."""
    table = table_of(PROPOSAL_COLUMNS)
    for proposal in proposals:
        ours, theirs = (f"{fmean(values):.3f}" if values else "-" for values in (proposal.changes, proposal.changes_by_rule))
        table.add_row(str(proposal.budget), written(proposal.layers), ours, written(proposal.rule), theirs, checked(proposal))
    console.print(table)
    for proposal in proposals:
        console.print(f"{proposal.budget}: {verdict(proposal)}")
        if proposal.layers != proposal.rule:
            console.print(f"  {shlex.join(command_for(proposal, arguments))}", soft_wrap=True)


def verdict(proposal: Proposal) -> str:
    """What follows for one budget, in a few words."""
    if proposal.layers == proposal.rule:
        return "no other layers were clearly better; keep the depth rule's, the default"
    if proposal.gain_interval is None:
        return "there are no other prompts to check with; give more pictures, or try"
    if proposal.recommended == proposal.layers:
        return "the proposed layers change other answers less; try"
    return "the proposed layers are not clearly better on other prompts; keep the depth rule's, or try"


def checked(proposal: Proposal) -> str:
    """Mean difference of the changes on other prompts, negative where the proposed layers are better; "-" without any."""
    if proposal.gain_interval is None or proposal.layers == proposal.rule:
        return "-"
    difference = fmean(proposal.changes) - fmean(proposal.changes_by_rule)
    low, high = proposal.gain_interval
    return f"{difference:+.3f} [{-high:+.3f}, {-low:+.3f}]"


def command_for(proposal: Proposal, arguments: argparse.Namespace) -> list[str]:
    """The command that compares the proposed layers with the rule's at the budget."""
    weights = [] if arguments.weights is None else ["--weights", arguments.weights]
    methods = ["--methods", f"dense,v2drop,v2drop:layers={written(proposal.layers)}"]
    return typed_command(["--model", arguments.model, *weights, *methods, *option_of(proposal.budget)])


def option_of(budget: Budget) -> list[str]:
    """The budget as an option of the command line."""
    return ["--tokens", f"{budget.tokens:g}"] if budget.retain is None else ["--retain", f"{budget.retain:.4g}"]


def written(layers: Sequence[int]) -> str:
    return "/".join(map(str, layers))


def table_of(columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
