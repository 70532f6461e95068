"""What V2Drop costs and saves: the paper's claims about FLOPs, time and memory.

Times and memory are measured with LAYERS layers of LLaVA-1.5-7B's shape and random bfloat16 weights. Peak memory counts as
"not above dense" up to one hundredth above it.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from ..benchmark.run import build_parser, run_benchmark
from ..dropping import PUBLISHED_SCHEDULES, DropSchedule
from ..dropping.schedule import PAPER_LAYERS, PAPER_VISION_TOKENS
from ..models.config import TextConfig
from ..models.memory import trim
from .findings import FAILS, HOLDS, OPEN, Finding

LAYERS, ROUNDS = 4, 5  # four layers are the fewest with three different drop points

Rows = Mapping[str, Mapping[str, Any]]  # rows of the benchmark by method


def flops_finding() -> Finding:
    """Compare the FLOPs of three scored drop points with those of the whole prefill, by formula.

    Scoring takes a difference, a square and a sum for each value.
    """
    config = TextConfig(vocab_size=32064)
    schedule = PUBLISHED_SCHEDULES["paper-128"]
    entering = [PAPER_VISION_TOKENS, *schedule.vision_tokens_per_layer(PAPER_VISION_TOKENS, PAPER_LAYERS)]
    scoring = sum(3 * entering[layer] * config.hidden_size for layer in schedule)
    share = 100 * scoring / DropSchedule({}).prefill_flops(config, 64, PAPER_VISION_TOKENS)
    return Finding(
        "scoring costs 0.002 % of the FLOPs",
        "0.002 %",
        f"{scoring / 1e6:.1f} MFLOPs, {share:.5f} % of a dense prefill of 640 tokens",
        HOLDS if share <= 0.002 else FAILS,
        "by formula",
    )


def cost_options(vision_tokens: int, share: float) -> list[str]:
    """The benchmark's options for V2Drop at a share of `vision_tokens`."""
    sizes = ["--vision-tokens", str(vision_tokens), "--tokens", f"{share * vision_tokens:g}", "--layers", str(LAYERS)]
    return ["--peers", "none", "--methods", "v2drop", *sizes, "--repeats", str(ROUNDS), "--decode-steps", "1"]


def measure_costs(vision_tokens: int, share: float) -> dict[str, dict[str, Any]]:
    """The benchmark's rows for dense and V2Drop, by method."""
    trim()  # peak memory is that of the process, without what it has freed before
    arguments: argparse.Namespace = build_parser().parse_args(cost_options(vision_tokens, share))
    return {row["prefill"].partition("@")[0]: row for row in run_benchmark(arguments)["prefill"]}


def cost_findings(long: int = 1728, share: float = 0.4) -> Iterator[Finding]:
    """Measure the paper's picture and a prompt of `long` vision tokens; both keep a mean of `share` of their tokens."""
    command = " ".join(["python -m nanovlm_v2drop.benchmark", *cost_options(long, share)])
    sizes = (PAPER_VISION_TOKENS, long)
    measured = [measure_costs(size, share) for size in sizes]
    yield time_finding(measured, sizes, command)
    yield memory_finding(measured[-1], long, command)
    yield length_finding(measured, sizes, command)


def time_finding(measured: Sequence[Rows], sizes: Sequence[int], command: str) -> Finding:
    """The time of the drop points; the share of a few layers is converted to the share of all 32."""
    points = [rows["v2drop"]["drop_points_percent"] / (PAPER_LAYERS / LAYERS) for rows in measured]
    return Finding(
        "dropping costs under 1 % of the time",
        "latency as Random's within 2 %",
        f"drop points {points[0]:.3f} % of a prefill of {sizes[0] + 64} tokens, {points[1]:.3f} % of {sizes[1] + 64}, "
        f"converted to {PAPER_LAYERS} layers",
        HOLDS if max(points) < 1 else FAILS,
        command,
    )


def memory_finding(rows: Rows, vision_tokens: int, command: str) -> Finding:
    dense, own = rows["dense"]["peak_memory_mb"], rows["v2drop"]["peak_memory_mb"]
    return Finding(
        "peak memory is not above dense",
        "-3.3 %",
        f"{own:.0f} MB against {dense:.0f} MB, weights included, {LAYERS} layers, {vision_tokens} vision tokens",
        HOLDS if own <= 1.01 * dense else FAILS,
        command,
    )


def length_finding(measured: Sequence[Rows], sizes: Sequence[int], command: str) -> Finding:
    """A longer prompt gains more where its slowest round gains more than the shorter one's fastest."""
    gains = [round_speedups(rows) for rows in measured]
    faster = [f"{median(own):.2f} [{min(own):.2f}, {max(own):.2f}]" for own in gains]
    return Finding(
        "long inputs gain more",
        "1.46 times on images, 3.9 times on video",
        f"prefill {faster[0]} times faster at {sizes[0]} vision tokens, {faster[1]} at {sizes[1]}, same shares; in brackets "
        f"the slowest and the fastest of {ROUNDS} rounds",
        HOLDS if min(gains[1]) > max(gains[0]) else FAILS if max(gains[1]) < min(gains[0]) else OPEN,
        command,
    )


def round_speedups(rows: Rows) -> list[float]:
    """V2Drop's speed-up over dense in each round of the benchmark."""
    rounds = zip(rows["dense"]["rounds_ms"], rows["v2drop"]["rounds_ms"], strict=True)
    return [dense / own for dense, own in rounds]
