"""The paper's tables agree with themselves, and a run over its benchmarks stands beside the right lines."""

import pytest

from nanovlm_v2drop.dropping import DROPPERS
from nanovlm_v2drop.evaluation.paper import (
    COLUMNS,
    LLAVA_COLUMNS,
    TABLES,
    PaperTable,
    averages,
    expanded,
    named_numbers,
    relative_average,
    shown,
)

KNOWN = [table for table in TABLES if None not in table.dense]


@pytest.mark.parametrize("table", KNOWN, ids=[table.title for table in KNOWN])
def test_the_averages_of_a_table_follow_from_its_numbers(table: PaperTable) -> None:
    assert len(table.dense) == len(table.columns) + len(table.extra)
    for row in table.rows:
        assert len(row.numbers) == len(table.dense)
        pairs = list(zip(row.numbers, table.dense, strict=True))[: len(table.columns)]
        found = relative_average([own or 0 for own, _ in pairs], [whole or 0 for _, whole in pairs])
        assert found == pytest.approx(row.average, abs=0.16), row


def test_methods_of_the_paper_have_our_names_or_none() -> None:
    assert {row.name for table in TABLES for row in table.rows} - {""} <= set(DROPPERS)


@pytest.mark.parametrize(
    ("names", "model", "tasks"),
    [
        (["paper-image"], "llava-1.5-7b", ["gqa", "scienceqa", "textvqa-ocr", "pope", "mme", "mmbench"]),
        (["paper-image"], "Qwen/Qwen2-VL-7B-Instruct", ["ai2d", "mmstar", "scienceqa", "pope", "mme", "mmbench"]),
        (["paper-image"], "llava-onevision-qwen2-7b-ov", ["gqa", "scienceqa", "textvqa-ocr", "pope", "mme", "mmbench"]),
        (["mme", "paper-image", "ai2d"], "qwen2-vl-2b", ["mme", "ai2d", "mmstar", "scienceqa", "pope", "mmbench"]),
        (["demo"], "demo", ["demo"]),
    ],
)
def test_a_list_of_the_paper_is_its_tasks_for_the_model_and_each_task_is_asked_once(
    names: list[str], model: str, tasks: list[str]
) -> None:
    assert expanded(names, model) == tasks


def row(task: str, label: str, share: float | None, value: float, tokens: float | None = None) -> dict[str, object]:
    _, metric, times = next(place for place in COLUMNS.values() if place[0] == task)
    return {
        "task": task, "label": label, "method": label, "plans": [label], "asked_share": share,
        "asked_tokens": tokens or (share and share * 576),
        "vision_tokens": 576, "metrics": {"score": -1.0, metric: value / times},
    }  # fmt: skip


def rows_of(label: str, share: float | None, values: list[float]) -> list[dict[str, object]]:
    return [row(COLUMNS[column][0], label, share, value) for column, value in zip(LLAVA_COLUMNS, values, strict=True)]


DENSE = rows_of("dense", None, [60, 70, 50, 80, 1800, 60])
HALF = [30.0, 35.0, 25.0, 40.0, 900.0, 60.0]


def test_a_run_over_the_papers_benchmarks_stands_beside_the_papers_lines() -> None:
    lines = averages([*DENSE, *rows_of("v2drop", 0.333, HALF), *rows_of("random", 0.333, HALF)], "llava-1.5-7b")["paper-image"]
    assert [line.label for line in lines] == ["dense", "  paper", "v2drop", "  paper", "random"]
    assert lines[1].numbers == (61.9, 69.5, 58.2, 85.9, 1862, 64.6)
    assert lines[2].average == pytest.approx((5 * 50 + 100) / 6)
    assert (lines[3].asked, lines[3].numbers[:2], lines[3].average) == ("192 of 576 tokens", (58.5, 69.3), 97.6)


def test_another_budget_method_or_model_has_no_line_of_the_paper() -> None:
    other = averages([*DENSE, *rows_of("v2drop", 0.25, HALF)], "llava-1.5-7b")["paper-image"]
    assert [line.label for line in other] == ["dense", "  paper", "v2drop"]
    model = averages([*DENSE, *rows_of("v2drop", 1 / 3, HALF)], "llava-1.5-13b")["paper-image"]
    assert [line.label for line in model] == ["dense", "v2drop"]


def test_budgets_in_tokens_find_their_line_too() -> None:
    rows = [{**own, "asked_share": None, "asked_tokens": 128.0} for own in rows_of("fastv", 2 / 9, HALF)]
    lines = averages([*DENSE, *rows], "llava-1.5-7b")["paper-image"]
    assert lines[-1].numbers == (49.6, 60.2, 50.6, 59.6, 1490, 56.1)


def test_a_run_without_one_of_the_benchmarks_has_no_average_and_one_without_dense_no_percentages() -> None:
    assert averages(DENSE[:-1], "llava-1.5-7b") == {}
    (line, paper) = averages(rows_of("v2drop", 1 / 9, HALF), "llava-1.5-7b")["paper-image"]
    assert (line.average, paper.average) == (None, 86.9)


def test_numbers_are_shown_as_papers_do_and_named_by_their_columns() -> None:
    assert [shown(number) for number in (None, 1862, 56, 85.94)] == ["-", "1862", "56.0", "85.9"]
    v2drop = next(own for own in TABLES[0].rows if own.name == "v2drop")
    assert named_numbers(TABLES[0], v2drop) == {
        "GQA": 58.5, "SQA": 69.3, "TextVQA": 55.6, "POPE": 85.1, "MME": 1826, "MMB": 63.7, "average %": 97.6,
    }  # fmt: skip
