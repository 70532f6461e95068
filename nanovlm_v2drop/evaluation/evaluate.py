"""Run methods side by side over benchmarks: every method answers a sample before the next sample is read.

All methods therefore see the same pictures through one run of the vision tower, and a drift of the machine's speed affects all
of them alike. Every answer is written as one JSON line at once, and an interrupted run continues from these lines.
"""

import platform
import re
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..dropping import DropSchedule
from ..inference import decode_tokens, decode_until, prefill
from ..inference.generation import kept_by
from ..loading.zoo import VisionLanguageModel
from ..models.parallel import ALONE, Processes
from ..models.vlm import PackedInputs
from ..tasks import Sample, Task
from .output import check_same_settings, run_settings
from .plans import Plan
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
    """Answer the task's samples with every plan, appending to `output`/samples.jsonl; yields each sample that is answered.

    With `resume`, answers that are already in the file are not made again. Several `processes` take the batches in turn, one
    replica each, and write to files of their own (samples-RANK.jsonl). The first process joins these files at the end, in the
    order that one process would have written; every process yields all samples. Parts that a killed run has left are joined
    at the start, whatever its number of processes. Hold `claimed(output)` around this where another run may start.

    Raises ValueError, and overwrites nothing, where the output holds answers to this task and `resume` is not set, where its
    answers were made with other settings, and where two plans or two samples share a name.
    """
    prepare_output(vlm, task, plans, output, resume, processes)
    done = {(record.plan, record.sample_id) for record in read_records(output) if record.task == task.name}
    samples = task.samples(task.default_samples if limit is None else limit)
    warm, order, seen = False, list[tuple[str, str]](), set[str]()
    for number, batch in enumerate(iter(lambda: list(islice(samples, batch_size)), [])):
        check_names(f"samples of {task.name}", [sample.sample_id for sample in batch], seen)
        order += [(plan.key, sample.sample_id) for plan in plans for sample in batch]
        missing = [] if number % processes.replicas != processes.replica else missing_answers(batch, plans, done)
        if missing and not warm:  # the first run includes page faults and the choice of kernels: not counted
            warm = bool(next(answer_missing(vlm, task, missing)))
        for records in answer_missing(vlm, task, missing):
            if processes.is_first_of_replica:
                append_records(records_path(output, processes), records)
        yield from batch
    processes.wait()
    if processes.is_first and processes.world_size > 1:
        merge_records(output, task.name, order)
    processes.wait()


def prepare_output(
    vlm: VisionLanguageModel, task: Task, plans: Sequence[Plan], output: Path, resume: bool, processes: Processes
) -> None:
    """Join what an earlier run has left, and note the settings of this one; all processes wait. Raises as `evaluate`."""
    check_names("plans", [plan.key for plan in plans], set())
    if processes.is_first:
        merge_records(output)
        check_resumable(task, output, resume)
        check_same_settings(run_settings(vlm, task, plans), output)
    processes.wait()


def missing_answers(
    batch: Sequence[Sample], plans: Sequence[Plan], done: set[tuple[str, str]]
) -> list[tuple[Plan, list[Sample]]]:
    """The plans that have not answered all samples of a batch, each with the samples that it has not answered."""
    left = [(plan, [sample for sample in batch if (plan.key, sample.sample_id) not in done]) for plan in plans]
    return [(plan, samples) for plan, samples in left if samples]


def answer_missing(
    vlm: VisionLanguageModel, task: Task, missing: Sequence[tuple[Plan, list[Sample]]]
) -> Iterator[list[Record]]:
    """The answers of one plan after the other."""
    prepared: dict[tuple[str, ...], Prepared] = {}  # one for all plans, unless a run was interrupted between two plans
    for plan, samples in missing:
        ids = tuple(sample.sample_id for sample in samples)
        prepared[ids] = prepared.get(ids) or prepare_batch(vlm, samples)
        yield answer_batch(vlm, task, plan, prepared[ids])


def check_names(kind: str, names: Sequence[str], seen: set[str]) -> None:
    """Add names to those `seen`; raise ValueError for one twice: the answers to one would be taken for the other's."""
    for name in names:
        if name in seen:
            raise ValueError(f"two {kind} are called {name!r}: give each a name of its own")
        seen.add(name)


def check_resumable(task: Task, output: Path, resume: bool) -> None:
    """Raise ValueError where the output holds answers to this task and the run is not to continue with them."""
    if not resume and any(record.task == task.name for record in read_records(output)):
        path = output / "samples.jsonl"
        raise ValueError(f"{path} already holds answers to {task.name}; go on with --resume, or choose another --output")


@dataclass(frozen=True)
class Prepared:
    """Samples whose pictures went through the tower. `vision_ms` is one sample's share of the time for reading and tower."""

    samples: Sequence[Sample]
    packed: PackedInputs
    vision_ms: float


def prepare_batch(vlm: VisionLanguageModel, samples: Sequence[Sample]) -> Prepared:
    started = timestamp(vlm.device)
    packed = vlm.prepare([sample.request for sample in samples])
    return Prepared(samples, packed, (timestamp(vlm.device) - started) * 1000 / len(samples))


@dataclass(frozen=True)
class Answered:
    """What came of a batch: the tokens of each sample, and what it cost."""

    tokens: list[list[int]]
    kept: list[list[list[int]]]  # of each sample, after each drop point of its own schedule
    cache_bytes: list[int]  # of each sample, after prefill
    prefill_ms: float
    decode_ms: float
    peak_memory_mb: float


def answer_batch(vlm: VisionLanguageModel, task: Task, plan: Plan, prepared: Prepared) -> list[Record]:
    """The answers to a batch. Times are shared out evenly over its samples."""
    with plan.answering():
        answered = run_batch(vlm, task, plan, prepared.packed)
    count = len(prepared.samples)
    return [
        Record(
            **answer_fields(task, plan, sample, task.cut(vlm.tokenizer.decode(ids).strip())),
            **prompt_fields(prepared.packed, index),
            vision_ms=prepared.vision_ms,
            prefill_ms=answered.prefill_ms / count,
            decode_ms=answered.decode_ms / count,
            decode_steps=max(map(len, answered.tokens)) - 1,
            kv_cache_bytes=answered.cache_bytes[index],
            peak_memory_mb=answered.peak_memory_mb,
            kept=answered.kept[index],
        )
        for index, (sample, ids) in enumerate(zip(prepared.samples, answered.tokens, strict=True))
    ]


def run_batch(vlm: VisionLanguageModel, task: Task, plan: Plan, packed: PackedInputs) -> Answered:
    """Prefill and decode one packed batch, timing each step."""
    decoder = vlm.model.language_model
    dropper = plan.dropper_for(packed, decoder.config.num_hidden_layers)
    reset_peak_memory(vlm.device)
    started = timestamp(vlm.device)
    prefilled = prefill(decoder, packed, dropper, max_new_tokens=task.max_new_tokens)
    filled = timestamp(vlm.device)
    shares = 1 if decoder.tensor_parallel is None else decoder.tensor_parallel.size  # each process holds one of the cache
    cache_bytes = [shares * prefilled.cache.nbytes_of(index) for index in range(len(packed.seqlens))]
    tokens = decode_until(decode_tokens(decoder, prefilled), vlm.config.eos_token_ids, task.max_new_tokens)
    finished, peak = timestamp(vlm.device), peak_memory_mb(vlm.device)
    schedule = DropSchedule({}) if dropper is None else dropper.schedule
    kept = [[rows.tolist() for _, rows in kept_by(prefilled, schedule, index)] for index in range(len(packed.seqlens))]
    return Answered(tokens, kept, cache_bytes, (filled - started) * 1000, (finished - filled) * 1000, peak)


def answer_fields(task: Task, plan: Plan, sample: Sample, text: str) -> dict[str, Any]:
    """The fields of a record that name the question, and the answer."""
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
    """The fields of a record that hold the sizes of its prompt."""
    vision_tokens = packed.vision_counts[index]
    return {
        "text_tokens": packed.seqlens[index] - vision_tokens,
        "vision_tokens": vision_tokens,
        "vision_grids": [list(grid) for grid in packed.vision_grids[index]],
    }


def timestamp(device: torch.device) -> float:
    """Seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Start a new high-water mark of memory; on a CPU this works on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held since `reset_peak_memory`: by torch on a GPU, by the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


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
