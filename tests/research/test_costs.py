"""What V2Drop costs: by formula, and judged from the rows of the benchmark."""

import pytest

from nanovlm_v2drop.research import costs
from nanovlm_v2drop.research.costs import cost_findings, flops_finding
from nanovlm_v2drop.research.findings import FAILS, HOLDS, OPEN


def test_scoring_three_drop_points_is_counted_at_what_arrives_there():
    finding = flops_finding()
    assert finding.measured.startswith(f"{3 * 4096 * (576 + 161 + 40) / 1e6:.1f} MFLOPs")
    assert finding.verdict == HOLDS


@pytest.mark.parametrize(
    ("speedups", "peak", "percent", "verdicts"),
    [
        ((2.0, 2.5), 900.0, 0.4, [HOLDS] * 3),
        ((2.0, 1.5), 1100.0, 9.0, [FAILS] * 3),
        ((2.0, 2.1), 900.0, 0.4, [HOLDS, HOLDS, OPEN]),
    ],
)
def test_costs_are_judged_by_the_benchmarks_rows(monkeypatch, speedups, peak, percent, verdicts):
    def measured(vision_tokens, share):
        rounds = [100 / (speedups[vision_tokens > 576] + off) for off in (-0.1, 0.0, 0.1)]
        own = {"rounds_ms": rounds, "drop_points_percent": percent, "peak_memory_mb": peak}
        return {"dense": {"peak_memory_mb": 1000.0, "rounds_ms": [100.0] * 3}, "v2drop": own}

    monkeypatch.setattr(costs, "measure_costs", measured)
    assert [finding.verdict for finding in cost_findings()] == verdicts
