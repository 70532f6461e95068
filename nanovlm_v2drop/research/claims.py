"""The paper's claims that can be tested here, each with what was measured and the verdict that follows.

    python train_free_eval.py --claims

Scores are measured with the demo, and with the video demo for claims about video. All rows answer the same questions, and
differences are paired by question. findings.py states the rules of the verdicts, costs.py measures time and memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random as Dice
from typing import Any

import torch
from torch import Tensor

from ..demo import scenes
from ..demo.data import VISION, patch_labels
from ..dropping.budget import Budget, Shape
from ..dropping.schedule import layers_at_depths
from ..evaluation.bootstrap import Resampled, difference, resample
from ..evaluation.evaluate import evaluate
from ..evaluation.plans import Plan, equal_budget_plans, prompt_shape
from ..evaluation.records import Record, read_records
from ..evaluation.summary import summarise_bias
from ..loading.specs import TEXT_MODEL, WEIGHTS_FOLDER
from ..loading.text_model import load_decoder
from ..loading.zoo import VisionLanguageModel, load
from ..processing.prompts import Request
from ..tasks import Task
from ..tasks.demo_video import DemoVideo
from .ablations import LAYER_NUMBERS, ablation_plans, share_of_paper
from .costs import cost_findings, flops_finding
from .findings import FAILS, HOLDS, NEEDS, NEEDS_GPU, NEEDS_TEXT, Finding, agrees, hardly_matters, is_better, shown
from .text import TextRun, summarise_text
from .text import answers as text_answers
from .theory import drop_point, mean_interval, mean_ranks, rank_quality

CLIPS, SHARE_OF_VIDEO = 160, 0.25
AT_7B = "python train_free_eval.py --model llava-1.5-7b --ablation metric,layers,steps"
OFFICIAL_7B = "python train_free_eval.py --model llava-1.5-7b --methods dense,v2drop --accounting official"
VIDEO_7B = (
    "python -m nanovlm_v2drop.benchmark --model llava-onevision-qwen2-7b-ov --frames 32 --retain 0.25 --layers 28 --device cuda"
)
TEXT_WEIGHTS, TEXT_QUESTIONS = WEIGHTS_FOLDER / TEXT_MODEL.rpartition("/")[2], 24
ON_TEXT = Finding(
    "the principle carries over to the tokens of a text",
    "stated, not tested",
    f"-, {TEXT_WEIGHTS.name} is not in {WEIGHTS_FOLDER.name}/",
    NEEDS_TEXT,
    "python train_free_eval.py --text dense,none,random,v2drop --texts retrieval",
)
UNTESTED = (
    Finding("94.0 % of the score is kept at 128 of 576 tokens", "mean of six benchmarks", "-", NEEDS, OFFICIAL_7B),
    Finding("31.5 % less generation time at 128 tokens", "MMBench, A100", "-", NEEDS, OFFICIAL_7B + " --device cuda"),
    Finding("74.2 % less generation time on video at 25 %", "MVBench, A100", "-", NEEDS_GPU, VIDEO_7B),
)


def find_claims(vlm: VisionLanguageModel, task: Task, output: Path, limit: int | None = None) -> Iterator[Finding]:
    """Measure all claims and yield each finding as soon as it is decided; takes some minutes.

    The answers are written to `output`, as in any run. Raises ValueError for a model that is not the demo.
    """
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
    yield text_finding(vlm)
    yield from UNTESTED


def text_finding(vlm: VisionLanguageModel, folder: Path = TEXT_WEIGHTS, limit: int = TEXT_QUESTIONS) -> Finding:
    """What V2Drop leaves of the answers to questions about texts, on the device of `vlm`, where the weights are here.

    Holds where the whole interval of the difference from dense is within HARDLY points.
    """
    if not (folder / "config.json").is_file():
        return ON_TEXT
    run = TextRun(("dense", "random", "v2drop"), 1 / 3, limit, batch_size=8)
    model = load_decoder(folder, device=vlm.device)
    answered = [answer for batch in text_answers(model, run, "retrieval") for answer in batch]
    rows = {row["method"]: row for row in summarise_text(answered)}
    own, chance = (rows[name]["exact_difference"] for name in ("v2drop", "random"))
    bounds = rows["v2drop"]["exact_difference_interval"]
    measured = (
        f"{shown(own, bounds)} points at 1/3 of the tokens of {limit} texts, Random {chance:+.1f}; "
        f"dense {rows['dense']['exact']:.1f} % ({model.name})"
    )
    return replace(ON_TEXT, measured=measured, verdict=hardly_matters([bounds]))


def answers(vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], output: Path, limit: int | None) -> list[Record]:
    """Answers of all plans to the task's samples; they are written to `output`, as in any run."""
    answered = [sample.sample_id for sample in evaluate(vlm, task, plans, output, limit=limit, batch_size=8)]
    return read_records(output, {task.name: answered})


def check_shape(name: str, shape: Shape) -> None:
    """Raise ValueError unless a picture has as many vision tokens as the demo's scenes have labelled patches."""
    if shape.num_vision_tokens != VISION.num_patches:
        raise ValueError(
            f"the demo's claims need pictures of {VISION.num_patches} labelled patches, not those of {name}: leave --model "
            "out, or rename the model's folder, which tests the claims on benchmarks"
        )


def scores_by_label(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> dict[str, Resampled]:
    """The resampled score of every row, over all its seeds."""
    by_label: dict[str, list[list[dict[str, Any]]]] = {}
    for plan in plans:
        by_label.setdefault(plan.label, []).append([vars(record) for record in records if record.plan == plan.key])
    return {label: resample(task, answers) for label, answers in by_label.items()}


def ledger_plans(shape: Shape, seeds: Sequence[int] = range(3)) -> list[Plan]:
    """The ablations, and V2Drop beside two other methods at the paper's share of 128 of 576 tokens."""
    others = equal_budget_plans(["v2drop", "random", "fastv"], [share_of_paper(128)], shape, seeds)
    return [*ablation_plans(["metric", "layers", "steps"], shape), *others]


def score_findings(scores: Mapping[str, Resampled]) -> Iterator[Finding]:
    """Claims about scores, from the resampled scores of `ledger_plans` by label."""
    yield steps_finding(scores)
    for method, paper in (("random", "MMBench 61.8 against 59.1"), ("fastv", "MMBench 61.8 against 56.1")):
        gain, bounds = difference(scores["v2drop"], scores[method])
        measured = f"{shown(gain, bounds)} points at 2/9 of the tokens, the paper's 128 of 576"
        command = f"python train_free_eval.py --methods dense,v2drop,{method}"
        yield Finding(f"V2Drop beats {method} dropping", paper, measured, is_better(bounds), command)
    metrics = {name: difference(scores[f"v2drop {name}"], scores["v2drop l2"]) for name in ("l1", "cosine")}
    yield choice_finding("the metric hardly matters", "MME l2 1712, l1 1698, cosine 1718", metrics, "l2")
    names = ["/".join(map(str, layers)) for layers in LAYER_NUMBERS]
    chosen = scores["v2drop progressive"]
    layers = {name: difference(scores[f"v2drop {name}"], chosen) for name in names if f"v2drop {name}" in scores}
    yield choice_finding("the choice of layers hardly matters", "96.0 to 97.6 % of dense", layers, "3/17/22")


def steps_finding(scores: Mapping[str, Resampled]) -> Finding:
    gain, bounds = difference(scores["v2drop progressive"], scores["v2drop one-shot"])
    return Finding(
        "dropping in stages beats dropping at once",
        "POPE 85.1 against 77.1, MME 1826 against 1717",
        f"{shown(gain, bounds)} points at the same mean",
        is_better(bounds),
        AT_7B,
    )


def choice_finding(claim: str, paper: str, differences: Mapping[str, tuple[float, list[float]]], chosen: str) -> Finding:
    """Whether a choice hardly matters, from the (difference, interval) of each alternative to the paper's own."""
    measured = ", ".join(f"{name} {shown(*pair)}" for name, pair in differences.items()) + f" points beside {chosen}"
    return Finding(claim, paper, measured, hardly_matters([bounds for _, bounds in differences.values()]), AT_7B)


def video_findings(vlm: VisionLanguageModel, output: Path, limit: int) -> Iterator[Finding]:
    """V2Drop beside two other methods on clips, with the video demo on the device of `vlm`; answers go to `output`."""
    video, task = load("demo-video", device=vlm.device, dtype=vlm.precision.name), DemoVideo()
    shape = prompt_shape(video, task.first_sample().request)
    plans = equal_budget_plans(["v2drop", "random", "dycoke"], [Budget(retain=SHARE_OF_VIDEO)], shape, seeds=range(3))
    yield from video_score_findings(scores_by_label(task, plans, answers(video, task, plans, output, limit)))


def video_score_findings(scores: Mapping[str, Resampled]) -> Iterator[Finding]:
    """Claims about scores on video, from the resampled scores by label."""
    for method, paper in (("random", "MVBench 56.4 against 54.6"), ("dycoke", "MVBench 56.4 against 49.5")):
        gain, bounds = difference(scores["v2drop"], scores[method])
        measured = f"{shown(gain, bounds)} points at {100 * SHARE_OF_VIDEO:g} % of the tokens"
        command = f"python train_free_eval.py --model demo-video --methods dense,v2drop,{method}"
        yield Finding(f"on video V2Drop beats {method} dropping", paper, measured, is_better(bounds), command)


def bias_finding(bits: Mapping[str, float]) -> Finding:
    """The claim about position bias, from the bits of each row by label."""
    own, chance, attention = (bits[label] for label in ("v2drop", "random", "fastv"))
    return Finding(
        "variation has less position bias than attention",
        "a figure: none, and much",
        f"V2Drop {own:.3f} bits, FastV {attention:.3f}, Random {chance:.3f}, by tenths of the sequence",
        HOLDS if own < attention else FAILS,
        "python train_free_eval.py --methods v2drop,fastv,random",
    )


def region_finding(vlm: VisionLanguageModel, shape: Shape, num_scenes: int = 40) -> Finding:
    """How often a patch of a thing changes more than a patch of the background, at V2Drop's drop layers.

    Holds where the interval of the area under the ROC curve is above 0.5 at every layer.
    """
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
    """The area under the ROC curve of things against background, in one scene."""
    scene = scenes.any_scene(Dice(seed))
    request = Request(text=scenes.describe(scene).text, images=[scenes.draw_scene(scene)])
    point = drop_point(vlm.model.language_model, vlm.prepare([request]), layer_idx)
    labels = torch.from_numpy(patch_labels(scene)[:, 0])
    return area_under_roc(point.variations.detach().cpu(), labels != labels.max())


def area_under_roc(values: Tensor, positive: Tensor) -> float:
    """Probability that the value (n,) of a positive item is above that of a negative one; ties count half.

    The mask `positive` (n,) must have items of both kinds.
    """
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return float((mean_ranks(values)[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def impact_findings(vlm: VisionLanguageModel, task: Task, num_prompts: int = 12, layer_idx: int = 1) -> Iterator[Finding]:
    """Whether the ranking by variation agrees with the rankings by what reverting and removing a token do."""
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
            agrees((low, high)),
            "notebooks/05_variation_impact.ipynb",
        )
