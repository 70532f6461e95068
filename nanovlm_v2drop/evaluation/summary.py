"""The rows of a table, from the answers of all plans: scores, cost, times, and where in a picture methods keep tokens."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import torch

from ..dropping import V2Drop
from ..dropping.budget import Shape
from ..loading.zoo import VisionLanguageModel
from ..models.attention import decode_backend
from ..tasks import Task
from .bootstrap import Resampled, difference_fields, resample, score_fields
from .methods import DENSE
from .plans import Plan, asked_mean, is_met
from .position_bias import position_bias
from .records import Record

TIME_FIELDS = ("vision_ms", "prefill_ms", "decode_ms", "decode_ms_per_token", "total_ms", "items_per_s", "peak_memory_mb")


def summarise(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    records: Sequence[Record],
    resampled: Mapping[str, Resampled] | None = None,
) -> list[dict[str, Any]]:
    """One row for each method and budget: scores with 95 % bootstrap intervals, cost by the one accounting, measured times.

    The seeds of a method share a row, whose score is their mean. `relative_score` is the percentage of the dense score; None
    unless dense answered the same samples. `difference` is the score minus that of V2Drop at the same budget. `resampled` is
    what `resample_rows` gives, where that is known.
    """
    rows, answers = answered_rows(task, plans, records)
    resampled = resample_rows(task, plans, records) if resampled is None else resampled
    dense, v2drop = resampled.get(DENSE), {row: beside(own[0], rows, resampled) for row, own in rows.items()}
    scores = {row: score_fields(own, dense) | difference_fields(own, v2drop[row]) for row, own in resampled.items()}
    return [summary_row(vlm, task, own, [answers[plan.key] for plan in own], scores[row]) for row, own in rows.items()]


def answered_rows(
    task: Task, plans: Sequence[Plan], records: Sequence[Record]
) -> tuple[dict[str, list[Plan]], dict[str, list[dict[str, Any]]]]:
    """The plans that have answers, by row, and the answers by plan."""
    answers = defaultdict[str, list[dict[str, Any]]](list)
    for record in records:
        if record.task == task.name:
            answers[record.plan].append(vars(record))
    rows: dict[str, list[Plan]] = {}
    for plan in plans:
        if plan.key in answers:
            rows.setdefault(plan.row, []).append(plan)
    return rows, answers


def resample_rows(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> dict[str, Resampled]:
    """The resampled score of each row that has answers, over all its seeds."""
    rows, answers = answered_rows(task, plans, records)
    return {row: resample(task, [answers[plan.key] for plan in own]) for row, own in rows.items()}


def beside(plan: Plan, rows: Mapping[str, Sequence[Plan]], resampled: Mapping[str, Resampled]) -> Resampled | None:
    """V2Drop's answers at the budget of this plan."""
    for row, (other, *_) in rows.items():
        if plan.budget is not None and other.label == V2Drop.name and other.budget == plan.budget:
            return resampled[row]
    return None


def summary_row(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], by_seed: list[list[dict[str, Any]]], scores: dict[str, Any]
) -> dict[str, Any]:
    plan, records = plans[0], [record for records in by_seed for record in records]
    metrics = [task.summary(answers) for answers in by_seed]
    shapes = [prompt_shape_of(record, vlm.config.text_config.num_hidden_layers) for record in records]
    return {
        "method": plan.method,
        "label": plan.label,
        "acts": "" if plan.dropper is None else plan.dropper.acts,
        "task": task.name,
        "schedule": {str(layer): value for layer, value in plan.schedule.items()},
        **budget_fields(plan, shapes),
        "note": plan.note_on(shapes),
        **scores,
        "metrics": {name: round(mean(values[name] for values in metrics), 4) for name in metrics[0]},
        "samples": len(by_seed[0]),
        "seed": plan.seed,
        "seeds": [plan.seed for plan in plans],
        "plans": [plan.key for plan in plans],
        "scores_by_seed": [round(values["score"], 3) for values in metrics],
        **cost_fields(vlm, plan, records, shapes),
        **time_fields(records),
        "paper": dict(plan.paper),
        "reported": dict(task.reported.get(vlm.name, {})) if plan.method == DENSE else {},
    }


def prompt_shape_of(record: Mapping[str, Any], num_layers: int) -> Shape:
    """The shape of the prompt that a record answers."""
    frames = max((frames for frames, _, _ in record["vision_grids"]), default=1)
    return Shape(record["vision_tokens"], num_layers, frames)


def tokens_entering(plan: Plan, shape: Shape) -> list[int]:
    """Vision tokens that enter each layer, by the prompt's own schedule."""
    return plan.schedule_for(shape).vision_tokens_per_layer(shape.num_vision_tokens, shape.num_layers)


def asked_over(plan: Plan, counts: Sequence[int]) -> float | None:
    """The mean number of tokens that was asked for, over prompts with these numbers of vision tokens."""
    if plan.budget is None or plan.budget.tokens is not None:
        return None if plan.budget is None else plan.budget.tokens
    return round(mean(plan.budget.mean_tokens(count) for count in counts), 2)


def budget_fields(plan: Plan, shapes: Sequence[Shape]) -> dict[str, Any]:
    """What was asked for: mean tokens over all samples, and the share where a share was given.

    `equal_budget`: whether the samples' mean meets this by `is_met`; None where no budget was given. A prompt
    that has fewer vision tokens than were asked for meets it with all of them.
    """
    if plan.budget is None:
        return {"asked_tokens": None, "asked_share": None, "equal_budget": None}
    found = mean(mean(tokens_entering(plan, shape)) for shape in shapes)
    return {
        "asked_tokens": asked_over(plan, [shape.num_vision_tokens for shape in shapes]),
        "asked_share": plan.budget.retain,
        "equal_budget": is_met(found, asked_mean(plan.budget, shapes)),
    }


def cost_fields(
    vlm: VisionLanguageModel, plan: Plan, records: list[dict[str, Any]], shapes: Sequence[Shape]
) -> dict[str, float]:
    """Means over the samples: what a prompt costs by its schedule and the one accounting, and the cache that was filled."""
    config = vlm.config.text_config
    flops = [
        plan.schedule_for(shape).prefill_flops(config, record["text_tokens"], shape.num_vision_tokens)
        for record, shape in zip(records, shapes, strict=True)
    ]
    entering = [tokens_entering(plan, shape) for shape in shapes]
    return {
        "vision_tokens": round(mean(shape.num_vision_tokens for shape in shapes), 2),
        "mean_vision_tokens": round(mean(mean(counts) for counts in entering), 2),
        "final_vision_tokens": round(mean(counts[-1] for counts in entering), 2),
        "prefill_tflops": round(mean(flops) / 1e12, 6),
        "kv_cache_mb": round(mean(record["kv_cache_bytes"] for record in records) / 1e6, 4),
    }


def time_fields(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians and means over the samples whose times were taken, each alone; None where none was.

    What a sample takes in all (`total_ms`) includes reading it and the vision tower.
    """
    timed = [record for record in records if record["prefill_ms"] is not None]
    if not timed:
        return {"timed": 0, **dict.fromkeys(TIME_FIELDS)}
    steps, decode_ms = (sum(record[name] for record in timed) for name in ("decode_steps", "decode_ms"))
    total_ms = sum(record["vision_ms"] + record["prefill_ms"] + record["decode_ms"] for record in timed)
    return {
        "timed": len({record["sample_id"] for record in timed}),
        **{name: round(median(record[name] for record in timed), 3) for name in ("vision_ms", "prefill_ms", "decode_ms")},
        "decode_ms_per_token": round(decode_ms / steps, 3) if steps else None,
        "total_ms": round(total_ms / len(timed), 3),
        "items_per_s": round(1000 * len(timed) / total_ms, 3),
        "peak_memory_mb": round(max(record["peak_memory_mb"] for record in timed), 1),
    }


def summarise_bias(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> list[dict[str, Any]]:
    """What `position_bias` says of every method that drops, over all its seeds."""
    row_of, first_stages = {plan.key: plan.row for plan in plans}, defaultdict[str, list[tuple[int, list[int]]]](list)
    own = [record for record in records if record.task == task.name and record.plan in row_of]
    counts = [record.vision_tokens for record in own]
    dropped = [record for record in own if record.kept]
    for record in dropped:
        first_stages[row_of[record.plan]].append((record.vision_tokens, record.kept[0]))
    grid_size = common_grid_size([grid for record in dropped for grid in record.vision_grids])
    return [
        {
            "task": task.name,
            "method": plan.method,
            "label": plan.label,
            "asked_tokens": asked_over(plan, counts),
            "layer": next(iter(plan.schedule), None),
            **bias,
        }
        for plan in {plan.row: plan for plan in plans}.values()
        if (bias := position_bias(first_stages[plan.row], grid_size))
    ]


def common_grid_size(grids: Sequence[Sequence[int]]) -> int:
    """The side of all pictures and frames, newlines aside, if they are squares of one size; else 1, which ignores places."""
    shapes = {(rows, columns) for _, rows, columns in grids if rows * columns > 1}
    rows, columns = shapes.pop() if len(shapes) == 1 else (1, 1)
    return rows if rows == columns else 1


def model_line(vlm: VisionLanguageModel) -> str:
    """What runs, for the first line of a run: also why `auto` chose this dtype."""
    about = {**run_summary(vlm, []), "dtype": vlm.precision}
    named = ("model", "device", "dtype", "attention", "decode_attention", "template")
    return ", ".join(f"{name} {about[name]}" for name in named)


def run_summary(vlm: VisionLanguageModel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that ends a run: what ran, and the rows."""
    backend, kv_cache_dtype = vlm.model.language_model.attention, vlm.precision.kv_cache_dtype
    return {
        "model": vlm.name,
        "device": str(vlm.device),
        "dtype": vlm.precision.name,
        "kv_cache_dtype": kv_cache_dtype,
        "attention": backend,
        "decode_attention": "int8 cache" if kv_cache_dtype == "int8" else decode_backend(backend),
        "template": vlm.template,
        "torch": torch.__version__,
        "results": rows,
    }
