"""From options to the plans that answer every question, and to the folder of the results."""

import argparse
import time
from pathlib import Path

from ..dropping.budget import Budget, Shape
from ..evaluation.plans import Plan, equal_budget_plans, official_plans
from ..report.page import RESULTS
from ..research.ablations import ablation_plans
from .checks import check_output

RETAIN = (1 / 3, 2 / 9, 1 / 9)  # 192, 128 and 64 of 576 tokens, the paper's three budgets
RETAIN_OF_VIDEO = (0.25, 0.15)  # the largest and the smallest of the paper's for LLaVA-OneVision on video


def plans_for(shape: Shape, arguments: argparse.Namespace) -> list[Plan]:
    """What answers every question: methods at budgets, at published settings, or the rows of ablations."""
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    if arguments.ablation:
        return ablation_plans(arguments.ablation, shape)
    if arguments.accounting == "official":
        return official_plans(arguments.methods, shape, seeds)
    by_default = not (arguments.tokens or arguments.retain)
    return equal_budget_plans(arguments.methods, budgets_for(shape, arguments), shape, seeds, floors=by_default)


def budgets_for(shape: Shape, arguments: argparse.Namespace) -> list[Budget]:
    """The budgets that were asked for, or the paper's for a picture or a video."""
    shares = arguments.retain or (RETAIN_OF_VIDEO if shape.frames > 1 else RETAIN)
    return [Budget(tokens=count) for count in arguments.tokens or ()] or [Budget(retain=share) for share in shares]


def output_folder(arguments: argparse.Namespace) -> Path:
    """--output or its default, which is not made yet; raises as `check_output`."""
    name = Path(arguments.model).name
    folder = arguments.output or RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_output(folder)
    return folder
