"""From options to a model, and to the plans that answer every question."""

import argparse
import time
from pathlib import Path

from ..dropping.budget import Budget, Shape
from ..evaluation.plans import Plan, equal_budget_plans, official_plans
from ..loading.zoo import VisionLanguageModel, load
from ..processing.images import DEFAULT_ASPECT_RATIO
from ..processing.video import SAMPLINGS, FrameSampling
from ..report.page import RESULTS
from ..research.ablations import ablation_plans

RETAIN = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576 tokens, the paper's three budgets
RETAIN_OF_VIDEO = (0.25, 0.15)  # the largest and the smallest of the paper's for LLaVA-OneVision on video


def load_model(arguments: argparse.Namespace) -> VisionLanguageModel:
    vlm = load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        image_aspect_ratio=arguments.image_aspect_ratio or DEFAULT_ASPECT_RATIO,
        template=arguments.template,
        attention=arguments.attention,
        weights=arguments.weights,
        max_pixels=arguments.max_pixels,
        sampling=sampling_of(arguments),
        tensor_parallel=arguments.tensor_parallel,
    )
    if arguments.compile:
        vlm.model.language_model.compile_layers()
    return vlm


def sampling_of(arguments: argparse.Namespace) -> FrameSampling | None:
    """How frames are chosen from a video file; None is the model's own way."""
    name, frames = arguments.sampling, arguments.frames
    if name is None and frames is None:
        return None
    limit = {} if frames is None else {"max_frames" if name in ("fps", "qwen3-vl", "smolvlm") else "num_frames": frames}
    return SAMPLINGS[name or "uniform"](**limit)


def plans_for(shape: Shape, arguments: argparse.Namespace) -> list[Plan]:
    """What answers every question: methods at budgets, at published settings, or the rows of ablations."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    if arguments.ablation:
        return ablation_plans(arguments.ablation, shape)
    if arguments.accounting == "official":
        return official_plans(arguments.methods, shape, seeds)
    return equal_budget_plans(arguments.methods, budgets_for(shape, arguments), shape, seeds)


def budgets_for(shape: Shape, arguments: argparse.Namespace) -> list[Budget]:
    """The budgets that were asked for, or the paper's for a picture or a video."""
    shares = arguments.retain or (RETAIN_OF_VIDEO if shape.frames > 1 else RETAIN)
    return [Budget(tokens=count) for count in arguments.tokens or ()] or [Budget(retain=share) for share in shares]


def output_folder(arguments: argparse.Namespace) -> Path:
    name = Path(arguments.model).name
    return arguments.output or RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
