"""The claims on benchmarks: averages and verdicts follow from the records, and a run ends, resumes and reports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import rows_of, write_rows

from nanovlm_v2drop import cli
from nanovlm_v2drop.dropping.budget import Shape
from nanovlm_v2drop.evaluation.bootstrap import Resampled
from nanovlm_v2drop.evaluation.paper import TABLES, averages
from nanovlm_v2drop.evaluation.records import Record
from nanovlm_v2drop.research.ablations import share_of_paper
from nanovlm_v2drop.research.claims_on_benchmarks import (
    average,
    average_scores,
    benchmark_plans,
    find_on_benchmarks,
    kept_finding,
    paper_table,
    saved_percent,
    scores_by_row,
    time_finding,
    v2drop_rows,
)
from nanovlm_v2drop.research.findings import FAILS, HOLDS, NEEDS_GPU, OPEN
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[2]
SHAPE = Shape(576, 32)
PLANS = benchmark_plans(SHAPE, TABLES[0])


def record(task: str, plan: str, number: int, correct: float, milliseconds: float = 10.0) -> Record:
    """An answer to a question with the truth "cat"."""
    return Record(
        task=task, plan=plan, sample_id=str(number), kind="", group="", question="?", answer="cat", text="cat", correct=correct,
        text_tokens=9, vision_tokens=576, vision_ms=1.0, prefill_ms=milliseconds, decode_ms=milliseconds, decode_steps=0,
        kv_cache_bytes=1, peak_memory_mb=1.0, kept=[[*range(100)]], vision_grids=[[1, 24, 24]],
    )  # fmt: skip


def records_of(right: dict[str, int], asked: int = 20, faster: float = 1.0) -> list[Record]:
    """Answers of every plan to two benchmarks; `right` is how many of GQA's are right by row, by default all."""
    return [
        record(task, plan.key, number, float(number < (right.get(plan.row, asked) if task == "gqa" else asked)),
               10.0 if plan.row == "dense" else 10.0 / faster)
        for task in ("gqa", "scienceqa") for plan in PLANS for number in range(asked)
    ]  # fmt: skip


def row(label: str, tokens: int) -> str:
    """The name of a row at the share of so many of 576 tokens."""
    return f"{label} {share_of_paper(tokens)}"


ASKED = [(load_task("gqa"), PLANS), (load_task("scienceqa"), PLANS)]
TWO = replace(TABLES[0], columns=("GQA", "SQA"))  # a table over two benchmarks
FOUND: Any = {"command": "python x", "machine": "a GPU", "on_gpu": True}


def verdicts(records: list[Record]) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in find_on_benchmarks(TWO, ASKED, records, **FOUND)}


def test_the_plans_have_every_budget_of_the_paper_once_at_the_depths_of_the_model() -> None:
    assert {plan.budget for plan in PLANS if plan.label == "v2drop"} == {share_of_paper(tokens) for tokens in (192, 128, 64)}
    assert len({plan.key for plan in PLANS}) == len(PLANS) == 17
    (progressive,) = [plan for plan in PLANS if plan.label == "v2drop progressive"]
    assert list(progressive.schedule) == [3, 17, 22]
    shallow = benchmark_plans(Shape(144, 12), TABLES[0])
    (progressive,) = [plan for plan in shallow if plan.label == "v2drop progressive"]
    assert max(progressive.schedule) < 12


def test_a_model_has_its_own_table_of_the_paper_where_there_is_one() -> None:
    assert paper_table("qwen2-vl-7b", ["mmstar"]) is TABLES[1]
    assert paper_table("qwen2-vl-7b", ["mvbench"]) is TABLES[2]
    assert paper_table("anything", ["gqa"]) is TABLES[0]


def test_the_average_is_that_of_the_table_over_the_papers_benchmarks() -> None:
    records = records_of({row("v2drop", 192): 10})
    found = average_scores([scores_by_row(task, plans, records) for task, plans in ASKED])
    assert found[row("v2drop", 192)].score == pytest.approx((50 + 100) / 2)
    assert found["dense"].draws == [100.0] * len(found["dense"].draws)
    rows = [{"task": task, "label": label, "method": label, "plans": [label], "asked_share": share,
             "asked_tokens": share, "vision_tokens": 576,
             "metrics": {"score": score, "f1_mean_of_categories": score}}
            for task in ("gqa", "scienceqa", "textvqa-ocr", "pope", "mme", "mmbench")
            for label, share, score in (("dense", None, 80.0), ("v2drop", 0.5, 80.0 if task != "gqa" else 40.0))]  # fmt: skip
    (line,) = [line for line in averages(rows, "any")["paper-image"] if line.label == "v2drop"]
    pairs = [(Resampled([], 40.0 if task == 0 else 80.0, [1.0]), Resampled([], 80.0, [1.0])) for task in range(6)]
    assert average(pairs).score == pytest.approx(line.average)


@pytest.mark.parametrize(("bounds", "verdict"), [([97, 99], HOLDS), ([96, 99], OPEN), ([90, 96], FAILS), ([97.7, 98], HOLDS)])
def test_a_share_is_kept_where_its_interval_is_above_the_papers_share_less_a_point(bounds: list[float], verdict: str) -> None:
    draws = [bounds[0]] * 50 + [bounds[1]] * 50
    finding = kept_finding(v2drop_rows(TABLES[0])[0], "table", Resampled([], 97.0, draws), "gqa", "x")
    assert (finding.claim, finding.verdict) == ("97.6 % of the score is kept at 192 of 576 tokens", verdict)


def test_a_share_over_some_of_the_papers_benchmarks_is_not_decided() -> None:
    records = records_of({})
    for table, verdict in ((TWO, HOLDS), (TABLES[0], OPEN)):
        shares = [finding for finding in find_on_benchmarks(table, ASKED, records, **FOUND) if "is kept at" in finding.claim]
        assert [finding.verdict for finding in shares] == [verdict] * 3


def test_claims_hold_where_v2drop_keeps_all_and_the_others_lose_much() -> None:
    low = {row("random", 128): 2, row("fastv", 128): 2, row("v2drop one-shot", 192): 2}
    found = verdicts(records_of(low, faster=2.0))
    by_bias = [claim for claim, verdict in found.items() if verdict == FAILS]
    assert by_bias == ["variation has less position bias than attention"]  # all rows keep the same tokens here
    assert list(found.values()).count(HOLDS) == len(found) - 1 == 9


def test_claims_fail_where_v2drop_loses_much_and_takes_as_long() -> None:
    low = {plan.row: 2 for plan in PLANS if plan.label.startswith("v2drop") and plan.label != "v2drop one-shot"}
    low[row("v2drop l1", 128)] = 20
    found = verdicts(records_of(low))
    assert [claim for claim, verdict in found.items() if verdict == HOLDS] == ["the choice of layers hardly matters"]
    assert OPEN not in found.values()
    assert found["31.5 % less generation time at 128 of 576 tokens"] == FAILS


def test_time_is_paired_by_question_and_has_a_verdict_on_a_gpu_only() -> None:
    assert saved_percent([(1.0, 2.0), (10.0, 20.0)]) == (50.0, [50.0, 50.0])
    records = records_of({}, faster=2.0)
    assert time_finding(ASKED, records, "x", "m", on_gpu=True).verdict == HOLDS
    assert time_finding(ASKED, records, "x", "m", on_gpu=False).verdict == NEEDS_GPU
    untimed = [replace(one, prefill_ms=None, decode_ms=None) if one.sample_id != "3" else one for one in records]
    timed = time_finding(ASKED, untimed, "x", "m", on_gpu=True)
    assert timed.measured == "50.0 % [50.0, 50.0] less over 2 questions of gqa, scienceqa, m"
    none = time_finding(ASKED, [one for one in untimed if one.sample_id != "3"], "x", "m", on_gpu=True)
    assert (none.measured, none.verdict) == ("no question was timed", OPEN)


def test_a_dense_model_that_knows_nothing_has_no_percentages() -> None:
    nothing = [replace(one, correct=0.0) for one in records_of({})]
    with pytest.raises(ValueError, match=r"dense scores 0 on gqa, scienceqa: no percentage of it can be told; take"):
        verdicts(nothing)
    on_one = [replace(one, correct=0.0) if one.task == "gqa" else one for one in records_of({})]
    (kept, *_) = find_on_benchmarks(TABLES[0], ASKED, on_one, **FOUND)
    assert kept.measured == "100.0 % [100.0, 100.0] of dense on average over scienceqa (dense scores 0 on gqa)"


@pytest.mark.slow
def test_the_claims_of_a_model_that_is_not_the_demo_are_answered_on_benchmarks_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "weights" / "demo", tmp_path / "mine")
    for task, folder in (("pope", "POPE"), ("mme", "MME")):
        write_rows(tmp_path / "data" / folder, task, rows_of(task, 12))
    options = ["--claims", "--model", tmp_path / "mine", "--tasks", "pope,mme", "--data", tmp_path / "data", "--limit", 8]
    typed = [*map(str, options), "--output", str(tmp_path / "run")]
    assert cli.main(typed) == 0, capsys.readouterr().err
    first = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [finding["claim"][:6] for finding in first[:3]] == ["97.6 %", "94.0 %", "86.9 %"]
    assert len(first) == 10
    assert {finding["decides"].partition(" --device")[0] for finding in first} == {
        f"python train_free_eval.py --claims --model {tmp_path / 'mine'}"
    }
    lines = (tmp_path / "run" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "samples.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    assert cli.main(typed) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*typed, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [finding["measured"] for finding in again[:-1]] == [finding["measured"] for finding in first[:-1]]
    assert len((tmp_path / "run" / "samples.jsonl").read_bytes().splitlines()) == len(lines)
    assert "97.6 % of the score is kept" in (tmp_path / "run" / "claims.md").read_text()
    assert "97.6 % of the score is kept" in (tmp_path / "run" / "report.html").read_text()
