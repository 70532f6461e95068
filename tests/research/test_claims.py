"""The paper's claims: each verdict follows from its figures, and each figure is measured on what the claim speaks of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_models import text_reference, write_text_folder

from nanovlm_v2drop import cli
from nanovlm_v2drop.dropping.budget import Shape
from nanovlm_v2drop.evaluation.bootstrap import Resampled, difference
from nanovlm_v2drop.evaluation.plans import prompt_shape
from nanovlm_v2drop.evaluation.records import read_records
from nanovlm_v2drop.loading.zoo import load
from nanovlm_v2drop.research import costs
from nanovlm_v2drop.research.claims import (
    area_under_roc,
    bias_finding,
    check_shape,
    ledger_plans,
    score_findings,
    text_finding,
    video_findings,
    video_score_findings,
)
from nanovlm_v2drop.research.findings import FAILS, HOLDS, NEEDS, NEEDS_GPU, NEEDS_TEXT, OPEN
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[2]
DEMO = Shape(144, 12)


def scored(score: float, spread: float = 1.0) -> Resampled:
    return Resampled(["a"], score, [score - spread, score, score + spread])


def findings(**changes: float) -> dict[str, str]:
    """Verdicts by claim where all rows except `changes` score 90."""
    labels = {plan.label: scored(90.0) for plan in ledger_plans(DEMO)}
    labels |= {"random": scored(60.0), "fastv": scored(60.0), "v2drop one-shot": scored(80.0)}
    labels |= {name.replace("_", " "): scored(score) for name, score in changes.items()}
    return {finding.claim: finding.verdict for finding in score_findings(labels)}


def test_every_claim_about_scores_can_hold_and_can_fail():
    assert set(findings().values()) == {HOLDS}
    worse = findings(v2drop_progressive=50.0, v2drop=50.0, v2drop_l1=20.0)
    assert set(worse.values()) == {FAILS}


@pytest.mark.parametrize(
    ("random", "dycoke", "verdicts"), [(60.0, 70.0, [HOLDS, HOLDS]), (85.0, 99.0, [OPEN, FAILS]), (99.0, 85.0, [FAILS, OPEN])]
)
def test_a_claim_about_video_can_hold_fail_and_stay_open(random, dycoke, verdicts):
    draws = [80.0, 80.0, 90.0]
    scores = {"v2drop": Resampled(["a"], 80.0, draws)}
    for method, score in (("random", random), ("dycoke", dycoke)):
        scores[method] = Resampled(["a"], score, [score, score, score])
    assert [finding.verdict for finding in video_score_findings(scores)] == verdicts


def test_claims_about_video_are_of_the_video_demo_at_a_quarter_of_its_tokens(tmp_path):
    found = list(video_findings(load("demo"), tmp_path, limit=8))
    assert [finding.claim for finding in found] == [f"on video V2Drop beats {name} dropping" for name in ("random", "dycoke")]
    records = read_records(tmp_path)
    assert len(records) == 8 * (1 + 1 + 3)
    assert {record.vision_tokens for record in records} == {289}
    kept = {record.plan.partition(" ")[0]: len(record.kept[0]) for record in records}
    assert kept == {"v2drop": 103, "random": 103, "dycoke": 73}  # means of 72.3 and 73 of 289


def test_a_difference_is_paired_draw_by_draw():
    value, bounds = difference(Resampled(["a"], 50, [40, 60]), Resampled(["a"], 45, [35, 55]))
    assert (value, bounds) == (5, [5, 5])


@pytest.mark.parametrize(("own", "verdict"), [(0.01, HOLDS), (0.3, FAILS)])
def test_position_bias_is_judged_beside_attention(own, verdict):
    assert bias_finding({"v2drop": own, "fastv": 0.03, "random": 0.0}).verdict == verdict


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2).filter(lambda pairs: len({p for _, p in pairs}) == 2))
def test_the_area_is_the_share_of_pairs_in_the_right_order(pairs):
    values = torch.tensor([float(value) for value, _ in pairs])
    positive = torch.tensor([is_positive for _, is_positive in pairs])
    ordered = [(one > other) + (one == other) / 2 for one in values[positive] for other in values[~positive]]
    assert area_under_roc(values, positive) == pytest.approx(float(sum(ordered)) / len(ordered))


def test_a_folder_named_demo_that_is_another_model_is_refused_before_anything_is_answered(tmp_path, capsys):
    shutil.copytree(ROOT / "weights" / "demo-video", tmp_path / "demo")
    assert cli.main(["--claims", "--model", str(tmp_path / "demo"), "--limit", "6", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "the demo's claims need pictures of 144 labelled patches, not those of demo: leave --model out" in error
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_demo_is_the_demo():
    shape = prompt_shape(load(ROOT / "weights" / "demo"), load_task("demo").first_sample().request)
    check_shape("copy", shape)
    with pytest.raises(ValueError, match="not those of copy"):
        check_shape("copy", replace(shape, num_vision_tokens=145))


@pytest.mark.slow
def test_the_whole_ledger_runs_on_the_demo(tmp_path, monkeypatch, capsys):
    own = {"rounds_ms": [1.0], "drop_points_percent": 0.1, "peak_memory_mb": 1.0}
    rows = {"dense": {"peak_memory_mb": 2.0, "rounds_ms": [2.0]}, "v2drop": own}
    monkeypatch.setattr(costs, "measure_costs", lambda *_: rows)
    assert cli.main(["--claims", "--limit", "12", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["results"]) == 19
    assert {row["verdict"] for row in result["results"]} <= {HOLDS, FAILS, OPEN, NEEDS, NEEDS_GPU, NEEDS_TEXT}
    assert all(row["decides"] for row in result["results"])
    assert json.loads((tmp_path / "claims.json").read_text()) == result


def test_the_claim_about_text_is_open_without_weights_and_measured_with_them(tmp_path: Path) -> None:
    vlm = load("demo")
    without = text_finding(vlm, tmp_path)
    assert without.verdict == NEEDS_TEXT
    assert without.measured.startswith("-, SmolLM2-135M-Instruct is not in weights/")
    folder = write_text_folder(tmp_path, text_reference("llama", max_position_embeddings=16384))
    measured = text_finding(vlm, folder, limit=2)
    assert measured.claim == without.claim
    assert measured.measured.startswith("+0.0 [+0.0, +0.0] points at 1/3 of the tokens of 2 texts, Random +0.0; dense 0.0 %")
    assert measured.verdict == HOLDS
