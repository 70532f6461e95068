"""The interval of the average over the paper's benchmarks is the bootstrap's of its parts, draw by draw."""

from dataclasses import replace

import pytest
from test_evaluate import Loose

from nanovlm_v2drop.dropping import V2Drop
from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation.averages import average_draws, average_tables
from nanovlm_v2drop.evaluation.bootstrap import Resampled, interval, resample
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
    shifted = [shares[2], shares[1], shares[0], shares[3]]  # its draws are those of the first in reverse
    assert own["interval"] == interval([(one + other) / 2 for one, other in zip(shares, shifted, strict=True)])
    assert own["average"] == 90
    assert of_own["average"] == 93.3


def test_a_draw_in_which_dense_scores_nothing_is_left_out() -> None:
    (table,) = average_tables(rows_of(), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0, 60.0, 40.0, 0.0]))
    # In percent of dense, the draws are -, 100, 75, - and, in reverse and shifted, 75, 100, -, -.
    assert table["rows"][2]["interval"] == [100.0, 100.0]
    (table,) = average_tables(rows_of(), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0] * 4))
    assert table["rows"][2]["interval"] is None


def test_a_run_whose_dense_model_scores_nothing_has_no_average_and_no_interval() -> None:
    (table,) = average_tables(rows_of(dense=0.0), "qwen2-vl-7b", PLANS, resampled_of(OWN, [0.0] * 4))
    assert [(line["average"], line["interval"]) for line in table["rows"][::2]] == [(None, None)] * 2


def test_the_average_of_draws_is_in_percent_of_dense() -> None:
    assert average_draws([([1.0, 2.0], [2.0, 2.0]), ([3.0, 3.0], [6.0, 3.0])]) == pytest.approx([75.0, 75.0])


def test_benchmarks_do_not_vary_together_because_their_samples_have_the_same_places() -> None:
    records = [{"sample_id": f"{number:02}", "kind": "", "group": "", "correct": float(number < 50)} for number in range(100)]
    draws, dense = resample(Loose(), [records]).draws, [100.0] * 500
    one, six = (interval(average_draws([(draws, dense)] * count)) for count in (1, 6))
    assert six[1] - six[0] == pytest.approx((one[1] - one[0]) / 6**0.5, rel=0.15)
