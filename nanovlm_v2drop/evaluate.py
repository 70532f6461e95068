"""Run methods side by side over benchmarks: every method answers a sample before the next sample is looked at.

So all methods see the same pictures through one run of the vision tower, and a machine whose speed drifts drifts for all of
them. Every answer is written as one JSON line as soon as it is there; a run that was interrupted goes on from these lines.
"""

import json
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from .attention import decode_backend
from .config import read_json_object
from .dropping import DROPPERS, PUBLISHED_SCHEDULES, DropSchedule, Random, TokenDropper
from .inference import decode_tokens, decode_until, prefill
from .prompts import Request
from .tasks import Sample, Task
from .vlm import PackedInputs
from .zoo import VisionLanguageModel

DENSE = "dense"
BOOTSTRAP_DRAWS = 500
LLAVA_7B_BUDGETS = {192: "paper-192", 128: "paper-128", 64: "paper-64"}  # at 576 vision tokens and 32 layers


@dataclass(frozen=True)
class Plan:
    """One row of the table: a method at a budget. `asked_tokens`: the mean that was asked for; None for dense."""

    method: str
    schedule: DropSchedule
    asked_tokens: float | None
    dropper: TokenDropper | None
    seed: int

    @property
    def key(self) -> str:
        """Names the row in results files: method, budget and, where it draws, the seed."""
        if self.asked_tokens is None:
            return self.method
        return f"{self.method} {self.asked_tokens:g}" + (f" seed {self.seed}" if isinstance(self.dropper, Random) else "")


def make_plans(
    methods: Sequence[str], budgets: Sequence[float], num_vision_tokens: int, num_layers: int, seed: int
) -> list[Plan]:
    """Dense once, every other method at every budget (mean vision tokens a layer).

    Raises ValueError for an unknown method, or a budget that no schedule reaches.
    """
    unknown = [method for method in methods if method != DENSE and method not in DROPPERS]
    if unknown:
        raise ValueError(f"unknown method {unknown[0]!r}; choose from: {', '.join([DENSE, *DROPPERS])}")
    plans = []
    for budget in dict.fromkeys([None, *budgets]):
        for method in dict.fromkeys(methods):
            if (method == DENSE) == (budget is None):
                plans.append(make_plan(method, budget, num_vision_tokens, num_layers, seed))
    return plans


def make_plan(method: str, budget: float | None, num_vision_tokens: int, num_layers: int, seed: int) -> Plan:
    if budget is None:
        return Plan(method, DropSchedule({}), None, None, seed)
    schedule = budget_schedule(budget, num_vision_tokens, num_layers)
    dropper = Random(schedule, seed) if method == Random.name else DROPPERS[method](schedule)
    return Plan(method, schedule, budget, dropper, seed)


def budget_schedule(budget: float, num_vision_tokens: int, num_layers: int) -> DropSchedule:
    """The paper's own schedule where it gives one for this model and budget, otherwise the solver's."""
    if (num_vision_tokens, num_layers) == (576, 32) and budget in LLAVA_7B_BUDGETS:
        return PUBLISHED_SCHEDULES[LLAVA_7B_BUDGETS[int(budget)]]
    return DropSchedule.for_mean_tokens(budget, num_vision_tokens, num_layers)


@dataclass
class Record:
    """One answer of one plan to one sample: a line of samples.jsonl. Times of a batch are shared out evenly."""

    task: str
    plan: str
    sample_id: str
    kind: str
    group: str
    question: str
    answer: str
    text: str
    correct: float
    text_tokens: int
    vision_tokens: int
    vision_ms: float
    prefill_ms: float
    decode_ms: float
    decode_steps: int
    kv_cache_bytes: int
    kept: list[list[int]] = field(default_factory=list)


def evaluate(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    resume: bool = False,
) -> Iterator[Sample]:
    """Answer the task's samples with every plan, appending to `output`/samples.jsonl; yields each finished sample.

    With `resume`, answers that are already in the file are not made again. Raises ValueError where the file holds answers
    to this task and `resume` is not set: nothing is overwritten.
    """
    path = output / "samples.jsonl"
    done = {(record.plan, record.sample_id) for record in read_records(output) if record.task == task.name}
    if done and not resume:
        raise ValueError(f"{path} already holds answers to {task.name}; go on with --resume, or choose another --output")
    check_same_settings(vlm, output)
    samples = task.samples(task.default_samples if limit is None else limit)
    warm = False
    while batch := list(islice(samples, batch_size)):
        prepared: dict[tuple[str, ...], Prepared] = {}  # one for all plans, unless an interruption left them uneven
        for plan in plans:
            missing = [sample for sample in batch if (plan.key, sample.sample_id) not in done]
            if not missing:
                continue
            ids = tuple(sample.sample_id for sample in missing)
            if not warm:  # the first run pays for page faults and kernel selection: not counted
                warm = bool(answer_batch(vlm, task, plan, prepare_batch(vlm, missing)))
            prepared[ids] = prepared.get(ids) or prepare_batch(vlm, missing)
            append_records(path, answer_batch(vlm, task, plan, prepared[ids]))
        yield from batch


def check_same_settings(vlm: VisionLanguageModel, output: Path) -> None:
    """Note in `output`/settings.json what answers; raises ValueError where other answers lie there already."""
    settings = {
        "model": vlm.name,
        "dtype": str(vlm.dtype),
        "template": vlm.template,
        "image_aspect_ratio": vlm.image_processor.image_aspect_ratio,
    }
    path = output / "settings.json"
    if path.is_file() and (before := read_json_object(path)) != settings:
        raise ValueError(f"{output} holds answers made with {before}, not with {settings}; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Prepared:
    """Samples whose pictures went through the tower; `vision_ms` is a sample's share of reading, tower and splice."""

    samples: Sequence[Sample]
    packed: PackedInputs
    vision_ms: float


def prepare_batch(vlm: VisionLanguageModel, samples: Sequence[Sample]) -> Prepared:
    started = timestamp(vlm.device)
    packed = vlm.prepare([Request(text=sample.text, images=sample.images) for sample in samples])
    return Prepared(samples, packed, (timestamp(vlm.device) - started) * 1000 / len(samples))


def answer_batch(vlm: VisionLanguageModel, task: Task, plan: Plan, prepared: Prepared) -> list[Record]:
    """Prefill and decode the samples as one packed batch, timing each step."""
    decoder, packed, count = vlm.model.language_model, prepared.packed, len(prepared.samples)
    started = timestamp(vlm.device)
    prefilled = prefill(decoder, packed, plan.dropper, max_new_tokens=task.max_new_tokens)
    filled = timestamp(vlm.device)
    cache_bytes = [prefilled.cache.nbytes_of(index) for index in range(count)]
    tokens = decode_until(decode_tokens(decoder, prefilled), vlm.config.eos_token_ids, task.max_new_tokens)
    finished = timestamp(vlm.device)
    kept = prefilled.kept
    texts = [vlm.tokenizer.decode(ids).strip() for ids in tokens]
    return [
        Record(
            task=task.name,
            plan=plan.key,
            sample_id=sample.sample_id,
            kind=sample.kind,
            group=sample.group,
            question=sample.text,
            answer=sample.answer,
            text=texts[index],
            correct=task.correct(texts[index], sample),
            text_tokens=packed.seqlens[index] - packed.vision_counts[index],
            vision_tokens=packed.vision_counts[index],
            vision_ms=prepared.vision_ms,
            prefill_ms=(filled - started) * 1000 / count,
            decode_ms=(finished - filled) * 1000 / count,
            decode_steps=max(map(len, tokens)) - 1,
            kv_cache_bytes=cache_bytes[index],
            kept=[stages[index].tolist() for _, stages in kept],
        )
        for index, sample in enumerate(prepared.samples)
    ]


def timestamp(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def append_records(path: Path, records: Sequence[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read_records(output: Path) -> list[Record]:
    """The answers written so far. A last line that was cut off by the interruption is removed from the file."""
    path = output / "samples.jsonl"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [Record(**json.loads(line)) for line in whole.splitlines()]


def summarise(vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a plan: scores with 95 % bootstrap intervals, cost by the one accounting, and measured times.

    `relative_score` is the share of dense's score in percent; None unless dense answered the same samples.
    """
    own = {plan.key: [vars(r) for r in records if r.task == task.name and r.plan == plan.key] for plan in plans}
    resampled = {key: resample(task, answers) for key, answers in own.items() if answers}
    return [
        summary_row(vlm, task, plan, own[plan.key], score_fields(resampled[plan.key], resampled.get(DENSE)))
        for plan in plans
        if plan.key in resampled
    ]


def summary_row(
    vlm: VisionLanguageModel, task: Task, plan: Plan, records: list[dict[str, Any]], scores: dict[str, Any]
) -> dict[str, Any]:
    text_config = vlm.config.text_config
    num_layers = text_config.num_hidden_layers
    steps = sum(record["decode_steps"] for record in records)
    flops = [plan.schedule.prefill_flops(text_config, r["text_tokens"], r["vision_tokens"]) for r in records]
    entering = [plan.schedule.vision_tokens_per_layer(record["vision_tokens"], num_layers) for record in records]
    return {
        "method": plan.method,
        "task": task.name,
        "schedule": {str(layer): ratio for layer, ratio in plan.schedule.items()},
        "asked_tokens": plan.asked_tokens,
        "vision_tokens": round(mean(record["vision_tokens"] for record in records), 2),
        "mean_vision_tokens": round(mean(mean(counts) for counts in entering), 2),
        "final_vision_tokens": round(mean(counts[-1] for counts in entering), 2),
        **scores,
        "metrics": {name: round(value, 4) for name, value in task.summary(records).items()},
        "samples": len(records),
        "vision_ms": round(median(record["vision_ms"] for record in records), 3),
        "prefill_ms": round(median(record["prefill_ms"] for record in records), 3),
        "decode_ms_per_token": round(sum(record["decode_ms"] for record in records) / steps, 3) if steps else None,
        "prefill_tflops": round(mean(flops) / 1e12, 6),
        "kv_cache_mb": round(mean(record["kv_cache_bytes"] for record in records) / 1e6, 4),
        "peak_memory_mb": round(peak_memory_mb(vlm.device), 1),
        "seed": plan.seed,
    }


@dataclass(frozen=True)
class Resampled:
    """The headline score of one plan, and of BOOTSTRAP_DRAWS resamplings of its pictures (samples where there are none)."""

    sample_ids: list[str]
    score: float
    draws: list[float]


def resample(task: Task, records: list[dict[str, Any]]) -> Resampled:
    """The draws are the same for all plans that answered the same samples, so that their ratios are paired."""
    records = sorted(records, key=lambda record: record["sample_id"])
    units = resampling_units(records)
    draws = np.random.default_rng(0).integers(len(units), size=(BOOTSTRAP_DRAWS, len(units)))
    scores = []
    for draw in draws:  # a picture drawn twice is two pictures, for tasks that pair by picture
        chosen = [{**record, "group": f"{record['group']}/{copy}"} for copy, unit in enumerate(draw) for record in units[unit]]
        scores.append(task.summary(chosen)["score"])
    return Resampled([record["sample_id"] for record in records], task.summary(records)["score"], scores)


def score_fields(own: Resampled, dense: Resampled | None) -> dict[str, Any]:
    """Score and share of dense's score in percent, with 95 % intervals."""
    fields = {"score": round(own.score, 3), "score_interval": interval(own.draws)}
    if dense is None or dense.sample_ids != own.sample_ids or not dense.score:
        return {**fields, "relative_score": None, "relative_interval": None}
    ratios = [100 * one / other if other else float("nan") for one, other in zip(own.draws, dense.draws, strict=True)]
    return {**fields, "relative_score": round(100 * own.score / dense.score, 3), "relative_interval": interval(ratios)}


def resampling_units(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records that must stay together: those of one picture where the task pairs by picture."""
    units: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        units.setdefault(record["group"] or record["sample_id"], []).append(record)
    return list(units.values())


def interval(values: Sequence[float]) -> list[float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [round(float(low), 3), round(float(high), 3)]


def peak_memory_mb(device: torch.device) -> float:
    """Most memory allocated so far: by torch on a GPU, by the whole process elsewhere (so one number for all methods)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run_summary(vlm: VisionLanguageModel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The object that ends a run: what ran, and the rows."""
    backend = vlm.model.language_model.attention
    return {
        "model": vlm.name,
        "device": str(vlm.device),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "attention": backend,
        "decode_attention": decode_backend(backend),
        "torch": torch.__version__,
        "results": rows,
    }


