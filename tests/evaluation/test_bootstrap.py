"""Intervals: what they hold, what they are paired by, and what stays together in a resampling."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import Loose, Twins

from nanovlm_v2drop.evaluation.bootstrap import difference_fields, resample, resampling_units, score_fields
from nanovlm_v2drop.tasks import Mme, Pope, Task, load_task
from nanovlm_v2drop.tasks.mlvu import KINDS
from nanovlm_v2drop.tasks.mme import COGNITION, PERCEPTION


def scored(corrects: Sequence[float], groups: Sequence[str] | None = None) -> list[dict[str, Any]]:
    groups = groups or [""] * len(corrects)
    pairs = enumerate(zip(corrects, groups, strict=True))
    return [{"sample_id": str(number), "kind": "", "group": group, "correct": correct} for number, (correct, group) in pairs]


def bootstrap(task: Task, records: list[dict], dense: list[dict] | None) -> dict:
    return score_fields(resample(task, [records]), None if dense is None else resample(task, [dense]))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=12))
def test_the_interval_contains_the_score_and_is_a_point_where_all_answers_are_alike(corrects: list[float]) -> None:
    result = bootstrap(Loose(), scored(corrects), None)
    low, high = result["score_interval"]
    assert low <= result["score"] <= high
    assert (low == high) == (len(set(corrects)) == 1)
    assert (result["relative_score"], result["relative_interval"]) == (None, None)


def test_the_interval_holds_95_percent_of_the_binomial_distribution() -> None:
    low, high = bootstrap(Loose(), scored([1.0, 0.0] * 50), None)["score_interval"]
    assert low == pytest.approx(40, abs=2)  # the quantiles at 2.5 and 97.5 % of 100 throws of a fair coin
    assert high == pytest.approx(60, abs=2)


def test_the_relative_interval_is_a_paired_one() -> None:
    corrects = [1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    result = bootstrap(Loose(), scored([correct / 2 for correct in corrects]), scored(corrects))
    assert result["score_interval"][0] < result["score_interval"][1]
    assert (result["relative_score"], result["relative_interval"]) == (50, [50, 50])


def test_a_difference_is_paired_by_question_and_stands_beside_another_row_only() -> None:
    one, other = (resample(Loose(), [scored(corrects)]) for corrects in ([1.0, 0.5, 1.0, 0.5], [0.5, 0.0, 0.5, 0.0]))
    assert difference_fields(one, other) == {"difference": 50, "difference_interval": [50, 50]}
    for nothing in (None, one, resample(Loose(), [scored([1.0])])):
        assert difference_fields(one, nothing) == {"difference": None, "difference_interval": None}


def test_a_dense_model_without_a_right_answer_has_no_relative_score() -> None:
    result = bootstrap(Loose(), scored([1.0, 0.0]), scored([0.0, 0.0]))
    assert (result["relative_score"], result["relative_interval"]) == (None, None)


def test_questions_about_one_picture_are_resampled_together() -> None:
    records = scored([1, 1, 0, 0, 1], ["a", "b", "a", "", ""])
    assert [[record["sample_id"] for record in unit] for unit in resampling_units(records)] == [["0", "2"], ["1"], ["3"], ["4"]]
    result = bootstrap(Twins(), scored([1, 0, 0, 1], ["a", "a", "b", "b"]), None)  # Twins refuses a picture cut in two
    assert result["score_interval"] == [50, 50]


def test_seeds_that_answered_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the seeds of a row answered different samples \(3, 2\): leave only those of one"):
        resample(Loose(), [scored([1.0, 0.0, 1.0]), scored([1.0, 0.0])])


def test_seeds_that_disagree_widen_the_interval_and_share_the_score() -> None:
    right, wrong = scored([1.0] * 40), scored([0.0] * 40)
    apart = score_fields(resample(Loose(), [right, wrong, right, wrong]), None)
    assert apart["score"] == 50
    low, high = apart["score_interval"]
    assert low <= 25 < 75 <= high
    half = scored([1.0, 0.0] * 20)
    alike = score_fields(resample(Loose(), [half] * 4), None)
    assert alike["score"] == 50
    assert alike["score_interval"][1] - alike["score_interval"][0] < high - low


def test_both_readings_of_pope_have_intervals_and_a_category_without_questions_has_none() -> None:
    answers = [("yes", "yes"), ("Yes.", "yes"), ("no", "no"), ("No.", "no"), ("yes", "no"), ("no", "yes")] * 10
    records = [
        {"sample_id": str(number), "group": "", "kind": "random", "text": text, "answer": truth, "correct": 1.0}
        for number, (text, truth) in enumerate(answers)
    ]
    bounds = score_fields(resample(Pope(), [records]), None)["metric_intervals"]
    metrics = Pope().summary(records)
    assert {"exact_accuracy", "exact_f1", "f1_random", "yes_ratio"} <= set(bounds)
    assert "f1_popular" not in bounds
    for name, (low, high) in bounds.items():
        assert low < high
        assert low <= metrics[name] <= high
    assert metrics["exact_accuracy"] == pytest.approx(metrics["accuracy"] / 2)


@pytest.mark.parametrize("pictures", [1, 2, 4])
def test_a_resampling_that_lacks_a_category_of_mme_does_not_lower_the_interval(pictures: int) -> None:
    truths = ("yes", "no")
    names = [(category, f"{category}/{number}") for category in PERCEPTION + COGNITION for number in range(pictures)]
    records = [
        {"sample_id": f"{category}/{name}#{truth}", "kind": category, "group": name, "text": truth, "answer": truth}
        for category, name in names
        for truth in truths
    ]
    fields = score_fields(resample(Mme(), [records]), None)
    assert (fields["score"], fields["score_interval"]) == (2800, [2800, 2800])
    assert fields["metric_intervals"]["perception"] == [2000, 2000]
    assert fields["metric_intervals"]["cognition"] == [800, 800]
    without = score_fields(resample(Mme(), [[record for record in records if record["kind"] in PERCEPTION]]), None)
    assert without["score_interval"] == [2000, 2000]
    records[0]["text"] = "no"
    low, high = score_fields(resample(Mme(), [records]), None)["score_interval"]
    assert low < Mme().summary(records)["score"] < high == 2800


def test_a_resampling_that_lacks_a_kind_of_mlvu_does_not_lower_the_interval_and_a_kind_without_questions_does() -> None:
    right = [{**record, "kind": kind} for record, kind in zip(scored([1.0] * 14), [*KINDS, *KINDS], strict=True)]
    assert score_fields(resample(load_task("mlvu"), [right]), None)["score_interval"] == [100, 100]
    six = [record for record in right if record["kind"] != KINDS[0]]
    assert score_fields(resample(load_task("mlvu"), [six]), None)["score_interval"] == [pytest.approx(600 / 7, abs=1e-3)] * 2
