"""--calibrate on the shipped demos: its tables, its proposals as options, and own pictures and videos."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanovlm_v2drop import cli
from nanovlm_v2drop.cli import calibrate
from nanovlm_v2drop.cli.arguments import parse_arguments
from nanovlm_v2drop.cli.calibrate import checked, command_for, questions_of, verdict
from nanovlm_v2drop.dropping.budget import Budget
from nanovlm_v2drop.evaluation.methods import find_methods
from nanovlm_v2drop.research.calibration import Proposal
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "weights" / "demo-video" / "clip.mp4"
BETTER = Proposal(Budget(retain=0.5), (2, 5, 7), (1, 6, 8), [0.1, 0.2, 0.1], [0.5, 0.6, 0.4], 9)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_tables_hold_what_the_json_object_says_with_a_prompt_for_each_picture(tiny_llava_folder, tmp_path, capsys):
    for number, sample in enumerate(load_task("demo").samples(3)):
        sample.images[0].save(tmp_path / f"{number}.png")
    asked = ["--model", tiny_llava_folder, "--image", tmp_path, "--prompt", "What digit?", "--retain", "0.5,0.4"]
    code, out, _ = run(capsys, "--calibrate", *asked)
    assert code == 0
    *lines, last = out.splitlines()
    result = json.loads(last)
    assert max(len(line) for line in lines if "--methods" not in line) <= 78
    assert lines[0] == f"{tiny_llava_folder.name}: 6 layers, 36 vision tokens; 2 prompts to search, 1 to check"
    cells = [line.split() for line in lines]
    by_layer = {int(row[0]): row for row in cells if len(row) == 6 and row[0].isdigit()}
    assert list(by_layer) == [1, 2, 3, 4, 5]
    for row in result["layers"]:
        assert by_layer[row["layer"]][3:] == [f"{row[name]:.3f}" for name in ("by_variation", "at_random", "none_kept")]
    assert [row["budget"] for row in result["results"]] == ["50%", "40%"]
    for row in result["results"]:
        assert row["rule"] == [1, 3, 4]
        assert min(row["change"], row["change_by_rule"]) > 0
        assert any(line.startswith(f"{row['budget']}: ") for line in lines)


@pytest.mark.slow
def test_the_demo_shows_where_its_ranking_becomes_stable_and_where_it_has_read_the_picture(capsys):
    code, out, _ = run(capsys, "--calibrate", "--limit", 16, "--batch-size", 8, "--retain", 0.5)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["stable_from"] == 4
    assert result["layers"][0]["none_kept"] > 1 > 0.1 > result["layers"][-2]["none_kept"]
    assert result["results"][0]["rule"] == [1, 6, 8]


@pytest.mark.slow
def test_a_single_video_cannot_be_checked_with_another(capsys):
    pytest.importorskip("av")
    asked = ["--model", "demo-video", "--video", CLIP, "--prompt", "What moves?", "--retain", 0.25]
    code, out, _ = run(capsys, "--calibrate", *asked)
    assert code == 0
    assert "1 prompts to search, 0 to check" in out
    assert "keep the depth rule's, the default" in out or "there are no other prompts" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "--methods", "random"], "beside --calibrate --methods would be ignored"),
        (["--calibrate", "--output", "somewhere"], "beside --calibrate --output would be ignored"),
        (["--calibrate", "--claims"], "beside --claims --calibrate would be ignored"),
        (["--calibrate", "--image", "a.png"], "--image or --video belongs together with --prompt or --chat"),
        (["--calibrate", "--retain", "0.01", "--limit", "2"], "a mean of 1.44 vision tokens is out of reach"),
        (["--calibrate", "--tokens", "500", "--limit", "2"], "a mean of 500 vision tokens is out of reach"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "dense_answers", lambda *_: pytest.fail("prompts are answered"))
    try:
        code = cli.main(options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_command_of_a_proposal_compares_its_layers_with_the_rules():
    arguments = parse_arguments(["--calibrate", "--model", "demo"])
    words = command_for(BETTER, arguments)
    assert words[-6:] == ["--model", "demo", "--methods", "dense,v2drop,v2drop:layers=2/5/7", "--retain", "0.5"]
    pasted = parse_arguments(words[words.index("--model") :])
    _, rule, method = find_methods(pasted.methods)
    assert list(method.schedule_for(72, 144, 12)) == [2, 5, 7]
    assert list(rule.schedule_for(72, 144, 12)) == [1, 6, 8]


@pytest.mark.parametrize(
    ("proposal", "words", "cell"),
    [
        (BETTER, "the proposed layers change other answers less; try", "-0.367 ["),
        (
            Proposal(Budget(tokens=64), (2, 5, 7), (1, 6, 8), [0.5, 0.1], [0.4, 0.3], 9),
            "not clearly better on other prompts; keep the depth rule's, or try",
            "-0.050 [",
        ),
        (Proposal(Budget(tokens=64), (2, 5, 7), (1, 6, 8), [], [], 9), "there are no other prompts to check", "-"),
        (Proposal(Budget(tokens=64), (1, 6, 8), (1, 6, 8), [0.1, 0.2], [0.1, 0.2], 9), "keep the depth rule's", "-"),
    ],
)
def test_the_verdict_follows_from_the_other_prompts(proposal, words, cell):
    assert words in verdict(proposal)
    assert checked(proposal).startswith(cell)


def test_questions_are_others_than_those_of_a_run_without_a_limit():
    task = load_task("demo")
    run_asks = {sample.text + str(hash(sample.images[0].tobytes())) for sample in task.samples(task.default_samples)}
    asked = [request.text + str(hash(request.images[0].tobytes())) for request in questions_of(task, 5)]
    assert len(asked) == 5
    assert not run_asks & set(asked)
    finite = SimpleNamespace(default_samples=None, samples=lambda limit: iter([SimpleNamespace(request=limit)]))
    assert list(questions_of(finite, 7)) == [7]
