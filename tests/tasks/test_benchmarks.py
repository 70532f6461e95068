"""Every benchmark asks and scores as lmms-eval does: by stored outputs always, and live where lmms-eval is installed."""

import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from benchmark_rows import answer, picture, rows_of, write_rows
from lmms_eval_oracle import GOLDENS, Official, is_asked

from nanovlm_v2drop.tasks import Sample, Task, load_task
from nanovlm_v2drop.tasks.base import NO_LIMIT

STORED = json.loads(GOLDENS.read_text(encoding="utf-8"))
NAMES = tuple(STORED)
LIVE_ROWS, LIVE_ANSWERS = 40, 2000


def loaded(name: str, folder: Path, rows: list[dict[str, Any]]) -> tuple[Task, list[Sample]]:
    """A task over rows that lie in the official files, and its samples."""
    task = load_task(name, write_rows(folder, name, rows))
    return task, list(task.samples())


def records(task: Task, samples: list[Sample], texts: list[str]) -> list[dict[str, Any]]:
    pairs = zip(samples, texts, strict=True)
    return [{**vars(sample), "text": text, "correct": task.correct(text, sample)} for sample, text in pairs]


def with_pictures(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stored rows have no pictures; those of GQA are a set of their own."""
    if name == "gqa":
        return rows
    cells = [[picture(0)] if name == "seed-image" else picture(0) for _ in rows]
    return [{**row, "image": cell} for row, cell in zip(rows, cells, strict=True)]


def our_score(task: Task, sample: Sample, text: str) -> float:
    """One answer as lmms-eval counts it: of POPE's two readings, equality."""
    return (
        task.summary(records(task, [sample], [text]))["exact_accuracy"] if task.name == "pope" else task.correct(text, sample)
    )


def our_summary(task: Task, samples: list[Sample], texts: list[str]) -> float:
    """The number that lmms-eval gives, in its unit: MME's points, else a share."""
    summary = task.summary(records(task, samples, texts))
    return (
        summary["score"] if task.name == "mme" else summary["exact_accuracy"] if task.name == "pope" else summary["score"] / 100
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_asks_and_scores_as_the_stored_outputs_of_lmms_eval(name: str, tmp_path: Path) -> None:
    stored = STORED[name]
    task, samples = loaded(name, tmp_path, with_pictures(name, stored["rows"]))
    assert [sample.text for sample in samples] == stored["prompts"]
    assert task.max_new_tokens == (stored["max_new_tokens"] or NO_LIMIT)
    assert list(task.until) == stored["until"]
    for sample, answers in zip(samples, stored["answers"], strict=True):
        assert [(text, our_score(task, sample, text)) for text, _ in answers] == [tuple(pair) for pair in answers]
    assert our_summary(task, samples, [own[0][0] for own in stored["answers"]]) == pytest.approx(stored["summary"], abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_answers_are_right_and_wrong(name: str) -> None:
    scores = [score for own in STORED[name]["answers"] for _, score in own]
    assert 0.1 < sum(scores) / len(scores) < 0.9


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed (see docs/benchmarks.md)")
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_asks_and_scores_two_thousand_answers_as_lmms_eval_does(name: str, tmp_path: Path) -> None:
    official, rows, rng = Official(name), rows_of(name, LIVE_ROWS, seed=2), Random(f"live {name}")
    task, samples = loaded(name, tmp_path, rows)
    asked = [row for row in rows if is_asked(row)]
    assert [sample.text for sample in samples] == [official.prompt(row) for row in asked]
    for _ in range(LIVE_ANSWERS // len(asked) + 1):
        texts = [answer(rng, row) for row in asked]
        ours = [(text, our_score(task, sample, text)) for sample, text in zip(samples, texts, strict=True)]
        assert ours == [(text, official.score(row, text)) for row, text in zip(asked, texts, strict=True)]
        assert our_summary(task, samples, texts) == pytest.approx(official.summary(asked, texts), abs=1e-12)
