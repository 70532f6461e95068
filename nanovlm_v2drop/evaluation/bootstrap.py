"""Confidence intervals: scores of resampled pictures, paired between methods."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import mean
from typing import Any

import numpy as np

from ..tasks import Task

BOOTSTRAP_DRAWS = 500


@dataclass(frozen=True)
class Resampled:
    """The headline score of one row, and the scores of BOOTSTRAP_DRAWS resamplings of its pictures.

    Samples without a picture's name are resampled one by one. `metrics`: the resamplings of the task's key metrics.
    """

    sample_ids: list[str]
    score: float
    draws: list[float]
    metrics: dict[str, list[float]] = field(default_factory=dict)


def resample(task: Task, by_seed: list[list[dict[str, Any]]]) -> Resampled:
    """Resample a row. Rows that answered the same samples get the same draws, so that their ratios are paired.

    With several seeds, each draw also takes as many seeds with replacement: the interval covers questions and seeds.
    Raises ValueError where the seeds answered different samples.
    """
    by_seed = [sorted(records, key=lambda record: record["sample_id"]) for records in by_seed]
    if len({tuple(record["sample_id"] for record in records) for records in by_seed}) > 1:
        counts = ", ".join(str(len(records)) for records in by_seed)
        raise ValueError(
            f"the seeds of a row answered different samples ({counts}): leave only those of one run, as "
            "read_records(output, sample_ids) does"
        )
    units = [resampling_units(records) for records in by_seed]
    draws = np.random.default_rng(0).integers(len(units[0]), size=(BOOTSTRAP_DRAWS, len(units[0])))
    seeds = np.random.default_rng(1).integers(len(units), size=(BOOTSTRAP_DRAWS, len(units)))
    kinds = {record["kind"] for record in by_seed[0]}
    found = [
        [resampled_summary(task, units[seed], draw, kinds) for seed in chosen]
        for draw, chosen in zip(draws, seeds, strict=True)
    ]
    score = mean(task.summary(records)["score"] for records in by_seed)
    scores = [mean(values["score"] for values in own) for own in found]
    metrics = {name: [mean(values.get(name, nan) for values in own) for own in found] for name in task.key_metrics}
    return Resampled([record["sample_id"] for record in by_seed[0]], score, scores, metrics)


def resampled_summary(
    task: Task, units: list[list[dict[str, Any]]], draw: Sequence[int], kinds: Collection[str]
) -> dict[str, float]:
    """The numbers of the drawn pictures. A picture that is drawn twice counts as two, for tasks that pair by picture."""
    chosen = [{**record, "group": f"{record['group']}/{copy}"} for copy, unit in enumerate(draw) for record in units[unit]]
    return task.summary_of_draw(chosen, kinds)


def score_fields(own: Resampled, dense: Resampled | None) -> dict[str, Any]:
    """Score, share of dense's score in percent and key metrics, with 95 % intervals."""
    metrics = {name: interval(draws) for name, draws in own.metrics.items() if not all(map(isnan, draws))}
    fields = {"score": round(own.score, 3), "score_interval": interval(own.draws), "metric_intervals": metrics}
    if dense is None or dense.sample_ids != own.sample_ids or not dense.score:
        return {**fields, "relative_score": None, "relative_interval": None}
    ratios = [100 * one / other if other else float("nan") for one, other in zip(own.draws, dense.draws, strict=True)]
    return {**fields, "relative_score": round(100 * own.score / dense.score, 3), "relative_interval": interval(ratios)}


def difference_fields(own: Resampled, reference: Resampled | None) -> dict[str, Any]:
    """Score minus the reference's, paired by question, with its 95 % interval; None without the same questions."""
    if reference is None or reference is own or reference.sample_ids != own.sample_ids:
        return {"difference": None, "difference_interval": None}
    gain, bounds = difference(own, reference)
    return {"difference": round(gain, 3), "difference_interval": bounds}


def difference(one: Resampled, other: Resampled) -> tuple[float, list[float]]:
    """Paired difference of two scores on the same questions, and its 95 % interval."""
    pairs = zip(one.draws, other.draws, strict=True)
    return one.score - other.score, interval([first - second for first, second in pairs])


def resampling_units(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records in groups that must stay together: those of one picture in tasks that pair by picture."""
    units: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        units.setdefault(record["group"] or record["sample_id"], []).append(record)
    return list(units.values())


def interval(values: Sequence[float]) -> list[float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [round(float(low), 3), round(float(high), 3)]
