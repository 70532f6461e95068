"""The paper's ablations for this model, with the paper's numbers (arXiv 2509.01552, appendix; LLaVA-1.5-7B)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ..dropping import DROPPERS, PUBLISHED_SCHEDULES, DropSchedule, V2Drop
from ..dropping.budget import Budget, Shape
from ..dropping.schedule import PAPER_LAYERS, PAPER_VISION_TOKENS, layers_at_depths
from ..dropping.v2drop import METRICS
from ..evaluation.paper import TABLES, named_numbers
from ..evaluation.plans import DENSE, Plan, mapped

METRIC_NUMBERS = {
    "l2": {"MME": 1712, "GQA": 56.3, "MMB": 61.8, "SQA": 68.8},
    "l1": {"MME": 1698, "GQA": 56.1, "MMB": 60.9, "SQA": 68.7},
    "cosine": {"MME": 1718, "GQA": 55.2, "MMB": 61.8, "SQA": 69.2},
}
LAYER_NUMBERS = {
    (4, 14, 30): {"GQA": 57.8, "SQA": 68.9, "POPE": 86.3, "MME": 1753, "MMB": 63.2, "TextVQA": 53.1, "average %": 96.0},
    (3, 14, 29): {"GQA": 58.6, "SQA": 69.1, "POPE": 85.0, "MME": 1826, "MMB": 63.4, "TextVQA": 54.0, "average %": 97.0},
    (3, 15, 27): {"GQA": 58.5, "SQA": 69.3, "POPE": 85.1, "MME": 1847, "MMB": 63.7, "TextVQA": 54.8, "average %": 97.5},
    (3, 16, 24): {"GQA": 58.8, "SQA": 69.1, "POPE": 85.0, "MME": 1813, "MMB": 63.5, "TextVQA": 55.2, "average %": 97.3},
    (3, 17, 22): {"GQA": 58.5, "SQA": 69.3, "POPE": 85.1, "MME": 1826, "MMB": 63.7, "TextVQA": 55.6, "average %": 97.6},
    (2, 16, 21): {"GQA": 57.9, "SQA": 69.5, "POPE": 83.9, "MME": 1759, "MMB": 62.8, "TextVQA": 54.8, "average %": 96.2},
}
STEPS_NUMBERS = {
    "progressive": {"MME": 1826, "POPE": 85.1, "MMB": 63.7, "GQA": 58.5, "TextVQA": 55.9},
    "one-shot": {"MME": 1717, "POPE": 77.1, "MMB": 60.6, "GQA": 57.1, "TextVQA": 55.2},
}
SCHEDULE_NUMBERS = {
    f"paper-{row.retain * PAPER_VISION_TOKENS:.0f}": named_numbers(TABLES[0], row)
    for row in TABLES[0].rows
    if row.name == V2Drop.name
}
RANKED, RANKED_SHARE = ("v2drop", "v2drop-plus", "random"), 1 / 12  # our own question: the paper has no numbers for it


def share_of_paper(tokens: float) -> Budget:
    """The paper's budget as the same share of a prompt's vision tokens."""
    return Budget(retain=tokens / PAPER_VISION_TOKENS)


def metric_plans(shape: Shape) -> list[Plan]:
    """V2Drop with each metric, at the share of 128 of 576 tokens."""
    budget = share_of_paper(128)
    solve = partial(budget.schedule, V2Drop)
    return [
        Plan(f"v2drop {metric}", partial(V2Drop, metric=metric), solve, shape, budget, paper=METRIC_NUMBERS[metric])
        for metric in METRICS
    ]


def layer_plans(shape: Shape) -> list[Plan]:
    """V2Drop with the paper's six choices of layers, at the share of 192 of 576 tokens.

    Choices that become the same layers in this model share one row, whose note says so.
    """
    budget, plans = share_of_paper(192), dict[tuple[int, ...], Plan]()
    for layers, paper in LAYER_NUMBERS.items():
        own = layers_at_depths(shape.num_layers, [layer / PAPER_LAYERS for layer in layers])
        name = "/".join(map(str, layers))
        if own in plans:
            plans[own] = replace(plans[own], note=f"{plans[own].note}; {name} falls on the same layers here")
            continue
        note = f"drops at layers {'/'.join(map(str, own))} here"
        solve = partial(solved_at, budget, own, V2Drop.leanest)
        plans[own] = Plan(f"v2drop {name}", V2Drop, solve, shape, budget, note=note, paper=paper)
    return list(plans.values())


def solved_at(budget: Budget, layers: Sequence[int], leanest: Sequence[float], shape: Shape) -> DropSchedule:
    """The schedule that meets a budget in a prompt with drop points at these layers; raises as for_mean_tokens."""
    asked = budget.mean_tokens(shape.num_vision_tokens)
    return DropSchedule.for_mean_tokens(asked, shape.num_vision_tokens, shape.num_layers, layers=layers, leanest=leanest)


def step_plans(shape: Shape) -> list[Plan]:
    """V2Drop in three steps, and in one step at the first of these layers, at the same mean: 192 of 576 tokens."""
    budget, layers = share_of_paper(192), layers_at_depths(shape.num_layers)
    choices = {"progressive": (layers, V2Drop.leanest), "one-shot": (layers[:1], (0.0,))}
    return [
        Plan(f"v2drop {name}", V2Drop, partial(solved_at, budget, *choice), shape, budget, paper=STEPS_NUMBERS[name])
        for name, choice in choices.items()
    ]


def schedule_plans(shape: Shape) -> list[Plan]:
    """V2Drop with the paper's three schedules, mapped to this model."""
    return [
        Plan(f"v2drop {name}", V2Drop, partial(mapped, PUBLISHED_SCHEDULES[name], PAPER_LAYERS), shape, paper=paper)
        for name, paper in SCHEDULE_NUMBERS.items()
    ]


def ranking_plans(shape: Shape) -> list[Plan]:
    """At each layer one drop to a twelfth of the vision tokens, ranked by V2Drop, V2Drop-plus and at random."""
    return [
        Plan(f"{name} at layer {layer}", DROPPERS[name], partial(one_drop, layer), shape)
        for layer in range(1, shape.num_layers)
        for name in RANKED
    ]


def one_drop(layer: int, shape: Shape) -> DropSchedule:
    return DropSchedule({layer: RANKED_SHARE})


ABLATIONS: Mapping[str, Callable[[Shape], list[Plan]]] = {
    "metric": metric_plans,
    "layers": layer_plans,
    "steps": step_plans,
    "schedules": schedule_plans,
    "ranking": ranking_plans,
}


def ablation_plans(names: Sequence[str], shape: Shape) -> list[Plan]:
    """Plans of dense and of the named ablations; raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise ValueError(f"unknown ablation {unknown[0]!r}; choose from: {', '.join(ABLATIONS)}")
    return [Plan(DENSE), *(plan for name in dict.fromkeys(names) for plan in ABLATIONS[name](shape))]
