"""The average over the paper's benchmarks with its interval: samples are drawn within each benchmark, paired between rows."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan, nan
from statistics import fmean
from typing import Any

from .bootstrap import Resampled, interval
from .method_names import DENSE
from .paper import COLUMNS, averages, columns_for
from .plans import Plan

ByTask = Mapping[str, Mapping[str, Resampled]]  # by task and row


def average_tables(
    rows: Sequence[Mapping[str, Any]], model: str, plans: Sequence[Plan], resampled: ByTask
) -> list[dict[str, Any]]:
    """One table for each of the paper's lists that the rows of a run cover whole, as its JSON object holds it.

    Each has the name of the list, its columns, and the lines of `averages`; lines of the run have an `interval`, 95 %.
    """
    row_of, tables = {plan.key: plan.row for plan in plans}, []
    for name, lines in averages(rows, model).items():
        columns = columns_for(name, model)
        own = [resampled[COLUMNS[column][0]] for column in columns]
        intervals = [
            None if line.average is None or not line.plan else interval_of(row_of[line.plan], columns, own) for line in lines
        ]
        found = [{**asdict(line), "interval": bounds} for line, bounds in zip(lines, intervals, strict=True)]
        tables.append({"name": name, "columns": list(columns), "rows": found})
    return tables


def interval_of(row: str, columns: Sequence[str], by_task: Sequence[Mapping[str, Resampled]]) -> list[float] | None:
    """The interval of a row's average; None where dense has a score of 0 in every draw."""
    pairs = [
        (paper_draws(column, own[row]), paper_draws(column, own[DENSE])) for column, own in zip(columns, by_task, strict=True)
    ]
    draws = average_draws(pairs)
    return None if all(map(isnan, draws)) else interval(draws)


def paper_draws(column: str, resampled: Resampled) -> list[float]:
    """The draws of the number that the paper reports of a benchmark."""
    metric = COLUMNS[column][1]
    return resampled.draws if metric == "score" else resampled.metrics[metric]


def average_draws(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """The mean percentage of dense in each draw, from the draws of (own, dense) of each benchmark.

    Benchmarks with equally many samples were drawn at the same places. Their draws are shifted against one another, so that
    samples that only share a place do not vary together.
    """
    percentages = [[percentage(*pair) for pair in zip(own, dense, strict=True)] for own, dense in pairs]
    shifted = [values[place:] + values[:place] for place, values in enumerate(percentages)]
    return [fmean(drawn) for drawn in zip(*shifted, strict=True)]


def percentage(own: float, dense: float) -> float:
    return 100 * own / dense if dense else nan
