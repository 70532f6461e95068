"""Verdicts follow from intervals, and the ledger is a table that markdown can read."""

import pytest

from nanovlm_v2drop.research.findings import FAILS, HOLDS, OPEN, Finding, agrees, hardly_matters, is_better, write_ledger


@pytest.mark.parametrize(("bounds", "verdict"), [([0.1, 2], HOLDS), ([-2, -0.1], FAILS), ([-0.1, 2], OPEN)])
def test_better_means_that_the_whole_interval_is_above_zero(bounds, verdict):
    assert is_better(bounds) == verdict


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [([[-4, 4], [0, 1]], HOLDS), ([[-4, 4], [5.1, 9]], FAILS), ([[-9, -5.1]], FAILS), ([[-6, 1]], OPEN)],
)
def test_hardly_mattering_means_that_every_interval_lies_within_five_points(bounds, verdict):
    assert hardly_matters(bounds) == verdict


@pytest.mark.parametrize(("bounds", "verdict"), [((0.51, 0.9), HOLDS), ((0.1, 0.49), FAILS), ((0.4, 0.6), OPEN)])
def test_agreeing_means_that_the_whole_interval_is_above_a_half(bounds, verdict):
    assert agrees(bounds) == verdict


def test_the_ledger_holds_its_command_and_one_row_of_five_cells_for_each_finding(tmp_path):
    findings = [
        Finding("a | b", "1.0", "2.0", HOLDS, "python train_free_eval.py --methods dense"),
        Finding("c", "-", "-", OPEN, "notebooks/03_lazy_tokens.ipynb"),
        Finding("d", "0.002 %", "0.001 %", FAILS, "by formula"),
    ]
    path = write_ledger(tmp_path, findings, "python train_free_eval.py --claims")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path == tmp_path / "claims.md"
    assert lines[2:5] == ["```bash", "python train_free_eval.py --claims", "```"]
    assert lines[6] == "| claim | paper | measured here | verdict | decided by |"
    assert lines[7] == "| --- | --- | --- | --- | --- |"
    assert lines[8:] == [
        "| a \\| b | 1.0 | 2.0 | holds here | `python train_free_eval.py --methods dense` |",
        "| c | - | - | not decided here | [03_lazy_tokens.ipynb](../notebooks/03_lazy_tokens.ipynb) |",
        "| d | 0.002 % | 0.001 % | does not hold here | by formula |",
    ]
