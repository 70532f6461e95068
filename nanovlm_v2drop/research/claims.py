"""The paper's claims that can be put to a test here, each with what was measured and what follows from it.

    python train_free_eval.py --claims

Scores are of the demo, and of the video demo where clips are spoken of, on the same questions for all rows; differences are
paired by question, with 95 % intervals. A claim that something "hardly matters" holds where the whole interval of the
difference lies within HARDLY points; one that something is better holds where the whole interval is above zero; one that two
rankings agree where the interval of Spearman's correlation is above AGREES, one that things change more than the background
where the area under the ROC curve is above 0.5 at every layer. Times and memory are of LAYERS layers of LLaVA-1.5-7B's shape
with random bfloat16 weights; memory is not above dense where it is at most a hundredth above. No verdict is written down
beforehand: each follows from its figures.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random as Dice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..benchmark.run import build_parser, run_benchmark
from ..demo import scenes
from ..demo.data import VISION, patch_labels
from ..dropping import PUBLISHED_SCHEDULES, DropSchedule
from ..dropping.schedule import PAPER_LAYERS, PAPER_VISION_TOKENS, layers_at_depths
from ..evaluation.bootstrap import Resampled, difference, resample
from ..evaluation.evaluate import Record, evaluate, read_records, summarise_bias
from ..evaluation.plans import Plan, Shape, equal_budget_plans, prompt_shape
from ..loading.zoo import VisionLanguageModel, load
from ..models.config import TextConfig
from ..processing.prompts import Request
from ..tasks import Task
from ..tasks.demo_video import DemoVideo
from .ablations import LAYER_NUMBERS, ablation_plans, share_of_paper
from .theory import drop_point, mean_interval, mean_ranks, rank_quality

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not decided here"
NEEDS, NEEDS_GPU = "needs the official weights", "needs a GPU"
HARDLY = 5.0  # points of score
AGREES = 0.5  # Spearman's rank correlation
LAYERS, ROUNDS = 4, 5  # as few layers as have all three drop points
CLIPS, SHARE_OF_VIDEO = 160, 0.25
AT_7B = "python train_free_eval.py --model llava-1.5-7b --ablation metric,layers,steps"


@dataclass(frozen=True)
class Finding:
    """One line of the ledger. `decides`: the command that measures it alone, or with the 7B weights."""

    claim: str
    paper: str
    measured: str
    verdict: str
    decides: str


OFFICIAL_7B = "python train_free_eval.py --model llava-1.5-7b --methods dense,v2drop --accounting official"
VIDEO_7B = (
    "python -m nanovlm_v2drop.benchmark --model llava-onevision-qwen2-7b-ov --frames 32 --retain 0.25 --layers 28 --device cuda"
)
UNTESTED = (
    Finding("94.0 % of the score is kept at 128 of 576 tokens", "mean of six benchmarks", "-", NEEDS, OFFICIAL_7B),
    Finding("31.5 % less generation time at 128 tokens", "MMBench, A100", "-", NEEDS, OFFICIAL_7B + " --device cuda"),
    Finding("74.2 % less generation time on video at 25 %", "MVBench, A100", "-", NEEDS_GPU, VIDEO_7B),
)


def find_claims(vlm: VisionLanguageModel, task: Task, output: Path, limit: int | None = None) -> Iterator[Finding]:
    """The whole ledger; answers go to `output` as in any run. Takes some minutes. Raises ValueError for another model."""
    shape = prompt_shape(vlm, task.first_sample().request)
    check_shape(vlm.name, shape)
    plans = ledger_plans(shape)
    records = answers(vlm, task, plans, output, limit)
    yield from score_findings(scores_by_label(task, plans, records))
    yield from video_findings(vlm, output / "demo-video", CLIPS if limit is None else limit)
    yield bias_finding({entry["label"]: entry["kl_bits"] for entry in summarise_bias(task, plans, records)})
    yield region_finding(vlm, shape)
    yield from impact_findings(vlm, task)
    yield flops_finding()
    yield from cost_findings()
    yield from UNTESTED


def answers(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], output: Path, limit: int | None
) -> list[Record]:
    """Of all plans to the task's samples; written to `output` as in any run."""
    answered = [sample.sample_id for sample in evaluate(vlm, task, plans, output, limit=limit, batch_size=8)]
    return read_records(output, {task.name: answered})


def check_shape(name: str, shape: Shape) -> None:
    """Raise ValueError unless the vision tokens of a picture are the patches that the demo's scenes have labels of."""
    if shape.num_vision_tokens != VISION.num_patches:
        raise not_the_demo(name)


def not_the_demo(name: str) -> ValueError:
    return ValueError(
        f"--claims is for the demo, whose pictures are {VISION.num_patches} labelled patches, not for {name}: leave --model "
        "out, or put single claims to the test with --methods and --ablation"
    )


def scores_by_label(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> dict[str, Resampled]:
    """The resampled score of every row, all its seeds together."""
    by_label: dict[str, list[list[dict[str, Any]]]] = {}
    for plan in plans:
        by_label.setdefault(plan.label, []).append([vars(record) for record in records if record.plan == plan.key])
    return {label: resample(task, answers) for label, answers in by_label.items()}


def ledger_plans(shape: Shape) -> list[Plan]:
    """The ablations, and V2Drop beside other methods at the paper's 128 of 576 tokens."""
    others = equal_budget_plans(["v2drop", "random", "fastv"], [share_of_paper(128, shape)], shape, seeds=range(3))
    return [*ablation_plans(["metric", "layers", "steps"], shape), *others]


def shown(value: float, bounds: Sequence[float]) -> str:
    return f"{value:+.1f} [{bounds[0]:+.1f}, {bounds[1]:+.1f}]"


def is_better(bounds: Sequence[float]) -> str:
    return HOLDS if bounds[0] > 0 else FAILS if bounds[1] < 0 else OPEN


def hardly_matters(bounds: Sequence[Sequence[float]]) -> str:
    """Of the intervals of all differences to the paper's choice."""
    if any(low > HARDLY or high < -HARDLY for low, high in bounds):
        return FAILS
    return HOLDS if all(low >= -HARDLY and high <= HARDLY for low, high in bounds) else OPEN


def score_findings(scores: Mapping[str, Resampled]) -> Iterator[Finding]:
    """Claims that speak of scores, from the resampled scores of `ledger_plans` by label."""
    chosen = scores["v2drop progressive"]
    steps, steps_bounds = difference(chosen, scores["v2drop one-shot"])
    yield Finding(
        "dropping in stages beats dropping at once",
        "POPE 85.1 against 77.1, MME 1826 against 1717",
        f"{shown(steps, steps_bounds)} points at the same mean",
        is_better(steps_bounds),
        AT_7B,
    )
    for method, paper in (("random", "MMBench 61.8 against 59.1"), ("fastv", "MMBench 61.8 against 56.1")):
        gain, bounds = difference(scores["v2drop"], scores[method])
        measured = f"{shown(gain, bounds)} points at 2/9 of the tokens, the paper's 128 of 576"
        command = f"python train_free_eval.py --methods dense,v2drop,{method}"
        yield Finding(f"V2Drop beats {method} dropping", paper, measured, is_better(bounds), command)
    metrics = {name: difference(scores[f"v2drop {name}"], scores["v2drop l2"]) for name in ("l1", "cosine")}
    yield Finding(
        "the metric hardly matters",
        "MME l2 1712, l1 1698, cosine 1718",
        ", ".join(f"{name} {shown(*pair)}" for name, pair in metrics.items()) + " points beside l2",
        hardly_matters([bounds for _, bounds in metrics.values()]),
        AT_7B,
    )
    names = ["/".join(map(str, layers)) for layers in LAYER_NUMBERS]
    choices = {name: difference(scores[f"v2drop {name}"], chosen) for name in names if f"v2drop {name}" in scores}
    yield Finding(
        "the choice of layers hardly matters",
        "96.0 to 97.6 % of dense",
        ", ".join(f"{name} {shown(*pair)}" for name, pair in choices.items()) + " points beside 3/17/22",
        hardly_matters([bounds for _, bounds in choices.values()]),
        AT_7B,
    )


def video_findings(vlm: VisionLanguageModel, output: Path, limit: int) -> Iterator[Finding]:
    """V2Drop beside others on clips, with the video demo where `vlm` is; answers go to `output`."""
    video, task = load("demo-video", device=vlm.device, dtype=vlm.dtype), DemoVideo()
    shape = prompt_shape(video, task.first_sample().request)
    budget = SHARE_OF_VIDEO * shape.num_vision_tokens
    plans = equal_budget_plans(["v2drop", "random", "dycoke"], [budget], shape, seeds=range(3))
    yield from video_score_findings(scores_by_label(task, plans, answers(video, task, plans, output, limit)))


def video_score_findings(scores: Mapping[str, Resampled]) -> Iterator[Finding]:
    for method, paper in (("random", "MVBench 56.4 against 54.6"), ("dycoke", "MVBench 56.4 against 49.5")):
        gain, bounds = difference(scores["v2drop"], scores[method])
        measured = f"{shown(gain, bounds)} points at {100 * SHARE_OF_VIDEO:g} % of the tokens"
        command = f"python train_free_eval.py --model demo-video --methods dense,v2drop,{method}"
        yield Finding(f"on video V2Drop beats {method} dropping", paper, measured, is_better(bounds), command)


def bias_finding(bits: Mapping[str, float]) -> Finding:
    own, chance, attention = (bits[label] for label in ("v2drop", "random", "fastv"))
    return Finding(
        "variation has less position bias than attention",
        "a figure: none, and much",
        f"V2Drop {own:.3f} bits, FastV {attention:.3f}, Random {chance:.3f}, by tenths of the sequence",
        HOLDS if own < attention else FAILS,
        "python train_free_eval.py --methods v2drop,fastv,random",
    )


def region_finding(vlm: VisionLanguageModel, shape: Shape, num_scenes: int = 40) -> Finding:
    """How often a patch of a thing has changed more than a patch of the background, at V2Drop's drop layers."""
    parts, holds = [], True
    for layer_idx in layers_at_depths(shape.num_layers):
        areas = [scene_area(vlm, f"claims {number}", layer_idx) for number in range(num_scenes)]
        bounds = mean_interval(areas)
        holds = holds and bounds[0] > 0.5
        parts.append(f"layer {layer_idx}: {sum(areas) / num_scenes:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]")
    return Finding(
        "variation is larger where the things are, at V2Drop's layers, before any drop",
        "pictures",
        "area under the ROC curve of things against background: " + ", ".join(parts),
        HOLDS if holds else FAILS,
        "notebooks/03_lazy_tokens.ipynb",
    )


def scene_area(vlm: VisionLanguageModel, seed: str, layer_idx: int) -> float:
    scene = scenes.any_scene(Dice(seed))
    request = Request(text=scenes.describe(scene).text, images=[scenes.draw_scene(scene)])
    point = drop_point(vlm.model.language_model, vlm.prepare([request]), layer_idx)
    labels = torch.from_numpy(patch_labels(scene)[:, 0])
    return area_under_roc(point.variations.detach().cpu(), labels != labels.max())


def area_under_roc(values: Tensor, positive: Tensor) -> float:
    """Probability that a positive one's value is above a negative one's, ties half; the mask must have both."""
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return float((mean_ranks(values)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def impact_findings(vlm: VisionLanguageModel, task: Task, num_prompts: int = 12, layer_idx: int = 1) -> Iterator[Finding]:
    """The theorem's use: that the ranking by variation is one by what dropping a token does."""
    requests = [sample.request for sample in task.samples(num_prompts)]
    points = [drop_point(vlm.model.language_model, vlm.prepare([request]), layer_idx) for request in requests]
    rows = {(row["score"], row["impact"]): row for row in rank_quality(points)}
    for impact, claim in (
        ("reversion", "a small update means that taking it back changes little"),
        ("removal", "a small update means that dropping the token changes little"),
    ):
        own = rows["variation l2", impact]
        low, high = own["spearman_interval"]
        yield Finding(
            claim,
            "Theorem 1 and Proposition 1",
            f"Spearman {own['spearman']:.2f} [{low:.2f}, {high:.2f}] over {num_prompts} prompts at layer {layer_idx}",
            HOLDS if low > AGREES else FAILS if high < AGREES else OPEN,
            "notebooks/05_variation_impact.ipynb",
        )


def flops_finding() -> Finding:
    """Three scored drop points: a difference, a square and a sum for each value, beside the whole prefill, by formula."""
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
    """Of the benchmark."""
    sizes = ["--vision-tokens", str(vision_tokens), "--tokens", f"{share * vision_tokens:g}", "--layers", str(LAYERS)]
    return ["--no-transformers", "--methods", "v2drop", *sizes, "--repeats", str(ROUNDS), "--decode-steps", "1"]


def measure_costs(vision_tokens: int, share: float) -> dict[str, dict[str, Any]]:
    """Rows of the benchmark for dense and V2Drop at a share of `vision_tokens`, by name without the budget."""
    arguments: argparse.Namespace = build_parser().parse_args(cost_options(vision_tokens, share))
    return {row["prefill"].partition("@")[0]: row for row in run_benchmark(arguments)["prefill"]}


def cost_findings(long: int = 1728, share: float = 0.4) -> Iterator[Finding]:
    """Time of the drop points, peak memory, and a prompt with four times as many vision tokens."""
    command = " ".join(["python -m nanovlm_v2drop.benchmark", *cost_options(long, share)])
    short_rows, long_rows = measure_costs(PAPER_VISION_TOKENS, share), measure_costs(long, share)
    points = [rows["v2drop"]["drop_points_percent"] / (PAPER_LAYERS / LAYERS) for rows in (short_rows, long_rows)]
    yield Finding(
        "dropping costs under 1 % of the time",
        "latency as Random's within 2 %",
        f"drop points {points[0]:.3f} % of a prefill of 640 tokens, {points[1]:.3f} % of {long + 64}, taken to 32 layers",
        HOLDS if max(points) < 1 else FAILS,
        command,
    )
    dense, own = long_rows["dense"]["peak_memory_mb"], long_rows["v2drop"]["peak_memory_mb"]
    yield Finding(
        "peak memory is not above dense",
        "-3.3 %",
        f"{own:.0f} MB against {dense:.0f} MB, weights included, {LAYERS} layers, {long} vision tokens",
        HOLDS if own <= 1.01 * dense else FAILS,
        command,
    )
    gains = [round_speedups(rows) for rows in (short_rows, long_rows)]
    faster, sizes = [f"{median(own):.2f} [{min(own):.2f}, {max(own):.2f}]" for own in gains], (PAPER_VISION_TOKENS, long)
    yield Finding(
        "long inputs gain more",
        "1.46 times on images, 3.9 times on video",
        f"prefill {faster[0]} times faster at {sizes[0]} vision tokens, {faster[1]} at {sizes[1]}, same shares; in brackets "
        f"the slowest and the fastest of {ROUNDS} rounds",
        HOLDS if min(gains[1]) > max(gains[0]) else FAILS if max(gains[1]) < min(gains[0]) else OPEN,
        command,
    )


def round_speedups(rows: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """V2Drop's speed-up over dense in each round of the benchmark."""
    rounds = zip(rows["dense"]["rounds_ms"], rows["v2drop"]["rounds_ms"], strict=True)
    return [dense / own for dense, own in rounds]
