"""What a terminal shows, how a run is stopped, and how it is continued."""

import csv
import errno
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovlm_v2drop import cli
from nanovlm_v2drop.cli import ledger, progress, start
from nanovlm_v2drop.cli.progress import RunProgress, answered_before, duration, plan_line, resume_command
from nanovlm_v2drop.evaluation.plans import Plan, prompt_shape
from nanovlm_v2drop.research.claims import answers, ledger_plans
from nanovlm_v2drop.research.findings import Finding

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm"}


def on_terminal(*arguments: object) -> list[str]:
    """The lines that a run shows on a terminal of 80 columns, without colours."""
    own, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "train_free_eval.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(own, 4096)
        except OSError:  # the terminal is closed when the process ends
            break
    assert process.wait() == 0
    os.close(own)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r", "").splitlines()


def test_a_terminal_shows_one_table_of_78_columns_and_no_json(tmp_path):
    lines = on_terminal("--limit", 2, "--tokens", 48, "--seeds", 1, "--output", tmp_path / "run")
    assert lines[0] == f"output: {tmp_path / 'run'}"
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    assert "demo: 2 questions x 3 runs = 6 answers; 1 seed (see --seeds)" in lines
    assert not any("{" in line for line in lines)
    table = lines[lines.index("demo: 2 questions, 144 vision tokens a prompt") : -1]
    assert max(map(len, table)) <= 78
    assert [line.split()[0] for line in table if re.match(r"[a-z]\w* +(-|\d)", line)] == ["dense", "v2drop", "random"]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_other_tables_are_printed_on_request_and_json_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    options = ["--limit", 2, "--methods", "dense,v2drop", "--tokens", 48]
    code, out, _ = run(capsys, *options, "--output", tmp_path / "a")
    assert code == 0
    assert "time and memory" not in out
    assert not out.splitlines()[-1].startswith("{")
    _, out, _ = run(capsys, *options, "--output", tmp_path / "b", "--verbose", "--json")
    assert "time and memory" in out
    assert len(json.loads(out.splitlines()[-1])["results"]) == 2


def test_a_run_leaves_its_rows_for_spreadsheets_and_can_be_compared_with_another(tmp_path, capsys):
    for name, methods in (("a", "dense,v2drop"), ("b", "dense,fastv,v2drop")):
        assert run(capsys, "--limit", 2, "--methods", methods, "--tokens", 48, "--output", tmp_path / name)[0] == 0
    lines = list(csv.DictReader((tmp_path / "a" / "results.csv").open()))
    assert [(line["method"], line["asked_tokens"]) for line in lines] == [("dense", ""), ("v2drop", "48.0")]
    code, out, _ = run(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert code == 0
    assert "+0.0 [+0.0, +0.0]" in next(line for line in out.splitlines() if "v2drop" in line)


def test_a_resumed_run_shows_every_plan_that_the_folder_holds(tmp_path, capsys):
    options = ["--tokens", "48", "--limit", 2, "--seeds", 2, "--output", tmp_path]
    assert run(capsys, *options, "--methods", "dense,random")[0] == 0
    _, out, _ = run(capsys, *options, "--methods", "v2drop", "--tokens", "60", "--resume")
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(row["method"], row["asked_tokens"]) for row in rows] == [("v2drop", 60.0), ("dense", None), ("random", 48.0)]
    assert len(rows[2]["seeds"]) == 2
    # Of four questions the other plans have answered two: these are not shown.
    _, out, told = run(capsys, "--tokens", "60", "--limit", 4, "--methods", "v2drop", "--output", tmp_path, "--resume")
    assert [row["method"] for row in json.loads(out.splitlines()[-1])["results"]] == ["v2drop"]
    assert "not shown: dense has answered 2 of 4 questions of demo" in told


def test_a_damaged_list_of_plans_is_one_line(tmp_path, capsys):
    options = ["--tokens", "48", "--limit", 1, "--methods", "dense", "--output", tmp_path]
    assert run(capsys, *options)[0] == 0
    (tmp_path / "plans.json").write_text("[{}]")
    code, _, error = run(capsys, *options, "--resume")
    assert code == 2
    assert "plans.json is damaged" in error.splitlines()[-1]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_stopped_run_says_how_to_continue_and_continues(number, tmp_path):
    output = tmp_path / "out"
    script = str(ROOT / "train_free_eval.py")
    command = [sys.executable, script, "--methods", "dense", "--limit", "2000", "--output", str(output)]
    # Programs that a shell starts in the background ignore SIGINT, and so do those that they start.
    default = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, preexec_fn=default)
    answers = output / "samples.jsonl"
    while not (answers.is_file() and answers.stat().st_size) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    told = re.search(r"stopped after ([\d,]+) of 2,000; go on with: (.*)", errors)
    kept = len((output / "samples.jsonl").read_text().splitlines())
    assert int(told[1].replace(",", "")) <= kept < 2000
    words = shlex.split(told[2])
    assert words == ["python", command[1], *command[2:], "--resume"]
    words[words.index("2000")] = str(kept)  # as many as are there, so that the second start is short
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["samples"] == kept
    assert len((output / "samples.jsonl").read_text().splitlines()) >= kept


def test_a_stop_before_the_first_answer_is_one_line_too(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovlm_v2drop.cli.carry_out", stopped)
    assert cli.main([]) == 130
    assert capsys.readouterr().err.strip() == "nanovlm-v2drop: stopped"


class Unwritable(io.StringIO):
    """A stdout that fails with an error."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
BROKEN_PIPE = BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("option", ["--list-models", "--paper"])
def test_a_full_disk_under_stdout_is_one_line(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Unwritable(FULL_DISK))
    assert cli.main([option]) == 2
    assert capsys.readouterr().err == "nanovlm-v2drop: stdout cannot be written to (No space left on device)\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL_DISK, "the output folder, or the file that stdout goes to, cannot be written to (No space left on device); make"),
        (BROKEN_PIPE, "nobody reads stdout any more (Broken pipe); answers are kept, and --resume continues a run"),
    ],
)
def test_a_last_line_that_cannot_be_written_is_told_with_what_to_do(error, said, monkeypatch, capsys):
    monkeypatch.setattr(start, "run_mode", lambda *_: {})
    monkeypatch.setattr(sys, "stdout", Unwritable(error))
    assert cli.main(["--limit", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"nanovlm-v2drop: {said}")


def test_a_full_disk_under_the_answers_names_the_file_and_says_what_to_do():
    error = OSError(errno.ENOSPC, "No space left on device", "run/samples.jsonl")
    assert start.described(error) == (
        "run/samples.jsonl cannot be written to (No space left on device); make room, then continue a run with --resume"
    )


def test_closed_standard_streams_read_and_write_nothing(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["--list-models"]) == 0
    assert sys.stdin.read() == ""


def test_a_locale_without_box_lines_gets_question_marks_and_not_an_error(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(start, "run_mode", lambda *_: print("97.2 ± 1.9 ──"))
    assert cli.main(["--limit", "2"]) == 0
    sys.stdout.flush()
    assert shown.getvalue() == b"97.2 ? 1.9 ??\n"


def test_sigterm_is_handled_as_before_when_the_program_is_over():
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["--list-models"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_claims_are_printed_as_they_are_decided_and_stand_in_the_report(tmp_path, capsys, monkeypatch):
    shown_before: list[str] = []

    def find_some(vlm, task, output, limit):
        answers(vlm, task, ledger_plans(prompt_shape(vlm, task.first_sample().request)), output, limit)
        yield Finding("the first [claim]", "1.0", "2.0", "holds here", "python first.py")
        shown_before.append(capsys.readouterr().out)
        yield Finding("the second | claim", "3.0", "4.0", "does not hold here", "by formula")

    monkeypatch.setattr(ledger, "find_claims", find_some)
    code, out, _ = run(capsys, "--claims", "--limit", 2, "--output", tmp_path)
    assert code == 0
    assert "holds here: the first [claim]\n  paper: 1.0\n  here: 2.0\n" in shown_before[0]
    assert "second" not in shown_before[0]
    assert [row["verdict"] for row in json.loads(out.splitlines()[-1])["results"]] == ["holds here", "does not hold here"]
    page = (tmp_path / "report.html").read_text()
    assert page.index("<h2>Ablations</h2>") < page.index("<h2>The paper's claims</h2>")
    assert "the second | claim" in page
    assert "the second \\| claim" in (tmp_path / "claims.md").read_text()


# -- progress


def test_the_expected_time_is_told_once_after_twenty_answers(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    counted = RunProgress({"a": 30, "b": 70}, {"a": 10, "b": 10}, {}, shown=False)
    counted.bars.disable = False
    with counted.continued_with("again"):
        counted.count(1, 10)
        counted.count(1, 10)  # twenty answers in ten seconds
        counted.count(1, 10)
    told = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert told == ["expected time: 8 min for the other 98 questions"]


def test_the_time_of_batches_is_estimated_where_a_batch_ends(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    counted = RunProgress({"a": 100}, {"a": 25}, {}, shown=False)
    counted.bars.disable = False
    with counted.continued_with("again"):
        for _ in range(2):  # the answers to four questions come at once, and took ten seconds
            counted.count(4, 100)
    told = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert told == ["expected time: 4 min for the other 96 questions"]


def test_answers_of_an_earlier_start_cost_no_time(monkeypatch):
    earlier = {("a", f"{number}"): 10 for number in range(50)}
    counted = RunProgress({"a": 100}, {"a": 10}, earlier, shown=False)
    samples = [SimpleNamespace(sample_id=str(number)) for number in range(100)]
    counted.fresh_answers = 0
    list(counted.follow([samples[:20], samples[20:50]], "a", "a"))
    assert (counted.done, counted.fresh_answers) == (50, 0)
    list(counted.follow([samples[50:52]], "a", "a"))
    assert counted.fresh_answers == 20
    monkeypatch.setattr(progress.time, "perf_counter", lambda: counted.started + 40)
    assert counted.seconds_left() == pytest.approx(40 / 20 * 480)


def test_answered_before_counts_the_plans_of_this_run_only():
    plans = {"a": [Plan("dense")]}
    records = [("a", "dense", "1"), ("a", "fastv 48", "1"), ("b", "dense", "1"), ("a", "dense", "2")]
    assert answered_before(records, plans) == {("a", "1"): 1, ("a", "2"): 1}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "1 s"), (45, "45 s"), (100, "2 min"), (5400, "1 h 30 min"), (12000, "3 h 20 min")]
)
def test_durations_are_rounded_to_what_matters(seconds, shown):
    assert duration(seconds) == shown


def test_the_plan_line_names_seeds_only_where_something_is_drawn():
    drawn = Plan("random 48", SimpleNamespace(seeded=True))
    assert plan_line("pope", 9000, [Plan("dense"), drawn], 1) == (
        "pope: 9,000 questions x 2 runs = 18,000 answers; 1 seed (see --seeds)"
    )
    assert plan_line("pope", 9000, [Plan("dense")], 3) == "pope: 9,000 questions x 1 run = 9,000 answers"


@pytest.mark.parametrize(
    ("argv", "processes", "command"),
    [
        (["--limit", "2"], 1, "nanovlm-v2drop --limit 2 --output 'results/a b' --resume"),
        (["--output", "x", "--resume"], 1, "nanovlm-v2drop --output x --resume"),
        (["--output=x"], 1, "nanovlm-v2drop --output=x --resume"),
    ],
)
def test_the_command_that_continues_names_the_folder_once(argv, processes, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nanovlm-v2drop"])
    assert resume_command(argv, Path("results/a b"), processes) == command
