"""Answers on disk: one JSON line each in samples.jsonl, and in a part of its own for each of several processes."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..models.parallel import Processes


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
    peak_memory_mb: float
    kept: list[list[int]] = field(default_factory=list)
    vision_grids: list[list[int]] = field(default_factory=list)  # frames, rows, columns of each picture or video


def records_path(output: Path, processes: Processes) -> Path:
    """Where a process writes its answers: the file that is read, where it is alone, else a part of its own."""
    return output / ("samples.jsonl" if processes.world_size == 1 else f"samples-{processes.rank}.jsonl")


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Write answers behind those that a file has, one JSON line each."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read_records(output: Path, sample_ids: Mapping[str, Collection[str]] | None = None) -> list[Record]:
    """The answers written so far; those in parts of several processes only when `merge_records` has put them together.

    `sample_ids`, by task, leaves only the answers to these: what an earlier, larger run answered must not mix in.
    """
    records = records_of(output / "samples.jsonl")
    if sample_ids is None:
        return records
    wanted = {(task, sample_id) for task, own in sample_ids.items() for sample_id in own}
    return [record for record in records if (record.task, record.sample_id) in wanted]


def records_of(path: Path) -> list[Record]:
    """The answers in one file. A last line that was cut off by an interruption is left out.

    Raises ValueError for another line that is no record.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    lines = enumerate(text[: text.rfind("\n") + 1].splitlines(), 1)
    return [parse_record(line, f"line {number} of {path}") for number, line in lines]


def parse_record(line: str, place: str) -> Record:
    """The record in a line; raises ValueError with its `place` for what is none."""
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError) as error:
        remedy = "delete the line, or choose another --output"
        raise ValueError(f"{place} is no answer of this version: {error}; {remedy}") from error


def merge_records(output: Path, task: str | None = None, order: Sequence[tuple[str, str]] = ()) -> None:
    """Put the parts that processes have written into samples.jsonl, every answer once, and cut what is torn off its end.

    The answers to `task` come in `order` (plan and sample), behind those to other tasks.
    """
    path, parts = output / "samples.jsonl", sorted(output.glob("samples-*.jsonl"))
    merged: dict[tuple[str, str, str], Record] = {}
    for record in (record for file in (path, *parts) for record in records_of(file)):
        merged.setdefault((record.task, record.plan, record.sample_id), record)
    if task is not None:
        places = {(task, *key): place for place, key in enumerate(order)}
        merged = dict(sorted(merged.items(), key=lambda item: places.get(item[0], -1 if item[0][0] == task else -2)))
    if path.is_file() or parts:
        whole = path.with_suffix(".whole")
        whole.unlink(missing_ok=True)
        append_records(whole, list(merged.values()))
        whole.replace(path)  # at once: killed at any moment, no answer is lost
    for part in parts:
        part.unlink()
