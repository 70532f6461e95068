"""Plans, answers on disk, resuming, and rows whose numbers follow from the answers, on a tiny model."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from killed import kill_twenty_times
from PIL import Image

from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation import answering
from nanovlm_v2drop.evaluation import evaluate as module
from nanovlm_v2drop.evaluation.batches import BatchSize, form_batches
from nanovlm_v2drop.evaluation.evaluate import evaluate, prepare_output, timed_places
from nanovlm_v2drop.evaluation.plans import Plan, equal_budget_plans, prompt_shape
from nanovlm_v2drop.evaluation.records import TIMES, read_records
from nanovlm_v2drop.evaluation.summary import run_summary, summarise, summarise_bias
from nanovlm_v2drop.inference import decode_tokens, decode_until, prefill
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.parallel import ALONE
from nanovlm_v2drop.models.vlm import Encoded, VisionInput
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
    """The folder of a whole run, one sample at a time, two of them timed. Read only."""
    output = tmp_path_factory.mktemp("finished")
    samples = evaluate(vlm, Twins(), plans, output, limit=6, batch_size=1, timed=2)
    assert {sample.sample_id for sample in samples} == {f"sample-{number}" for number in range(6)}
    return output


def lines_of(output: Path) -> list[str]:
    return (output / "samples.jsonl").read_text().splitlines()


def answers(output: Path) -> dict[tuple[str, str], tuple[str, int, list[list[int]]]]:
    """What depends neither on the clock nor on the batch, by plan and sample."""
    return {(r.plan, r.sample_id): (r.text, r.kv_cache_bytes, r.kept) for r in read_records(output)}


# Answers on disk


def test_every_plan_answers_a_sample_before_the_next_sample_is_asked(finished: Path, plans: list[Plan]) -> None:
    order = [(record.sample_id, record.plan) for record in read_records(finished)]
    samples = list(dict.fromkeys(sample for sample, _ in order))
    assert len(samples) == 6
    assert order == [(sample, plan.key) for sample in samples for plan in plans]


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


def test_resuming_repairs_a_cut_line_and_writes_only_what_is_missing(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(finished)
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines[:9], lines[9][:25]]))  # 7 plans a sample
    asked, answer_batch = list[tuple[str, int]](), module.answer_batch

    def recorded(vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], packed: Any) -> Any:
        asked.extend((plan.key, len(packed.seqlens)) for plan in plans)
        return answer_batch(vlm, task, plans, packed)

    monkeypatch.setattr(module, "answer_batch", recorded)
    assert len(list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, timed=2, resume=True))) == 6
    assert lines_of(tmp_path)[:9] == lines[:9]
    assert Counter(asked) == Counter([(record["plan"], 1) for record in map(json.loads, lines[9:])])
    assert answers(tmp_path) == answers(finished)
    assert len(lines_of(tmp_path)) == len(lines)
    asked.clear()
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, resume=True))
    assert not asked


def test_a_batch_with_a_missing_answer_is_answered_whole_in_the_size_of_the_run_before(
    plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, batch_size=4))
    whole, sizes, share_prefix = lines_of(tmp_path), list[int](), answering.share_prefix

    def recorded(decoder: Any, packed: Any, droppers: Any, **options: Any) -> Any:
        sizes.append(len(packed.seqlens))
        return share_prefix(decoder, packed, droppers, **options)

    monkeypatch.setattr(answering, "share_prefix", recorded)
    del whole[2], whole[-3]
    (tmp_path / "samples.jsonl").write_text("".join(f"{line}\n" for line in whole))
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, resume=True))
    assert sizes == [4, 2]
    assert len(lines_of(tmp_path)) == 42
    with pytest.raises(ValueError, match="made with batch size of twins 4, not 3; choose another --output"):
        list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, batch_size=3, resume=True))


def test_a_run_that_was_killed_before_the_first_answer_to_its_second_task_goes_on_with_less_free_memory(
    plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=2))
    second = Twins()
    second.name = "second"
    prepare_output(vlm, second, plans, tmp_path, None, BatchSize(4, 500), False, ALONE)
    found = prepare_output(vlm, second, plans, tmp_path, None, BatchSize(4, 400), True, ALONE)
    assert found == BatchSize(4, 500)


def test_answers_are_those_of_every_method_and_batch_alone(
    plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    """The oracle of shared layers: prefill and decode of each plan by itself, over batches of the same shapes."""
    run = BatchSize(4)
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, batch_size=run.prompts, timed=0))
    found = answers(tmp_path)
    for batch in form_batches(vlm, Twins().samples(6), run):
        packed = vlm.prepare([sample.request for sample in batch.samples])
        for plan in plans:
            dropper = plan.dropper_for(packed, NUM_LAYERS)
            prefilled = prefill(vlm.model.language_model, packed, dropper, max_new_tokens=Twins.max_new_tokens)
            kept = [[stages[index].tolist() for _, stages in prefilled.kept] for index in range(len(batch.samples))]
            sizes = [prefilled.cache.nbytes_of(index) for index in range(len(batch.samples))]
            tokens = decode_until(decode_tokens(vlm.model.language_model, prefilled), vlm.config.eos_token_ids, 4)
            for sample, ids, size, stages in zip(batch.samples, tokens, sizes, kept, strict=True):
                text = vlm.tokenizer.decode(ids).strip()
                assert found[plan.key, sample.sample_id] == (text, size, stages)


def test_a_picture_of_several_questions_goes_through_the_tower_once(
    plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = list[int](), vlm.model.encode

    def recorded(media: Sequence[VisionInput]) -> list[Encoded]:
        encoded.append(len(media))
        return encode(media)

    monkeypatch.setattr(vlm.model, "encode", recorded)
    list(evaluate(vlm, Twins(), plans, tmp_path, limit=6, batch_size=4, timed=0))
    assert encoded == [1, 1, 1]  # three pictures for six questions and seven plans


def test_an_answer_ends_where_the_task_needs_no_more_of_it(
    plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    class Settled(Loose):
        def is_settled(self, text: str) -> bool:
            return bool(text)

    lengths = dict[str, dict[tuple[str, str], Any]]()
    for task in (Loose(), Settled()):
        list(evaluate(vlm, task, plans, tmp_path / type(task).__name__, limit=4, batch_size=2, timed=0))
        records = read_records(tmp_path / type(task).__name__)
        lengths[type(task).__name__] = {(record.plan, record.sample_id): record for record in records}
    shorter = 0
    for key, settled in lengths["Settled"].items():
        whole = lengths["Loose"][key]
        assert whole.text.startswith(settled.text)
        assert bool(settled.text) == bool(whole.text)
        assert (settled.kept, settled.kv_cache_bytes) == (whole.kept, whole.kv_cache_bytes)
        shorter += settled.decode_steps < whole.decode_steps
    assert shorter > 0


def test_times_are_taken_of_as_many_samples_as_asked_each_alone(finished: Path, plans: list[Plan]) -> None:
    records = read_records(finished)
    timed = {record.sample_id for record in records if record.prefill_ms is not None}
    assert timed == {"sample-0", "sample-3"}
    assert all((record.decode_ms is None) == (record.sample_id not in timed) for record in records)
    assert timed_places(9000, 3) == {0, 3000, 6000}
    assert timed_places(2, 8) == {0, 1}
    assert timed_places(5, 0) == set()


def test_a_finished_file_is_neither_overwritten_nor_added_to(
    finished: Path, plans: list[Plan], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    for name in ("samples.jsonl", "settings.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    with pytest.raises(ValueError, match=r"samples\.jsonl already holds answers to twins; go on with --resume, or choose"):
        next(evaluate(vlm, Twins(), plans, tmp_path, limit=6))
    assert lines_of(tmp_path) == lines_of(finished)
    others = list(evaluate(vlm, Loose(), plans[:1], tmp_path))  # another task's answers may follow
    assert len(others) == Loose.default_samples
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
        list(evaluate(vlm, Twins(), plans, output, limit=6, timed=2, resume=True))
        assert answers(output) == answers(finished)
        assert len(lines_of(output)) == len(lines_of(finished))


def rows_without_times(output: Path) -> list[dict[str, Any]]:
    records = sorted(map(asdict, read_records(output)), key=lambda record: (record["plan"], record["sample_id"]))
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


@pytest.mark.slow
def test_a_run_that_was_killed_twenty_times_has_the_very_rows_of_one_that_was_not(
    vlm: VisionLanguageModel, plans: list[Plan], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    list(evaluate(vlm, Twins(), plans, whole, limit=30, batch_size=4, timed=2))

    def answer() -> None:
        list(evaluate(vlm, Twins(), plans, killed, limit=30, batch_size=4, timed=2, resume=True))

    kill_twenty_times(answer, killed / "samples.jsonl", (whole / "samples.jsonl").stat().st_size)
    answer()
    assert rows_without_times(killed) == rows_without_times(whole)
    assert sum(record.prefill_ms is not None for record in read_records(killed)) == 2 * len(plans)


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
        timed = [record for record in answered if record.vision_ms is not None]
        total = sum((record.vision_ms or 0) + (record.prefill_ms or 0) + (record.decode_ms or 0) for record in timed)
        assert row["timed"] == 2
        assert row["total_ms"] == pytest.approx(total / len(timed), abs=1e-3)
        assert row["peak_memory_mb"] == pytest.approx(max(record.peak_memory_mb or 0 for record in timed), abs=0.1)
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
