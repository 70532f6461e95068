"""The interval of the average over the paper's benchmarks is the bootstrap's of its parts, draw by draw."""

from dataclasses import replace

import pytest

from nanovlm_v2drop.dropping import V2Drop
from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation.averages import average_draws, average_tables
from nanovlm_v2drop.evaluation.bootstrap import Resampled, interval
from nanovlm_v2drop.evaluation.paper import COLUMNS, VIDEO_COLUMNS
from nanovlm_v2drop.evaluation.plans import Plan

TASKS = [COLUMNS[column][0] for column in VIDEO_COLUMNS]
SHAPE = Shape(576, 28, 8)
PLANS = [Plan("dense", shape=SHAPE), Plan("v2drop", V2Drop, shape=SHAPE, budget=Budget(retain=0.2))]
DENSE, OWN = [50.0, 60.0, 40.0, 50.0], [40.0, 60.0, 30.0, 45.0]


def rows_of(own: float = 45.0, dense: float = 50.0) -> list[dict[str, object]]:
    return [
        {"task": task, "label": plan.label, "method": plan.method, "plans": [plan.key], "asked_tokens": None,
         "asked_share": plan.budget and plan.budget.retain, "vision_tokens": 576, "metrics": {"score": score}}
        for task in TASKS for plan, score in zip(PLANS, (dense, own), strict=True)
    ]  # fmt: skip


def resampled_of(own: list[float], dense: list[float]) -> dict[str, dict[str, Resampled]]:
    rows = {PLANS[0].row: Resampled([], 50.0, dense), PLANS[1].row: Resampled([], 45.0, own)}
    return {TASKS[0]: rows, TASKS[1]: {row: replace(one, draws=one.draws[::-1]) for row, one in rows.items()}}


def test_each_line_of_the_run_has_the_interval_of_its_paired_draws_and_the_papers_has_none() -> None:
    (table,) = average_tables(rows_of(), "qwen2-vl-7b", PLANS, resampled_of(OWN, DENSE))
    assert (table["name"], table["columns"]) == ("paper-video", ["MVBench", "VideoMME"])
    dense, of_dense, own, of_own = table["rows"]
    assert (dense["interval"], of_dense["interval"], of_own["interval"]) == ([100.0, 100.0], None, None)
    shares = [100 * one / whole for one, whole in zip(OWN, DENSE, strict=True)]
    assert own["interval"] == interval([(one + other) / 2 for one, other in zip(shares, shares[::-1], strict=True)])
    assert own["average"] == 90
    assert of_own["average"] == 93.3


def test_a_draw_in_which_dense_scores_nothing_is_left_out() -> None:
    (table,) = average_tables(rows_of(), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0, 60.0, 40.0, 0.0]))
    assert table["rows"][2]["interval"] == interval(average_draws([(OWN[1:3], DENSE[1:3]), (OWN[2:0:-1], DENSE[2:0:-1])]))
    (table,) = average_tables(rows_of(), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0] * 4))
    assert table["rows"][2]["interval"] is None


def test_a_run_whose_dense_model_scores_nothing_has_no_average_and_no_interval() -> None:
    (table,) = average_tables(rows_of(dense=0.0), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0] * 4))
    assert [(line["average"], line["interval"]) for line in table["rows"][::2]] == [(None, None)] * 2


def test_the_average_of_draws_is_in_percent_of_dense() -> None:
    assert average_draws([([1.0, 2.0], [2.0, 2.0]), ([3.0, 3.0], [3.0, 6.0])]) == pytest.approx([75.0, 75.0])
