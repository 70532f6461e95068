"""Plans, answers on disk, resuming, and rows whose numbers follow from the answers, on a tiny model."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm_v2drop import evaluate as module
from nanovlm_v2drop.dropping import PUBLISHED_SCHEDULES, Random
from nanovlm_v2drop.evaluate import (
    Plan,
    evaluate,
    make_plans,
    read_records,
    resample,
    resampling_units,
    run_summary,
    score_fields,
    summarise,
)
from nanovlm_v2drop.tasks import Sample, Task
from nanovlm_v2drop.zoo import VisionLanguageModel, load

METHODS = ["dense", "v2drop", "random"]
NUM_VISION_TOKENS, NUM_LAYERS = 36, 6


class Twins(Task):
    """Two questions about every random picture, of which neither may be scored without the other."""

    name = "twins"
    max_new_tokens = 4
    default_samples = 2

    def samples(self, limit: int | None = None) -> Iterator[Sample]:
        for number in range(6 if limit is None else limit):
            rng = np.random.default_rng(number // 2)
            picture = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
            text = ("What colour is the digit?", "yes or no?")[number % 2]
            yield Sample(f"sample-{number}", text, (picture,), "yes", kind="any", group=f"picture-{number // 2}")

    def correct(self, answer: str, sample: Sample) -> float:
        return float((len(answer) + len(sample.text)) % 2)  # not the same for both questions

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        assert set(Counter(record["group"] for record in records).values()) == {2}
        return {"score": 100 * mean(record["correct"] for record in records)}


class Loose(Twins):
    """Without pairs."""

    name = "loose"

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {"score": 100 * mean(record["correct"] for record in records)}


@pytest.fixture(scope="module")
def vlm(tiny_llava_folder: Path) -> VisionLanguageModel:
    return load(tiny_llava_folder)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return make_plans(METHODS, [18, 10], NUM_VISION_TOKENS, NUM_LAYERS, seed=3)


@pytest.fixture(scope="module")
def finished(vlm: VisionLanguageModel, plans: list[Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, one sample at a time. Read only."""
    output = tmp_path_factory.mktemp("finished")
    assert [sample.sample_id for sample in evaluate(vlm, Twins(), plans, output, limit=6)] == [f"sample-{n}" for n in range(6)]
    return output


def lines_of(output: Path) -> list[str]:
    return (output / "samples.jsonl").read_text().splitlines()


def answers(output: Path) -> dict[tuple[str, str], tuple[str, int, list[list[int]]]]:
    """What depends neither on the clock nor on the batch, by plan and sample."""
    return {(r.plan, r.sample_id): (r.text, r.kv_cache_bytes, r.kept) for r in read_records(output)}


def scored(corrects: Sequence[float], groups: Sequence[str] | None = None) -> list[dict[str, Any]]:
    groups = groups or [""] * len(corrects)
    pairs = enumerate(zip(corrects, groups, strict=True))
    return [{"sample_id": str(number), "group": group, "correct": correct} for number, (correct, group) in pairs]


# Plans


def test_dense_is_planned_once_and_every_other_method_at_every_budget(plans: list[Plan]) -> None:
    rows = [(plan.method, plan.asked_tokens, plan.key) for plan in plans]
    assert rows == [
        ("dense", None, "dense"),
        ("v2drop", 18, "v2drop 18"),
        ("random", 18, "random 18 seed 3"),
        ("v2drop", 10, "v2drop 10"),
        ("random", 10, "random 10 seed 3"),
    ]
    assert plans[0].dropper is None
    assert plans[0].schedule.mean_tokens(NUM_VISION_TOKENS, NUM_LAYERS) == NUM_VISION_TOKENS
    for plan in plans[1:]:
        assert plan.dropper is not None
        assert plan.dropper.name == plan.method
        assert plan.dropper.schedule is plan.schedule
        assert plan.schedule.mean_tokens(NUM_VISION_TOKENS, NUM_LAYERS) == pytest.approx(plan.asked_tokens, abs=0.5)
        assert not isinstance(plan.dropper, Random) or plan.dropper.seed == 3


def test_the_papers_own_schedules_are_taken_at_its_budgets_and_model_size() -> None:
    paper = {plan.asked_tokens: plan.schedule for plan in make_plans(["v2drop"], [192, 128, 64, 100], 576, 32, seed=0)}
    assert [paper[budget] for budget in (192, 128, 64)] == [PUBLISHED_SCHEDULES[f"paper-{b}"] for b in (192, 128, 64)]
    assert paper[100].mean_tokens(576, 32) == pytest.approx(100, abs=0.5)
    (other,) = make_plans(["v2drop"], [192], 576, 40, seed=0)  # LLaVA-1.5-13B
    assert other.schedule.mean_tokens(576, 40) == pytest.approx(192, abs=0.5)


def test_an_unknown_method_and_an_unreachable_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'fastest'; choose from: dense, "):
        make_plans(["dense", "fastest"], [18], NUM_VISION_TOKENS, NUM_LAYERS, seed=0)
    with pytest.raises(ValueError, match="a mean of 2 vision tokens is out of reach"):
        make_plans(["v2drop"], [2], NUM_VISION_TOKENS, NUM_LAYERS, seed=0)


# Answers on disk


def test_every_plan_answers_a_sample_before_the_next_sample_is_asked(finished: Path, plans: list[Plan]) -> None:
    order = [(record.sample_id, record.plan) for record in read_records(finished)]
    assert order == [(f"sample-{number}", plan.key) for number in range(6) for plan in plans]


def test_an_answer_keeps_what_its_schedule_says_and_fills_the_cache_that_the_accounting_says(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel
) -> None:
    by_key = {plan.key: plan for plan in plans}
    for record in read_records(finished):
        schedule = by_key[record.plan].schedule
        per_layer = schedule.vision_tokens_per_layer(NUM_VISION_TOKENS, NUM_LAYERS)
        assert [len(kept) for kept in record.kept] == [per_layer[layer] for layer in schedule]
        cache_bytes = schedule.kv_cache_bytes(vlm.config.text_config, record.text_tokens, record.vision_tokens, 4)
        assert record.kv_cache_bytes == cache_bytes


def test_batches_of_three_give_the_answers_of_one_by_one(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    assert len(list(evaluate(vlm, Twins(), plans, tmp_path, limit=5, batch_size=3))) == 5
    alone = {key: answer for key, answer in answers(finished).items() if key[1] != "sample-5"}
    assert answers(tmp_path) == alone


def test_resuming_repairs_a_cut_line_and_asks_only_what_is_missing(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(finished)
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines[:7], lines[7][:25]]))  # 5 plans a sample
    asked = []
    answer_batch = module.answer_batch

    def recorded(vlm: VisionLanguageModel, task: Task, plan: Plan, prepared: module.Prepared) -> list[module.Record]:
        asked.extend((plan.key, sample.sample_id) for sample in prepared.samples)
        return answer_batch(vlm, task, plan, prepared)

    monkeypatch.setattr(module, "answer_batch", recorded)
    given = list(evaluate(vlm, Twins(), plans, tmp_path, limit=3, batch_size=2, resume=True))
    assert len(given) == 3
    assert lines_of(tmp_path)[:7] == lines[:7]
    missing = [(record["plan"], record["sample_id"]) for record in map(json.loads, lines[7:15])]
    assert Counter(asked) == Counter([*missing, asked[0]])  # the first one also as the uncounted warm-up
    assert answers(tmp_path) == {key: answers(finished)[key] for key in answers(tmp_path)}
    assert len(lines_of(tmp_path)) == 15
    asked.clear()
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=3, resume=True))
    assert not asked


def test_a_finished_file_is_neither_overwritten_nor_added_to(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "samples.jsonl").write_bytes((finished / "samples.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"samples\.jsonl already holds answers to twins; go on with --resume, or choose"):
        next(evaluate(vlm, Twins(), plans, tmp_path, limit=6))
    assert lines_of(tmp_path) == lines_of(finished)
    assert len(list(evaluate(vlm, Loose(), plans[:1], tmp_path))) == Loose.default_samples  # another task's answers may follow
    assert lines_of(tmp_path)[: -Loose.default_samples] == lines_of(finished)


# Rows


def test_rows_follow_from_the_answers_in_the_file(finished: Path, plans: list[Plan], vlm: VisionLanguageModel) -> None:
    records = read_records(finished)
    rows = summarise(vlm, Twins(), plans, records)
    assert [(row["method"], row["asked_tokens"]) for row in rows] == [(plan.method, plan.asked_tokens) for plan in plans]
    for row, plan in zip(rows, plans, strict=True):
        own = [record for record in records if record.plan == plan.key]
        stages = dict(zip(plan.schedule, own[0].kept, strict=True))
        entering = [NUM_VISION_TOKENS]
        for layer in range(NUM_LAYERS):
            entering.append(len(stages[layer]) if layer in stages else entering[-1])
        assert row["mean_vision_tokens"] == round(mean(entering[1:]), 2)
        assert row["final_vision_tokens"] == entering[-1]
        assert row["score"] == round(100 * mean((len(record.text) + len(record.question)) % 2 for record in own), 3)
        assert row["samples"] == len(own) == 6
    assert rows[0]["relative_score"] == 100
    assert rows[0]["relative_interval"] == [100, 100]
    assert len({row["prefill_tflops"] for row in rows}) > 1
    result = run_summary(vlm, rows)
    assert json.loads(json.dumps(result)) == result
    assert (result["model"], result["attention"], result["results"]) == (vlm.name, "sdpa", rows)


def bootstrap(task: Task, records: list[dict], dense: list[dict] | None) -> dict:
    return score_fields(resample(task, records), None if dense is None else resample(task, dense))


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


def test_a_dense_model_without_a_right_answer_has_no_relative_score() -> None:
    result = bootstrap(Loose(), scored([1.0, 0.0]), scored([0.0, 0.0]))
    assert (result["relative_score"], result["relative_interval"]) == (None, None)


def test_questions_about_one_picture_are_resampled_together() -> None:
    records = scored([1, 1, 0, 0, 1], ["a", "b", "a", "", ""])
    assert [[record["sample_id"] for record in unit] for unit in resampling_units(records)] == [["0", "2"], ["1"], ["3"], ["4"]]
    result = bootstrap(Twins(), scored([1, 0, 0, 1], ["a", "a", "b", "b"]), None)  # Twins refuses a picture cut in two
    assert result["score_interval"] == [50, 50]


def test_a_budget_or_method_given_twice_is_planned_once() -> None:
    plans = make_plans(["dense", "v2drop", "v2drop"], [18, 18], 36, 6, seed=0)
    assert [plan.key for plan in plans] == ["dense", "v2drop 18"]
