"""Batches that several threads answer at the same time."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killed import kill_twenty_times

from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation import evaluate as module
from nanovlm_v2drop.evaluation.batches import Batch
from nanovlm_v2drop.evaluation.evaluate import evaluate
from nanovlm_v2drop.evaluation.plans import Plan, equal_budget_plans
from nanovlm_v2drop.evaluation.records import TIMES, read_records
from nanovlm_v2drop.evaluation.workers import SMALL, answered, num_workers
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.parallel import ALONE, Processes
from nanovlm_v2drop.tasks import load_task

PROMPTS: list[Any] = ["prompts of a batch, which `answer` alone reads"]


@pytest.fixture(scope="module")
def vlm(tiny_llava_folder: Path) -> VisionLanguageModel:
    return load(tiny_llava_folder)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return equal_budget_plans(["dense", "v2drop", "random"], [Budget(tokens=18)], Shape(36, 6), [0])


@pytest.fixture
def three_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_workers", lambda vlm, processes: 3)


def batches(count: int) -> Iterator[tuple[Batch, list[Any]]]:
    return ((Batch([], [number]), PROMPTS) for number in range(count))


def rows(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in vars(record).items() if name not in TIMES} for record in read_records(output)]


def run(vlm: VisionLanguageModel, plans: list[Plan], output: Path, resume: bool = False) -> list[dict[str, Any]]:
    list(evaluate(vlm, load_task("demo"), plans, output, limit=30, batch_size=4, timed=2, resume=resume))
    assert sum(record.prefill_ms is not None for record in read_records(output)) == 2 * len(plans)
    return rows(output)


def test_three_workers_write_the_very_rows_of_one_in_the_same_order(
    vlm: VisionLanguageModel, plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(vlm, plans, tmp_path / "one")
    monkeypatch.setattr(module, "num_workers", lambda vlm, processes: 3)
    assert run(vlm, plans, tmp_path / "three") == alone


def test_batches_are_answered_at_the_same_time_with_one_core_each_and_given_in_order() -> None:
    together, cores = threading.Barrier(3, timeout=20), set[int]()

    def answer(batch: Batch, prompts: list[Any]) -> Iterator[None]:
        cores.add(torch.get_num_threads())
        together.wait()  # would raise if fewer than three came
        yield

    threads = torch.get_num_threads()
    assert [batch.places for batch in answered(batches(9), answer, 3)] == [[number] for number in range(9)]
    assert cores == {1}
    assert torch.get_num_threads() == threads


def test_what_a_worker_raises_is_raised_for_its_batch_and_no_other_batch_is_begun() -> None:
    before, begun = threading.active_count(), list[int]()

    def answer(batch: Batch, prompts: list[Any]) -> Iterator[None]:
        begun.extend(batch.places)
        if batch.places == [2]:
            raise ValueError("two is wrong")
        yield

    found = list[Batch]()
    with pytest.raises(ValueError, match="two is wrong"):
        found.extend(batch for batch in answered(batches(100), answer, 2))
    assert [batch.places for batch in found] == [[0], [1]]
    assert max(begun) < 7
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_who_stops_reading_stops_the_workers_after_their_next_plan(workers: int) -> None:
    plans_done = list[int]()

    def answer(batch: Batch, prompts: list[Any]) -> Iterator[None]:
        for plan in range(1000 if batch.places[0] else 1):
            plans_done.append(plan)
            time.sleep(0.001)
            yield

    reading = answered(batches(9), answer, workers)
    assert next(reading).places == [0]
    reading.close()
    assert len(plans_done) < 500


def test_batches_without_prompts_are_given_without_being_answered() -> None:
    given = [(Batch([], [number]), []) for number in range(5)]
    for workers in (1, 2):
        assert list(answered(given, lambda *_: pytest.fail("answered"), workers)) == [batch for batch, _ in given]


def model(device: str, hidden_size: int) -> Any:
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=hidden_size))
    return SimpleNamespace(device=torch.device(device), config=config)


def test_a_small_decoder_on_a_cpu_has_a_worker_for_each_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert num_workers(model("cpu", SMALL), ALONE) == 6
    assert num_workers(model("cpu", SMALL + 1), ALONE) == 1
    assert num_workers(model("cuda", SMALL), ALONE) == 1
    assert num_workers(model("cpu", SMALL), Processes(rank=0, world_size=2)) == 1


@pytest.mark.slow
def test_a_run_of_three_workers_that_was_killed_twenty_times_has_the_very_rows_of_one_that_was_not(
    vlm: VisionLanguageModel, plans: list[Plan], three_workers: None, tmp_path: Path
) -> None:
    whole, killed = run(vlm, plans, tmp_path / "whole"), tmp_path / "killed"
    size = (tmp_path / "whole" / "samples.jsonl").stat().st_size
    kill_twenty_times(partial(run, vlm, plans, killed, resume=True), killed / "samples.jsonl", size)
    assert run(vlm, plans, killed, resume=True) == whole
