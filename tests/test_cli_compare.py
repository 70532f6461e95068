"""`compare`: finished runs side by side, paired by question."""

import csv
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nanovlm_v2drop import cli
from nanovlm_v2drop.cli.arguments import FORMATS
from nanovlm_v2drop.cli.compare import WRITERS, latex_text
from nanovlm_v2drop.evaluation.bootstrap import difference, resample
from nanovlm_v2drop.evaluation.comparison import compare, read_run, shared_samples
from nanovlm_v2drop.evaluation.records import Record
from nanovlm_v2drop.tasks import load_task

EMPTY = {"text_tokens": 1, "vision_tokens": 4, "vision_ms": 1.0, "prefill_ms": 1.0, "decode_ms": 1.0, "decode_steps": 1,
         "kv_cache_bytes": 1, "peak_memory_mb": 1.0}  # fmt: skip


def write_run(
    folder: Path, rights: dict[str, list[int]], question: str = "Is it {}?", share: float | None = None
) -> Path:
    """A run of the demo's task: for each plan key which of its questions were answered right; keys may end in "seed N".

    `share`: of the vision tokens that its rows asked for; None where they asked for a number.
    """
    folder.mkdir()
    lines, rows = [], {}
    for key, right in rights.items():
        row, _, seed = key.partition(" seed ")
        label, _, asked = row.partition(" ")
        fields = {"task": "demo", "label": label, "asked_tokens": float(asked) if asked else None,
                  "asked_share": share if asked else None, "seeds": [], "plans": []}  # fmt: skip
        rows.setdefault(row, fields)
        rows[row]["seeds"].append(int(seed or 0))
        rows[row]["plans"].append(key)
        for number, correct in enumerate(right):
            asked_for = question.format(number), "yes"
            record = Record("demo", key, f"digit-{number}", "digit", "", *asked_for, "yes", correct, **EMPTY)
            lines.append(json.dumps(asdict(record)))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps({"results": list(rows.values())}))
    return folder


def rights(seed: int, share: float, count: int = 60) -> list[int]:
    return [int(right) for right in np.random.default_rng(seed).random(count) < share]


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    shared = {"dense": rights(0, 0.9), "random 48 seed 0": rights(2, 0.5)}
    first = {**shared, "v2drop 48": rights(1, 0.7), "random 48 seed 1": rights(3, 0.4)}
    second = {**shared, "v2drop 48": rights(4, 0.9), "fastv 48": rights(5, 0.6)}
    return [write_run(tmp_path / "first", first), write_run(tmp_path / "second", second)]


def said(capsys, *arguments: object) -> str:
    assert cli.main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_differences_are_those_of_the_paired_bootstrap(runs):
    one, other = map(read_run, runs)
    found = {comparison.key: comparison for comparison in compare([one, other])}
    own = found["demo", "v2drop", 48.0]
    answers = [resample(load_task("demo"), run.answers(("demo", "v2drop", 48.0))) for run in (one, other)]
    assert own.differences == [difference(answers[1], answers[0])]
    gain, (low, high) = own.differences[0]
    assert gain == pytest.approx(100 * (np.mean(rights(4, 0.9)) - np.mean(rights(1, 0.7))))
    assert low < gain < high
    assert found["demo", "dense", None].differences == [(0.0, [0.0, 0.0])]
    assert found["demo", "fastv", 48.0].differences == [None]


def test_all_seeds_of_a_row_count(runs):
    first = read_run(runs[0])
    assert len(first.answers(("demo", "random", 48.0))) == 2
    (row,) = [comparison for comparison in compare([first, first]) if comparison.key[1] == "random"]
    assert row.scores[0].score == pytest.approx(50 * (np.mean(rights(2, 0.5)) + np.mean(rights(3, 0.4))))


def test_only_questions_that_both_answered_are_compared(tmp_path):
    longer = write_run(tmp_path / "longer", {"dense": rights(0, 0.5, 40)})
    shorter = write_run(tmp_path / "shorter", {"dense": rights(0, 0.5, 40)[:25]})
    (row,) = compare([read_run(longer), read_run(shorter)])
    assert row.questions == 25
    assert row.differences == [(0.0, [0.0, 0.0])]


def asked(task: str, positions: list[int]) -> list[dict[str, str]]:
    """Answers to these questions, of which every two neighbours are about one picture."""
    return [{"sample_id": str(number), "group": str(number // 2)} for number in positions]


def test_two_questions_about_one_picture_are_not_taken_for_one_another():
    answers = [[asked("gqa", [0, 2, 3, 4])], [asked("gqa", [1, 2, 3, 5, 4])]]
    assert shared_samples(load_task("gqa"), answers) == {"2", "3", "4"}


def test_samples_that_are_scored_as_one_are_compared_where_all_of_them_are_there():
    answers = [[asked("mme", [0, 1, 2, 3])], [asked("mme", [1, 2, 3, 4])] * 2, []]
    assert shared_samples(load_task("mme"), answers) == {"2", "3"}


def test_runs_that_asked_for_one_share_are_compared_although_their_prompts_differ_in_size(tmp_path):
    first = write_run(tmp_path / "first", {"dense": rights(0, 0.9), "v2drop 48": rights(1, 0.7)}, share=1 / 3)
    second = write_run(tmp_path / "second", {"dense": rights(0, 0.9), "v2drop 47.5": rights(1, 0.7)}, share=1 / 3)
    third = write_run(tmp_path / "third", {"v2drop 48": rights(1, 0.7)})
    found = compare([read_run(folder) for folder in (first, second, third)])
    assert [(row.key[1], row.key[2], row.differences) for row in found] == [
        ("dense", None, [(0.0, [0.0, 0.0]), None]),
        ("v2drop", 48.0, [(0.0, [0.0, 0.0])] * 2),
    ]


def test_the_table_fits_a_terminal_and_names_the_runs(runs, capsys):
    out = said(capsys, *runs)
    lines = out.splitlines()
    assert lines[:2] == [f"run 1: {runs[0]}", f"run 2: {runs[1]}"]
    assert max(map(len, lines[2:])) <= 78
    cells = next(line.split() for line in lines if "v2drop" in line)
    assert cells[:4] == ["demo", "v2drop", "48", "60"]
    gain = 100 * (np.mean(rights(4, 0.9)) - np.mean(rights(1, 0.7)))
    assert f"{gain:+.1f}" in cells
    fastv = next(line.split() for line in lines if "fastv" in line)
    assert fastv[4] == fastv[-1] == "-"


def test_columns_that_do_not_fit_beside_long_names_stand_in_another_table_and_no_number_is_cut(tmp_path, capsys):
    name = "visionzip+v2drop:share=0.5:metric=cosine"
    plans = {"dense": rights(0, 0.9), f"{name} 48": rights(1, 0.7)}
    folders = [write_run(tmp_path / number, plans) for number in ("one", "two")]
    lines = said(capsys, *folders).splitlines()[2:]
    assert max(map(len, lines)) <= 78
    assert [line.split()[4:] for line in lines if "task" in line] == [["run", "1", "run", "2"], ["2", "-", "1"]]
    rows = [line.split() for line in lines if line.startswith("demo  visionzip+v2drop:share")]
    assert [len(row) for row in rows] == [4 + 2 * 3, 4 + 3]  # two scores, and the difference
    assert rows[1][2:] == ["48", "60", "+0.0", "[+0.0,", "+0.0]"]
    assert {cell for row in rows for cell in row if "…" in cell} == {rows[0][1]}


def test_a_reader_that_went_away_gets_no_message(runs, capsys, monkeypatch):
    """As `| head -1`: the status is that of a program that the closed pipe ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["compare", *map(str, runs)]) == cli.UNREAD
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_markdown_and_latex_have_a_cell_for_every_column(runs, capsys):
    table = [line for line in said(capsys, *runs, "--format", "markdown").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 4
    latex = said(capsys, *runs, "--format", "latex")
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 4
    assert {line.count("&") for line in rows} == {6}
    assert re.search(r"\\begin\{tabular\}\{llrrrrr\}", latex)
    assert latex_text("50 % of a_b & c ± d") == r"50 \% of a\_b \& c $\pm$ d"


def test_a_star_marks_a_difference_whose_interval_leaves_out_zero_in_every_format(tmp_path, capsys):
    right = rights(0, 0.5)
    one = write_run(tmp_path / "one", {"dense": right, "v2drop 48": [0] * 60})
    two = write_run(tmp_path / "two", {"dense": right, "v2drop 48": rights(1, 0.7)})
    for form in ("table", "markdown", "latex"):
        marked = [line for line in said(capsys, one, two, "--format", form).splitlines() if "]*" in line]
        assert len(marked) == 1
        assert "v2drop" in marked[0]
    lines = list(csv.DictReader(said(capsys, one, two, "--format", "csv").splitlines()))
    assert [line["significant"] for line in lines if line["run"] == str(two)] == ["0", "1"]


def test_csv_has_plain_numbers_one_line_a_run(runs, capsys):
    lines = list(csv.DictReader(said(capsys, *runs, "--format", "csv").splitlines()))
    own = [line for line in lines if line["method"] == "v2drop"]
    assert [line["run"] for line in own] == [str(run) for run in runs]
    assert own[0]["difference"] in ("", None)
    assert float(own[1]["difference"]) == pytest.approx(float(own[1]["score"]) - float(own[0]["score"]), abs=0.002)


def test_more_than_two_runs_are_each_compared_with_the_first(runs, tmp_path, capsys):
    third = write_run(tmp_path / "third", {"dense": rights(6, 0.5)})
    header = next(line for line in said(capsys, *runs, third, "--format", "markdown").splitlines() if line.startswith("| task"))
    assert header == "| task | method | asked | samples | run 1 | run 2 | 2 - 1 | run 3 | 3 - 1 |"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "holds no finished run: there is no summary.json"),
        (lambda folder: (folder / "summary.json").write_text("[]"), "summary.json is damaged"),
        (lambda folder: (folder / "summary.json").write_text('{"results": [{}]}'), "summary.json is damaged"),
    ],
)
def test_a_folder_without_a_finished_run_is_told_in_one_line(damage, message, runs, capsys):
    damage(runs[1])
    assert cli.main(["compare", *map(str, runs)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_in_place_of_the_reports_file_is_told_in_one_line(runs, tmp_path, capsys):
    assert cli.main(["compare", *map(str, runs), "--report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"nanovlm-v2drop: --report {tmp_path} is a folder; give the file that is to be written\n"


def test_runs_that_asked_different_questions_or_share_no_row_are_refused(tmp_path, capsys):
    one = write_run(tmp_path / "one", {"dense": rights(0, 0.5)})
    for name, answers, question in (("two", {"dense": rights(0, 0.5)}, "Other {}?"), ("three", {"fastv 48": [1]}, "Is it {}?")):
        other = write_run(tmp_path / name, answers, question)
        assert cli.main(["compare", str(one), str(other)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "the runs asked different questions as digit-0 of demo" in told[0]
    assert "the runs share no method and budget" in told[1]


def test_every_format_of_the_options_has_a_writer():
    assert tuple(WRITERS) == FORMATS
