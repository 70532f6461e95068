"""Run methods side by side over benchmarks: every method answers a batch before the next batch is read.

All methods therefore see the same pictures through one run of the vision tower, and a drift of the machine's speed affects all
of them alike. Every answer is written as one JSON line at once, and an interrupted run continues from these lines.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

from ..loading.zoo import VisionLanguageModel
from ..models.parallel import ALONE, Processes
from ..models.vlm import PackedInputs
from ..tasks import Sample, Task
from .answering import Answer, answer_batch, time_prompt
from .batches import Batch, BatchSize, Prompt, form_batches, read_ahead
from .features import SharedFeatures
from .machine import free_memory
from .output import batch_size_before, check_same_settings, run_settings
from .plans import Plan
from .records import Record, append_records, merge_records, read_records, records_path
from .workers import answered, num_workers

TIMED = 6  # prompts of a task whose times are taken
KEPT_FEATURES = 1 / 8  # of the free memory


def evaluate(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    timed: int = TIMED,
    resume: bool = False,
    processes: Processes = ALONE,
) -> Iterator[Sample]:
    """The samples of `evaluate_batches`, one by one."""
    batches = evaluate_batches(
        vlm, task, plans, output, limit=limit, batch_size=batch_size, timed=timed, resume=resume, processes=processes
    )
    return chain.from_iterable(batches)


def evaluate_batches(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    output: Path,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    timed: int = TIMED,
    resume: bool = False,
    processes: Processes = ALONE,
) -> Iterator[Sequence[Sample]]:
    """Answer the task's samples with every plan, appending to `output`/samples.jsonl; yields each batch that is answered.

    `batch_size`: prompts that are answered together; by default what the free memory allows, and where a run continues, its
    own. `timed`: how many samples, evenly spaced, are answered once more by each plan alone, which takes their times.

    With `resume`, answers that are already in the file are not written again. Several `processes` take the batches in turn, one
    replica each, and write to files of their own (samples-RANK.jsonl). The first process joins these files at the end, in the
    order that one process would have written; every process yields all samples. Parts that a killed run has left are joined
    at the start, whatever its number of processes. Hold `claimed(output)` around this where another run may start.

    Raises ValueError, and overwrites nothing, where the output holds answers to this task and `resume` is not set, where its
    answers were made with other settings, and where two plans or two samples share a name.
    """
    count, asked = task.num_samples(limit), None if batch_size is None else BatchSize(batch_size)
    workers = num_workers(vlm, processes)
    auto = BatchSize.auto(vlm, count, processes.replicas, workers)
    size = prepare_output(vlm, task, plans, output, asked, auto, resume, processes)
    done = {(record.plan, record.sample_id) for record in read_records(output) if record.task == task.name}
    run = TaskRun(vlm, task, plans, output, timed_places(count, timed), done, processes)
    order = list[tuple[str, str]]()
    samples = task.samples(task.default_samples if limit is None else limit)
    batches = run.checked(read_ahead(vlm, form_batches(vlm, samples, size), run.is_wanted))
    for batch in answered(batches, run.answer, workers):
        order += run.order(batch)
        if workers == 1:
            run.take_times()
        yield batch.samples
    run.take_times()  # no other batch is being answered
    processes.wait()
    if processes.is_first and max(processes.world_size, workers) > 1:
        merge_records(output, task.name, order)
    processes.wait()


def prepare_output(
    vlm: VisionLanguageModel,
    task: Task,
    plans: Sequence[Plan],
    output: Path,
    asked: BatchSize | None,
    auto: BatchSize,
    resume: bool,
    processes: Processes,
) -> BatchSize:
    """Join what an earlier run has left, and note the settings of this one; all processes wait. Raises as `evaluate`.

    Returns the size of batches: the one asked for, or that of the answers that are there, or `auto`.
    """
    check_names("plans", [plan.key for plan in plans], set())
    size = asked or auto
    if processes.is_first:
        merge_records(output)
        check_resumable(task, output, resume)
        size = asked or batch_size_before(task, output) or auto
        check_same_settings(run_settings(vlm, task, plans, size), output)
    processes.wait()
    return processes.agreed(size)


def timed_places(count: int, timed: int) -> frozenset[int]:
    """`timed` of `count` samples, evenly spaced."""
    timed = min(timed, count)
    return frozenset(number * count // timed for number in range(timed))


@dataclass(frozen=True)
class TaskRun:
    """What stays the same from batch to batch.

    `timed`: the places of the samples whose times are taken. `done`: plan and sample of the answers that are there.
    """

    vlm: VisionLanguageModel
    task: Task
    plans: Sequence[Plan]
    output: Path
    timed: Collection[int]
    done: Collection[tuple[str, str]]
    processes: Processes
    packing: Lock = field(default_factory=Lock)  # one batch at a time reads and changes `features`
    untimed: list[tuple[Sample, dict[str, Record]]] = field(default_factory=list)  # a sample and its answers by plan

    @cached_property
    def features(self) -> SharedFeatures:
        return SharedFeatures(self.vlm.model.encode, int(free_memory(self.vlm.device) * KEPT_FEATURES))

    def is_wanted(self, number: int, batch: Batch) -> bool:
        """Whether this process has anything to answer in the batch of that number."""
        return number % self.processes.replicas == self.processes.replica and bool(self.plans_missing(batch.samples))

    def plans_missing(self, samples: Sequence[Sample]) -> list[Plan]:
        """The plans that have not answered all of these samples."""
        return [plan for plan in self.plans if any((plan.key, sample.sample_id) not in self.done for sample in samples)]

    def checked(self, batches: Iterable[tuple[Batch, list[Prompt]]]) -> Iterator[tuple[Batch, list[Prompt]]]:
        """The batches; raises ValueError before one is answered that names a sample a second time."""
        seen = set[str]()
        for batch, prompts in batches:
            check_names(f"samples of {self.task.name}", [sample.sample_id for sample in batch.samples], seen)
            yield batch, prompts

    def answer(self, batch: Batch, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Write the answers that are missing, and yield after each plan; those to samples that are timed wait in `untimed`.

        All samples of the batch are answered, so that its products keep their shapes.
        """
        token_ids, media = zip(*prompts, strict=True)
        with self.packing:
            packed = self.vlm.pack(token_ids, media, self.features)
        plans, (timed, others) = self.plans_missing(batch.samples), self.split(batch)
        untimed: dict[int, dict[str, Record]] = {index: {} for index in timed}
        for plan, answers in answer_batch(self.vlm, self.task, plans, packed):
            records = [self.record(plan, batch, packed, index, answer) for index, answer in enumerate(answers)]
            self.write(records[index] for index in others)
            for index in timed:
                untimed[index][plan.key] = records[index]
            yield
        self.untimed.extend((batch.samples[index], records) for index, records in untimed.items())

    def take_times(self) -> None:
        """Write the answers that wait for their times; no batch may be answered meanwhile."""
        while self.untimed:
            sample, records = self.untimed.pop(0)
            plans = [plan for plan in self.plans if plan.key in records]
            for plan, times in time_prompt(self.vlm, self.task, plans, sample):
                self.write([replace(records[plan.key], **vars(times))])

    def split(self, batch: Batch) -> tuple[list[int], list[int]]:
        """The samples of a batch whose times are taken, and the others."""
        indices = range(len(batch.places))
        timed = [index for index in indices if batch.places[index] in self.timed]
        return timed, [index for index in indices if index not in timed]

    def order(self, batch: Batch) -> list[tuple[str, str]]:
        """Plan and sample of every answer to a batch, in the order in which `answer` writes them."""
        timed, others = self.split(batch)
        written = [(plan, index) for plan in self.plans for index in others]
        written += [(plan, index) for index in timed for plan in self.plans]
        return [(plan.key, batch.samples[index].sample_id) for plan, index in written]

    def record(self, plan: Plan, batch: Batch, packed: PackedInputs, index: int, answer: Answer) -> Record:
        """The record of one sample of a batch, without times."""
        text = self.task.cut(self.vlm.tokenizer.decode(answer.token_ids).strip())
        return Record(
            **answer_fields(self.task, plan, batch.samples[index], text),
            **prompt_fields(packed, index),
            decode_steps=len(answer.token_ids) - 1,
            kv_cache_bytes=answer.cache_bytes,
            kept=answer.kept,
        )

    def write(self, records: Iterable[Record]) -> None:
        """Append the records that are not in the file yet."""
        fresh = [record for record in records if (record.plan, record.sample_id) not in self.done]
        if self.processes.is_first_of_replica and fresh:
            append_records(records_path(self.output, self.processes), fresh)


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
