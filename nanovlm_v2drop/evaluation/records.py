"""Answers on disk: one JSON line each in samples.jsonl. Each of several processes writes a file of its own."""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from ..models.parallel import Processes

TIMES = ("vision_ms", "prefill_ms", "decode_ms", "peak_memory_mb")
MOST = 2**53  # beyond it JSON's numbers are not exact
MOST_TOKENS = 10**7


@dataclass
class Record:
    """One answer of one plan to one sample: a line of samples.jsonl. Some samples have times, taken of the prompt alone."""

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
    decode_steps: int
    kv_cache_bytes: int
    vision_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    peak_memory_mb: float | None = None
    kept: list[list[int]] = field(default_factory=list)
    vision_grids: list[list[int]] = field(default_factory=list)  # frames, rows, columns of each picture or video


def records_path(output: Path, processes: Processes) -> Path:
    """Where a process writes its answers: samples.jsonl for a single process, else a file of its own."""
    return output / ("samples.jsonl" if processes.world_size == 1 else f"samples-{processes.rank}.jsonl")


def append_records(path: Path, records: Sequence[Any]) -> None:
    """Write answers (dataclasses) to the end of a file, one JSON line each.

    Raises OSError with the file's name, as for a full disk.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_records(output: Path, sample_ids: Mapping[str, Collection[str]] | None = None) -> list[Record]:
    """The answers written so far. `merge_records` must first join the files of several processes.

    `sample_ids`, by task, selects the answers to these samples: the answers of an earlier, larger run must not mix in.
    """
    records = records_of(output / "samples.jsonl")
    if sample_ids is None:
        return records
    wanted = {(task, sample_id) for task, own in sample_ids.items() for sample_id in own}
    return [record for record in records if (record.task, record.sample_id) in wanted]


def records_of(path: Path) -> list[Record]:
    """The answers in one file, without a last line that an interruption has cut off.

    Raises ValueError for any other line that is no record.
    """
    return [parse_record(line, f"line {number} of {path}") for number, line in enumerate(whole_lines(path), 1)]


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that an interruption has cut off; none where there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def remove_cut_line(path: Path) -> None:
    """Remove a last line that an interruption has cut off, so that whole lines can follow."""
    if path.is_file():
        os.truncate(path, sum(len(line) + 1 for line in whole_lines(path)))


def parse_record(line: bytes, place: str) -> Record:
    """The record in a line; raises ValueError with its `place`, and the field, for what is none."""
    remedy = "delete the line, or choose another --output"
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{place} is no answer of this version: {reason}; {remedy}") from error
    if wrong := wrong_field(found):
        raise ValueError(f"{place} is no answer of this version: {wrong}; {remedy}")
    return Record(**found)


def wrong_field(found: Any) -> str:
    """What keeps a JSON value from being a record; empty where it is one."""
    if not isinstance(found, dict):
        return f"it is a {type(found).__name__}, not an object"
    known = {each.name: each for each in fields(Record)}
    if unknown := [name for name in found if name not in known]:
        return f"unknown field {unknown[0]!r}"
    for name, each in known.items():
        if name not in found and each.default is MISSING and each.default_factory is MISSING:
            return f"field {name!r} is missing"
        holds, wanted = RULES[str(each.type)] if name != "correct" else (is_share, "a number from 0 to 1")
        if name in found and not holds(found[name]):
            value = repr(found[name])
            return f"field {name!r} is {value if len(value) <= 40 else value[:37] + '...'}, not {wanted}"
    return wrong_numbers(found)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def is_amount(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value) and value >= 0


def is_share(value: Any) -> bool:
    return is_amount(value) and value <= 1


def are_counts(value: Any) -> bool:
    """Lists of counts, as token numbers and grids are."""
    return isinstance(value, list) and all(isinstance(own, list) and all(map(is_count, own)) for own in value)


def wrong_numbers(found: Mapping[str, Any]) -> str:
    """What of a record's numbers cannot be; empty where all can."""
    if any(len(grid) != 3 for grid in found.get("vision_grids", [])):
        return "field 'vision_grids' holds a grid that is not frames, rows and columns"
    if found["vision_tokens"] > MOST_TOKENS:
        return f"field 'vision_tokens' is {found['vision_tokens']}, more than any prompt holds ({MOST_TOKENS})"
    if any(number >= found["vision_tokens"] for stage in found.get("kept", []) for number in stage):
        return "field 'kept' holds a token that the prompt does not have"
    if len({found.get(name) is None for name in TIMES}) > 1:
        return f"it has some of the fields {', '.join(TIMES)} and not all"
    return ""


def merge_records(output: Path, task: str | None = None, order: Sequence[tuple[str, str]] = ()) -> None:
    """Join the files of several processes in samples.jsonl, every answer once, without lines that are cut off.

    The answers to `task` follow those to other tasks, in `order` (plan and sample).
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
        whole.replace(path)  # atomic: a kill at any moment loses no answer
    for part in parts:
        part.unlink()


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {  # by the type of a field: what it must be
    str(str): (is_text, "a text"),
    str(int): (is_count, f"a whole number from 0 to {MOST}"),
    str(float): (is_amount, "a finite number of 0 or more"),
    str(float | None): (lambda value: value is None or is_amount(value), "a finite number of 0 or more, or null"),
    str(list[list[int]]): (are_counts, "a list of lists of whole numbers"),
}
