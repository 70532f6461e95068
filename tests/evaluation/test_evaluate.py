"""Plans, answers on disk, resuming, and rows whose numbers follow from the answers, on a tiny model."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation import evaluate as module
from nanovlm_v2drop.evaluation.evaluate import evaluate
from nanovlm_v2drop.evaluation.plans import Plan, equal_budget_plans, prompt_shape
from nanovlm_v2drop.evaluation.records import read_records
from nanovlm_v2drop.evaluation.summary import run_summary, summarise, summarise_bias
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.tasks import Sample, Task

METHODS = ["dense", "v2drop", "random"]
NUM_VISION_TOKENS, NUM_LAYERS = 36, 6
SEEDS = (3, 4)


class Twins(Task):
    """Two questions about every random picture, of which neither may be scored without the other."""

    name = "twins"
    max_new_tokens = 4
    default_samples = 2

    def num_samples(self, limit: int | None = None) -> int:
        return 6 if limit is None else limit

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
    return equal_budget_plans(METHODS, [Budget(tokens=18), Budget(tokens=10)], Shape(NUM_VISION_TOKENS, NUM_LAYERS), SEEDS)


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
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines[:7], lines[7][:25]]))  # 7 plans a sample
    asked = []
    answer_batch = module.answer_batch

    def recorded(vlm: VisionLanguageModel, task: Task, plan: Plan, prepared: module.Prepared) -> list[module.Record]:
        asked.extend((plan.key, sample.sample_id) for sample in prepared.samples)
        return answer_batch(vlm, task, plan, prepared)

    monkeypatch.setattr(module, "answer_batch", recorded)
    given = list(evaluate(vlm, Twins(), plans, tmp_path, limit=3, batch_size=2, resume=True))
    assert len(given) == 3
    assert lines_of(tmp_path)[:7] == lines[:7]
    missing = [(record["plan"], record["sample_id"]) for record in map(json.loads, lines[7:21])]
    assert Counter(asked) == Counter([*missing, asked[0]])  # the first one also as the uncounted warm-up
    assert answers(tmp_path) == {key: answers(finished)[key] for key in answers(tmp_path)}
    assert len(lines_of(tmp_path)) == 21
    asked.clear()
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=3, resume=True))
    assert not asked


def test_a_finished_file_is_neither_overwritten_nor_added_to(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    for name in ("samples.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(ValueError, match=r"samples\.jsonl already holds answers to twins; go on with --resume, or choose"):
        next(evaluate(vlm, Twins(), plans, tmp_path, limit=6))
    assert lines_of(tmp_path) == lines_of(finished)
    assert len(list(evaluate(vlm, Loose(), plans[:1], tmp_path))) == Loose.default_samples  # another task's answers may follow
    assert lines_of(tmp_path)[: -Loose.default_samples] == lines_of(finished)


def test_two_samples_or_two_plans_of_one_name_are_refused(vlm: VisionLanguageModel, plans: list[Plan], tmp_path: Path) -> None:
    class Repeated(Loose):
        def samples(self, limit: int | None = None) -> Iterator[Sample]:
            return (replace(sample, sample_id="same") for sample in super().samples(limit))

    with pytest.raises(ValueError, match="two samples of loose are called 'same': give each a name of its own"):
        list(evaluate(vlm, Repeated(), plans[:1], tmp_path, batch_size=2))
    with pytest.raises(ValueError, match="two plans are called 'dense'"):
        next(evaluate(vlm, Loose(), [plans[0], plans[0]], tmp_path))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_prompts_of_several_sizes_keep_their_own_share_and_the_row_keeps_the_mean(
    batch_size: int, vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    """One, two and three pictures: 36, 72 and 108 vision tokens."""

    class Growing(Loose):
        def samples(self, limit: int | None = None) -> Iterator[Sample]:
            for number, sample in enumerate(super().samples(6)):
                yield replace(sample, images=sample.images * (number % 3 + 1))

    shape = prompt_shape(vlm, Growing().first_sample().request)
    own = equal_budget_plans(["dense", "v2drop", "random", "fastv", "visionzip"], [Budget(retain=0.4)], shape, seeds=[0])
    assert len(list(evaluate(vlm, Growing(), own, tmp_path, limit=6, batch_size=batch_size))) == 6
    records = read_records(tmp_path)
    for record in records:
        plan = next(plan for plan in own if plan.key == record.plan)
        schedule = plan.schedule_for(Shape(record.vision_tokens, NUM_LAYERS))
        per_layer = schedule.vision_tokens_per_layer(record.vision_tokens, NUM_LAYERS)
        assert [len(kept) for kept in record.kept] == [per_layer[layer] for layer in schedule] or plan.method == "visionzip"
        sizes = record.text_tokens, record.vision_tokens, 4
        assert record.kv_cache_bytes == schedule.kv_cache_bytes(vlm.config.text_config, *sizes)
    assert {record.vision_tokens for record in records} == {36, 72, 108}
    for row in summarise(vlm, Growing(), own, records)[1:]:
        assert (row["asked_tokens"], row["asked_share"], row["equal_budget"]) == (28.8, 0.4, True)
        assert row["mean_vision_tokens"] == pytest.approx(28.8, abs=1)
        assert row["note"] == ""


def test_a_row_says_in_how_many_prompts_a_method_is_at_its_floor(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    class Two(Loose):
        def samples(self, limit: int | None = None) -> Iterator[Sample]:
            for number, sample in enumerate(super().samples(4)):
                yield replace(sample, images=sample.images * (4 if number == 3 else 1))

    own = equal_budget_plans(["v2drop"], [Budget(tokens=12)], Shape(36, NUM_LAYERS), seeds=[0])
    list(evaluate(vlm, Two(), own, tmp_path, limit=4))
    (row,) = summarise(vlm, Two(), own, read_records(tmp_path))
    assert row["note"] == f"at its floor in 1 of 4 prompts, with {row['mean_vision_tokens']:.1f} mean tokens over all"
    assert row["equal_budget"] is False


def test_a_killed_run_resumes_to_the_very_rows(
    vlm: VisionLanguageModel, plans: list[Plan], finished: Path, tmp_path: Path
) -> None:
    """Cut anywhere, also inside a line, the file resumes to the answers of the whole run."""
    whole = (finished / "samples.jsonl").read_bytes()
    for number, end in enumerate(np.random.default_rng(0).integers(0, len(whole), 4)):
        output = tmp_path / str(number)
        output.mkdir()
        (output / "settings.json").write_bytes((finished / "settings.json").read_bytes())
        (output / "samples.jsonl").write_bytes(whole[:end])
        list(evaluate(vlm, Twins(), plans, output, limit=6, resume=True))
        assert answers(output) == answers(finished)
        assert len(lines_of(output)) == len(lines_of(finished))


# Rows


def test_rows_follow_from_the_answers_in_the_file(finished: Path, plans: list[Plan], vlm: VisionLanguageModel) -> None:
    records = read_records(finished)
    rows = summarise(vlm, Twins(), plans, records)
    assert [(row["method"], row["asked_tokens"], row["seeds"]) for row in rows] == [
        ("dense", None, [0]),
        ("v2drop", 18, [0]),
        ("random", 18, [3, 4]),
        ("v2drop", 10, [0]),
        ("random", 10, [3, 4]),
    ]
    for row in rows:
        own = {plan.key: plan for plan in plans if (plan.method, plan.asked_tokens) == (row["method"], row["asked_tokens"])}
        answered = [record for record in records if record.plan in own]
        schedule = next(iter(own.values())).schedule
        stages = dict(zip(schedule, answered[0].kept, strict=True))
        entering = [NUM_VISION_TOKENS]
        for layer in range(NUM_LAYERS):
            entering.append(len(stages[layer]) if layer in stages else entering[-1])
        assert row["mean_vision_tokens"] == round(mean(entering[1:]), 2)
        assert row["final_vision_tokens"] == entering[-1]
        assert row["score"] == round(100 * mean((len(record.text) + len(record.question)) % 2 for record in answered), 3)
        assert row["score"] == pytest.approx(mean(row["scores_by_seed"]), abs=1e-3)
        assert row["samples"] * len(own) == len(answered) == 6 * len(own)
        total = sum(record.vision_ms + record.prefill_ms + record.decode_ms for record in answered)
        assert row["total_ms"] == pytest.approx(total / len(answered), abs=1e-3)
        assert row["peak_memory_mb"] == pytest.approx(max(record.peak_memory_mb for record in answered), abs=0.1)
    assert rows[0]["relative_score"] == 100
    assert rows[0]["relative_interval"] == [100, 100]
    assert len({row["prefill_tflops"] for row in rows}) == 3
    result = run_summary(vlm, rows)
    assert json.loads(json.dumps(result)) == result
    assert (result["model"], result["attention"], result["results"]) == (vlm.name, "sdpa", rows)


def test_position_bias_is_counted_over_all_seeds_of_a_method(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel
) -> None:
    records = read_records(finished)
    entries = {(e["method"], e["asked_tokens"]): e for e in summarise_bias(Twins(), plans, records)}
    assert list(entries) == [("v2drop", 18), ("random", 18), ("v2drop", 10), ("random", 10)]
    own = [record.kept[0] for record in records if record.plan.startswith("random 18 seed")]
    assert entries["random", 18]["map"][0][0] == pytest.approx(mean(0 in kept for kept in own), abs=1e-5)
    assert entries["random", 18]["layer"] == next(iter(plans[1].schedule))
