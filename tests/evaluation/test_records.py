"""Answers on disk: parts of several processes become one file, every answer once and in order."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanovlm_v2drop.evaluation.records import Record, append_records, merge_records, read_records, records_path
from nanovlm_v2drop.models.parallel import ALONE, Processes

EMPTY = Record("demo", "dense", "0", "", "", "", "", "", 1.0, 1, 1, 1.0, 1.0, 1.0, 1, 1, 1.0)


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


@pytest.mark.parametrize("damage", ["garbage", '{"task": "demo"}', "[1, 2]"])
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{damage}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line 1 of {path} is no answer of this version.*delete the line"):
        read_records(tmp_path)
