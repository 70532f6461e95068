"""Answers on disk: parts of several processes become one file, every answer once and in order."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nanovlm_v2drop.evaluation.records import TIMES, Record, append_records, merge_records, read_records, records_path
from nanovlm_v2drop.models.parallel import ALONE, Processes

EMPTY = Record("demo", "dense", "0", "", "", "", "", "", 1.0, 1, 1, 1, 1, 1.0, 1.0, 1.0, 1.0)


def record(sample: str, plan: str = "dense", task: str = "demo", text: str = "") -> Record:
    return replace(EMPTY, sample_id=sample, plan=plan, task=task, text=text)


def test_parts_are_put_together_once_each_in_the_order_of_the_task(tmp_path: Path) -> None:
    append_records(tmp_path / "samples.jsonl", [record("9", task="pope"), record("2", text="first")])
    append_records(tmp_path / "samples-0.jsonl", [record("0", "v2drop"), record("2", text="again")])
    append_records(tmp_path / "samples-1.jsonl", [record("1"), record("0")])
    order = [(plan, sample) for sample in "012" for plan in ("dense", "v2drop")]
    merge_records(tmp_path, "demo", order)
    merged = read_records(tmp_path)
    assert [(r.task, r.plan, r.sample_id) for r in merged] == [
        ("pope", "dense", "9"),
        ("demo", "dense", "0"),
        ("demo", "v2drop", "0"),
        ("demo", "dense", "1"),
        ("demo", "dense", "2"),
    ]
    assert merged[-1].text == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


def test_only_the_answers_to_given_samples_of_a_task_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    append_records(tmp_path / "samples.jsonl", [record("0"), record("1"), record("0", task="pope"), record("0", "v2drop")])
    own = read_records(tmp_path, {"demo": ["0", "2"]})
    assert [(r.task, r.plan, r.sample_id) for r in own] == [("demo", "dense", "0"), ("demo", "v2drop", "0")]


def test_a_torn_line_is_left_out_of_every_part_and_cut_from_the_file(tmp_path: Path) -> None:
    for name in ("samples.jsonl", "samples-3.jsonl"):
        append_records(tmp_path / name, [record(name)])
        with (tmp_path / name).open("a") as file:
            file.write('{"task": "demo", "pl')
    merge_records(tmp_path)
    append_records(tmp_path / "samples.jsonl", [record("later")])
    assert [r.sample_id for r in read_records(tmp_path)] == ["samples.jsonl", "samples-3.jsonl", "later"]


def test_a_file_that_is_one_torn_line_is_emptied_and_no_file_is_made_of_none(tmp_path: Path) -> None:
    merge_records(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "samples.jsonl").write_text('{"task"')
    merge_records(tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_a_process_among_several_writes_a_part_of_its_own(tmp_path: Path) -> None:
    assert records_path(tmp_path, ALONE).name == "samples.jsonl"
    assert records_path(tmp_path, Processes(rank=3, world_size=4)).name == "samples-3.jsonl"


WHOLE = asdict(replace(EMPTY, vision_tokens=4, kept=[[0, 3], [3]], vision_grids=[[1, 2, 2]]))
WRONG = [
    *((name, value) for name in ("task", "plan", "sample_id", "text") for value in (None, 1, True, ["x"], {"x": 1})),
    *(("correct", value) for value in ("yes", None, True, -0.5, 1.5, math.nan, math.inf, [1])),
    *((name, value) for name in ("prefill_ms", "peak_memory_mb") for value in ("1", -1, math.nan, math.inf, True)),
    *((name, value) for name in ("text_tokens", "decode_steps") for value in (None, "1", -1, 1.0, True, 10**30)),
    ("vision_tokens", 10**11),
    ("vision_tokens", 3),
    ("kept", None),
    ("kept", [1]),
    ("kept", [[0.5]]),
    ("kept", [[-1]]),
    ("kept", [[4]]),
    ("kept", {"0": [1]}),
    ("vision_grids", [[1, 2]]),
    ("vision_grids", [["1", 2, 2]]),
    ("more", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_field_of_another_kind_is_named_with_file_and_line(name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    lines = json.dumps(WHOLE), json.dumps({**WHOLE, name: value})
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    field = "kept" if (name, value) == ("vision_tokens", 3) else name
    with pytest.raises(ValueError, match=rf"^line 2 of {path} is no answer of this version: .*field '{field}'.*delete the"):
        read_records(tmp_path)


def test_a_whole_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    append_records(tmp_path / "samples.jsonl", [Record(**WHOLE)])
    assert [asdict(found) for found in read_records(tmp_path)] == [WHOLE]


@pytest.mark.parametrize("name", ["task", "correct", "kv_cache_bytes"])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({key: value for key, value in WHOLE.items() if key != name}) + "\n")
    with pytest.raises(ValueError, match=rf"line 1 of {path} .*field '{name}' is missing"):
        read_records(tmp_path)


def test_a_record_has_all_times_or_none(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    without = {**WHOLE, **dict.fromkeys(TIMES)}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (without, {**without, "prefill_ms": 1.0})))
    with pytest.raises(ValueError, match=rf"line 2 of {path} .*some of the fields vision_ms, prefill_ms, .* and not all"):
        read_records(tmp_path)


DAMAGED = [b"garbage", b'{"task": "demo"}', b"[1, 2]", b"\xff\xfe{}", b"null", b"[" * 200_000, b"1" * 9999, b""]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(damage + b"\n")
    with pytest.raises(ValueError, match=rf"^line 1 of {path} is no answer of this version.*delete the line") as failed:
        read_records(tmp_path)
    assert "\n" not in str(failed.value)


def test_a_text_may_hold_what_unicode_calls_a_line_break(tmp_path: Path) -> None:
    append_records(tmp_path / "samples.jsonl", [record("0", text="one\u2028two\x85three")])
    assert [found.text for found in read_records(tmp_path)] == ["one\u2028two\x85three"]
