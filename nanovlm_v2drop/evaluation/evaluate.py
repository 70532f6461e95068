"""Run methods side by side over benchmarks: every method answers a sample before the next sample is looked at.

So all methods see the same pictures through one run of the vision tower, and a machine whose speed drifts drifts for all of
them. Every answer is written as one JSON line as soon as it is there; a run that was interrupted goes on from these lines.
"""

import json
import platform
import re
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ..inference import decode_tokens, decode_until, prefill
from ..loading.zoo import VisionLanguageModel
from ..models.attention import decode_backend
from ..models.config import read_json_object
from ..models.parallel import ALONE, Processes
from ..models.vlm import PackedInputs
from ..tasks import Sample, Task
from .bootstrap import resample, score_fields
from .plans import DENSE, Plan
from .position_bias import position_bias
from .records import Record, append_records, merge_records, read_records, records_path


def evaluate(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int = 1,
    resume: bool = False,
    processes: Processes = ALONE,
) -> Iterator[Sample]:
    """Answer the task's samples with every plan, appending to `output`/samples.jsonl; yields each sample that is behind it.

    With `resume`, answers that are already in the file are not made again. Several `processes` take the batches in turn, one
    replica each, and write to files of their own (samples-RANK.jsonl), which the first puts together at the end, in the order
    that one process would have written; every process yields all samples. Parts that a killed run has left are put together
    at the start, with however many processes that run was. Raises ValueError where the output holds answers to this task and
    `resume` is not set: nothing is overwritten.
    """
    if processes.is_first:
        merge_records(output)
        check_resumable(task, output, resume)
        check_same_settings(vlm, output)
    processes.wait()
    done = {(record.plan, record.sample_id) for record in read_records(output) if record.task == task.name}
    samples = task.samples(task.default_samples if limit is None else limit)
    warm, order = False, list[tuple[str, str]]()
    for number, batch in enumerate(iter(lambda: list(islice(samples, batch_size)), [])):
        order += [(plan.key, sample.sample_id) for plan in plans for sample in batch]
        missing = [] if number % processes.replicas != processes.replica else missing_answers(batch, plans, done)
        if missing and not warm:  # the first run pays for page faults and kernel selection: not counted
            warm = bool(next(answer_missing(vlm, task, missing)))
        for records in answer_missing(vlm, task, missing):
            if processes.is_first_of_replica:
                append_records(records_path(output, processes), records)
        yield from batch
    processes.wait()
    if processes.is_first and processes.world_size > 1:
        merge_records(output, task.name, order)
    processes.wait()


def missing_answers(
    batch: Sequence[Sample], plans: Sequence[Plan], done: set[tuple[str, str]]
) -> list[tuple[Plan, list[Sample]]]:
    """The plans that have not answered all samples of a batch, each with those that are left."""
    left = [(plan, [sample for sample in batch if (plan.key, sample.sample_id) not in done]) for plan in plans]
    return [(plan, samples) for plan, samples in left if samples]


def answer_missing(
    vlm: VisionLanguageModel, task: Task, missing: Sequence[tuple[Plan, list[Sample]]]
) -> Iterator[list[Record]]:
    """The answers of one plan after the other."""
    prepared: dict[tuple[str, ...], Prepared] = {}  # one for all plans, unless an interruption left them uneven
    for plan, samples in missing:
        ids = tuple(sample.sample_id for sample in samples)
        prepared[ids] = prepared.get(ids) or prepare_batch(vlm, samples)
        yield answer_batch(vlm, task, plan, prepared[ids])


def check_resumable(task: Task, output: Path, resume: bool) -> None:
    """Raise ValueError where there are answers to this task that nobody asked to go on with."""
    if not resume and any(record.task == task.name for record in read_records(output)):
        path = output / "samples.jsonl"
        raise ValueError(f"{path} already holds answers to {task.name}; go on with --resume, or choose another --output")


def check_same_settings(vlm: VisionLanguageModel, output: Path) -> None:
    """Note in `output`/settings.json what answers; raises ValueError where answers made otherwise lie there already.

    Settings that an older release did not note count as other ones.
    """
    settings = {
        "model": vlm.name,
        "weights": str(vlm.folder),
        "dtype": str(vlm.dtype),
        "template": vlm.template,
        "image_processor": repr(vlm.image_processor),
        "sampling": repr(vlm.sampling),
    }
    path = output / "settings.json"
    before = read_json_object(path) if path.is_file() else settings
    noted = {name: before.get(name, "not noted") for name in settings}
    if changed := [f"{name} {noted[name]}, not {value}" for name, value in settings.items() if noted[name] != value]:
        raise ValueError(f"{output} holds answers made with {'; '.join(changed)}; choose another --output")
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
    packed = vlm.prepare([sample.request for sample in samples])
    return Prepared(samples, packed, (timestamp(vlm.device) - started) * 1000 / len(samples))


def answer_batch(vlm: VisionLanguageModel, task: Task, plan: Plan, prepared: Prepared) -> list[Record]:
    """Prefill and decode the samples as one packed batch, timing each step."""
    decoder, count = vlm.model.language_model, len(prepared.samples)
    reset_peak_memory(vlm.device)
    started = timestamp(vlm.device)
    with plan.floor_allowed():
        prefilled = prefill(decoder, prepared.packed, plan.dropper, max_new_tokens=task.max_new_tokens)
    filled = timestamp(vlm.device)
    shares = 1 if decoder.tensor_parallel is None else decoder.tensor_parallel.size  # each process holds one of the cache
    cache_bytes = [shares * prefilled.cache.nbytes_of(index) for index in range(count)]
    tokens = decode_until(decode_tokens(decoder, prefilled), vlm.config.eos_token_ids, task.max_new_tokens)
    finished, peak = timestamp(vlm.device), peak_memory_mb(vlm.device)
    kept = prefilled.kept
    return [
        Record(
            **answer_fields(task, plan, sample, vlm.tokenizer.decode(ids).strip()),
            **prompt_fields(prepared.packed, index),
            vision_ms=prepared.vision_ms,
            prefill_ms=(filled - started) * 1000 / count,
            decode_ms=(finished - filled) * 1000 / count,
            decode_steps=max(map(len, tokens)) - 1,
            kv_cache_bytes=cache_bytes[index],
            peak_memory_mb=peak,
            kept=[stages[index].tolist() for _, stages in kept],
        )
        for index, (sample, ids) in enumerate(zip(prepared.samples, tokens, strict=True))
    ]


def answer_fields(task: Task, plan: Plan, sample: Sample, text: str) -> dict[str, Any]:
    """Of a record: who was asked what, and what came back."""
    return {
        "task": task.name,
        "plan": plan.key,
        "sample_id": sample.sample_id,
        "kind": sample.kind,
        "group": sample.group,
        "question": sample.text,
        "answer": sample.answer,
        "text": text,
        "correct": task.correct(text, sample),
    }


def prompt_fields(packed: PackedInputs, index: int) -> dict[str, Any]:
    """Of a record: the sizes of a prompt."""
    vision_tokens = packed.vision_counts[index]
    return {
        "text_tokens": packed.seqlens[index] - vision_tokens,
        "vision_tokens": vision_tokens,
        "vision_grids": [list(grid) for grid in packed.vision_grids[index]],
    }


def timestamp(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summarise(vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a method and budget: scores with 95 % bootstrap intervals, cost by the one accounting, and measured times.

    The seeds of a method share a row: its score is their mean. `relative_score` is the share of dense's score in percent;
    None unless dense answered the same samples.
    """
    answers = defaultdict[str, list[dict[str, Any]]](list)
    for record in records:
        if record.task == task.name:
            answers[record.plan].append(vars(record))
    rows: dict[str, list[Plan]] = {}
    for plan in plans:
        if plan.key in answers:
            rows.setdefault(plan.row, []).append(plan)
    resampled = {row: resample(task, [answers[plan.key] for plan in own]) for row, own in rows.items()}
    return [
        summary_row(vlm, task, own, [answers[plan.key] for plan in own], score_fields(resampled[row], resampled.get(DENSE)))
        for row, own in rows.items()
    ]


def summary_row(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], by_seed: list[list[dict[str, Any]]], scores: dict[str, Any]
) -> dict[str, Any]:
    plan, records = plans[0], [record for records in by_seed for record in records]
    metrics = [task.summary(answers) for answers in by_seed]
    return {
        "method": plan.method,
        "label": plan.label,
        "task": task.name,
        "schedule": {str(layer): value for layer, value in plan.schedule.items()},
        "asked_tokens": plan.asked_tokens,
        "note": plan.note,
        **scores,
        "metrics": {name: round(mean(values[name] for values in metrics), 4) for name in metrics[0]},
        "samples": len(by_seed[0]),
        "seed": plan.seed,
        "seeds": [plan.seed for plan in plans],
        "scores_by_seed": [round(values["score"], 3) for values in metrics],
        **cost_fields(vlm, plan, records),
        **time_fields(records),
        "paper": dict(plan.paper),
    }


def cost_fields(vlm: VisionLanguageModel, plan: Plan, records: list[dict[str, Any]]) -> dict[str, float]:
    """What the schedule says that a prompt costs, by the one accounting, and the cache that was really filled."""
    config = vlm.config.text_config
    flops = [plan.schedule.prefill_flops(config, r["text_tokens"], r["vision_tokens"]) for r in records]
    entering = [plan.schedule.vision_tokens_per_layer(r["vision_tokens"], config.num_hidden_layers) for r in records]
    return {
        "vision_tokens": round(mean(record["vision_tokens"] for record in records), 2),
        "mean_vision_tokens": round(mean(mean(counts) for counts in entering), 2),
        "final_vision_tokens": round(mean(counts[-1] for counts in entering), 2),
        "prefill_tflops": round(mean(flops) / 1e12, 6),
        "kv_cache_mb": round(mean(record["kv_cache_bytes"] for record in records) / 1e6, 4),
    }


def time_fields(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians a sample, and sums over all: what a sample takes includes its share of reading and of the vision tower."""
    steps, decode_ms = (sum(record[name] for record in records) for name in ("decode_steps", "decode_ms"))
    total_ms = sum(record["vision_ms"] + record["prefill_ms"] + record["decode_ms"] for record in records)
    return {
        **{name: round(median(record[name] for record in records), 3) for name in ("vision_ms", "prefill_ms", "decode_ms")},
        "decode_ms_per_token": round(decode_ms / steps, 3) if steps else None,
        "total_ms": round(total_ms / len(records), 3),
        "items_per_s": round(1000 * len(records) / total_ms, 3),
        "peak_memory_mb": round(max(record["peak_memory_mb"] for record in records), 1),
    }


def summarise_bias(task: Task, plans: Sequence[Plan], records: Sequence[Record]) -> list[dict[str, Any]]:
    """What `position_bias` says of every method that drops, all its seeds together."""
    row_of, first_stages = {plan.key: plan.row for plan in plans}, defaultdict[str, list[tuple[int, list[int]]]](list)
    dropped = [record for record in records if record.task == task.name and record.kept and record.plan in row_of]
    for record in dropped:
        first_stages[row_of[record.plan]].append((record.vision_tokens, record.kept[0]))
    grid_size = common_grid_size([grid for record in dropped for grid in record.vision_grids])
    return [
        {
            "task": task.name,
            "method": plan.method,
            "label": plan.label,
            "asked_tokens": plan.asked_tokens,
            "layer": next(iter(plan.schedule)),
            **bias,
        }
        for plan in {plan.row: plan for plan in plans}.values()
        if (bias := position_bias(first_stages[plan.row], grid_size))
    ]


def common_grid_size(grids: Sequence[Sequence[int]]) -> int:
    """Side of the square that all pictures and frames are, newlines aside; 1 where they differ: place is then not looked at."""
    shapes = {(rows, columns) for _, rows, columns in grids if rows * columns > 1}
    rows, columns = shapes.pop() if len(shapes) == 1 else (1, 1)
    return rows if rows == columns else 1


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark of memory; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held since `reset_peak_memory`: by torch on a GPU, by the whole process elsewhere."""
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


def machine_name(device: torch.device) -> str:
    """The processor that runs, and how many threads or which GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()
