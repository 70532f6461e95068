"""The paper's claims that need official weights and benchmarks, each with what was measured and the verdict that follows.

    python train_free_eval.py --claims --model llava-1.5-7b

Every score is an average over the benchmarks, as in the paper: the mean of a row's scores in percent of the dense scores. Its
interval resamples the questions of each benchmark, paired between rows. findings.py states the rules of the verdicts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from ..dropping.budget import Budget, Shape
from ..evaluation.averages import average_draws, percentage
from ..evaluation.bootstrap import BOOTSTRAP_DRAWS, Resampled, interval, resample
from ..evaluation.paper import COLUMNS, TABLES, PaperRow, PaperTable
from ..evaluation.plans import DENSE, Plan, equal_budget_plans
from ..evaluation.records import Record
from ..evaluation.summary import summarise_bias
from ..tasks import Task
from .ablations import share_of_paper
from .claims import bias_finding, ledger_plans, score_findings
from .findings import NEEDS_GPU, OPEN, Finding, is_kept

SAVED, TIMED = 31.5, "mmbench"  # percent less generation time at 128 tokens, on this benchmark
COMPARED = ("v2drop", "random", "fastv")
SEEDS = range(1)  # a real model takes hours, so it draws once
Asked = Sequence[tuple[Task, Sequence[Plan]]]  # the tasks of a run, each with its plans


def paper_table(model: str, tasks: Sequence[str]) -> PaperTable:
    """The paper's table for a model and for one of these tasks; for other models that of LLaVA-1.5-7B."""
    own = [table for table in TABLES if table.model == model]
    return next((table for table in own if {COLUMNS[column][0] for column in table.columns} & set(tasks)), TABLES[0])


def v2drop_rows(table: PaperTable) -> list[PaperRow]:
    return [row for row in table.rows if row.name == "v2drop"]


def benchmark_plans(shape: Shape, table: PaperTable) -> list[Plan]:
    """What answers every question of a benchmark whose first prompt has this shape: V2Drop at the budgets of the paper's table,
    and everything that `ledger_plans` compares. All budgets are shares of the prompt's vision tokens.
    """
    budgets = [Budget(retain=row.retain) for row in v2drop_rows(table)]
    plans = [*ledger_plans(shape, SEEDS), *equal_budget_plans(["v2drop"], budgets, shape, SEEDS)]
    return list({plan.key: plan for plan in plans}.values())


def find_on_benchmarks(
    table: PaperTable, asked: Asked, records: Sequence[Record], command: str, machine: str, on_gpu: bool
) -> Iterator[Finding]:
    """Each claim with its verdict, from the records of all plans; `command` decides them.

    Raises ValueError where dense has no score above 0 on any task.
    """
    by_task = {task.name: scores_by_row(task, plans, records) for task, plans in asked}
    usable = [name for name, scores in by_task.items() if scores[DENSE].score]
    unusable = ", ".join(name for name in by_task if name not in usable)
    if not usable:
        raise ValueError(f"dense scores 0 on {unusable}: no percentage of it can be told; take more questions (--limit)")
    averages = average_scores([by_task[name] for name in usable])
    over = ", ".join(usable) + (f" (dense scores 0 on {unusable})" if unusable else "")
    whole = {COLUMNS[column][0] for column in table.columns} <= set(usable)
    for row in v2drop_rows(table):
        finding = kept_finding(row, table.title, averages[f"v2drop {Budget(retain=row.retain)}"], over, command)
        yield finding if whole else replace(finding, verdict=OPEN)  # the paper's average is over all of its benchmarks
    by_label = {plan.label: averages[plan.row] for plan in asked[0][1]}
    by_label["v2drop"] = averages[f"v2drop {share_of_paper(128)}"]
    for finding in score_findings(by_label):
        yield replace(finding, measured=f"{finding.measured} (percent of dense over {over})", decides=command)
    yield replace(bias_finding(mean_bits(asked, records)), decides=command)
    yield time_finding(asked, records, command, machine, on_gpu)


def average_scores(by_task: Sequence[Mapping[str, Resampled]]) -> dict[str, Resampled]:
    """By row, the mean over the tasks of its percentages of dense; each task gives its rows."""
    return {row: average([(scores[row], scores[DENSE]) for scores in by_task]) for row in by_task[0]}


def scores_by_row(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> dict[str, Resampled]:
    """The number that the paper reports of a task, resampled, for each row over its seeds."""
    by_row: dict[str, list[list[dict[str, Any]]]] = {}
    for plan in plans:
        own = [vars(record) for record in records if (record.task, record.plan) == (task.name, plan.key)]
        by_row.setdefault(plan.row, []).append(own)
    return {row: in_paper(task, answers) for row, answers in by_row.items()}


def in_paper(task: Task, by_seed: list[list[dict[str, Any]]]) -> Resampled:
    """The score of a row, or the other number that the paper's tables show of this task."""
    found = resample(task, by_seed)
    metric = next((metric for name, metric, _ in COLUMNS.values() if name == task.name), "score")
    if metric == "score":
        return found
    return replace(found, score=fmean(task.summary(records)[metric] for records in by_seed), draws=found.metrics[metric])


def average(pairs: Sequence[tuple[Resampled, Resampled]]) -> Resampled:
    """The mean percentage of dense over (own, dense) of each task, draw by draw."""
    draws = average_draws([(own.draws, dense.draws) for own, dense in pairs])
    return Resampled([], fmean(percentage(own.score, dense.score) for own, dense in pairs), draws)


def kept_finding(row: PaperRow, title: str, measured: Resampled, over: str, command: str) -> Finding:
    bounds = interval(measured.draws)
    return Finding(
        f"{row.average:.1f} % of the score is kept at {row.budget}",
        f"{row.average:.1f} % on average, {title}",
        f"{measured.score:.1f} % [{bounds[0]:.1f}, {bounds[1]:.1f}] of dense on average over {over}",
        is_kept(bounds, row.average),
        command,
    )


def mean_bits(asked: Asked, records: Sequence[Record]) -> dict[str, float]:
    """Position bias at the share of 128 of 576 tokens: the mean over the tasks, by label."""
    bits: dict[str, list[float]] = {}
    for task, plans in asked:
        at_128 = [plan for plan in plans if plan.label in COMPARED and plan.budget == share_of_paper(128)]
        for entry in summarise_bias(task, at_128, records):
            bits.setdefault(entry["label"], []).append(entry["kl_bits"])
    return {label: fmean(values) for label, values in bits.items()}


def time_finding(asked: Asked, records: Sequence[Record], command: str, machine: str, on_gpu: bool) -> Finding:
    """Prefill and decoding of V2Drop at 128 tokens beside dense, over timed questions; a verdict on a GPU only."""
    tasks = {task.name for task, _ in asked}
    tasks = {TIMED} if TIMED in tasks else tasks
    own = generation_ms(records, tasks, f"v2drop {share_of_paper(128)}")
    dense = generation_ms(records, tasks, DENSE)
    pairs = [(own[key], dense[key]) for key in sorted(own.keys() & dense.keys())]
    finding = Finding(f"{SAVED} % less generation time at 128 of 576 tokens", "MMBench, A100", "-", NEEDS_GPU, command)
    if not pairs:
        return replace(finding, measured="no question was timed", verdict=OPEN)
    saved, bounds = saved_percent(pairs)
    over = f"{len(pairs)} questions of {', '.join(sorted(tasks))}, {machine}"
    measured = f"{saved:.1f} % [{bounds[0]:.1f}, {bounds[1]:.1f}] less over {over}"
    if not on_gpu:
        return replace(finding, measured=measured, decides=f"{command} --device cuda")
    return replace(finding, measured=measured, verdict=is_kept(bounds, SAVED))


def generation_ms(records: Sequence[Record], tasks: set[str], plan: str) -> dict[tuple[str, str], float]:
    """Prefill and decoding of each question that was timed, in milliseconds."""
    own = [record for record in records if record.plan == plan and record.task in tasks]
    times = {(record.task, record.sample_id): (record.prefill_ms, record.decode_ms) for record in own}
    return {key: prefill + decode for key, (prefill, decode) in times.items() if prefill is not None and decode is not None}


def saved_percent(pairs: Sequence[tuple[float, float]]) -> tuple[float, list[float]]:
    """How many percent less time (own, dense) pairs take in all, and its interval over resampled questions."""
    times = np.array(pairs)
    drawn = np.random.default_rng(0).integers(len(times), size=(BOOTSTRAP_DRAWS, len(times)))
    own, dense = times[drawn].sum(1).T
    total_own, total_dense = times.sum(0)
    return float(100 - 100 * total_own / total_dense), interval(list(100 - 100 * own / dense))
