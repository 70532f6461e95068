"""Options: their choices, their limits, and that help and errors need no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanovlm_v2drop import DROPPERS, cli
from nanovlm_v2drop.cli import choices
from nanovlm_v2drop.cli.arguments import build_parser, parse_arguments, parse_comparison, typed_command
from nanovlm_v2drop.cli.checks import MOST_PICTURES, check_files_and_packages
from nanovlm_v2drop.cli.models import fitting_model
from nanovlm_v2drop.loading.specs import MODELS, PICTURE, VIDEO
from nanovlm_v2drop.models.attention import BACKENDS
from nanovlm_v2drop.processing.images import ASPECT_RATIOS
from nanovlm_v2drop.processing.prompts import TEMPLATES
from nanovlm_v2drop.research.ablations import ABLATIONS
from nanovlm_v2drop.tasks import TASKS

ROOT = Path(__file__).parents[1]
BUDGET_OF_HELP = 10.0  # seconds; generous, since tests share a machine: what counts is that torch is not imported


def test_the_choices_that_are_read_from_source_are_those_that_run():
    assert set(choices.methods()) == {"dense", *DROPPERS}
    assert set(choices.tasks()) == set(TASKS)
    assert choices.ablations() == tuple(ABLATIONS)
    assert choices.attention_backends() == ("auto", *BACKENDS)
    assert choices.templates() == (*TEMPLATES, "checkpoint")
    assert choices.aspect_ratios() == ASPECT_RATIOS


def test_a_new_method_is_an_option_as_soon_as_its_file_is_there(tmp_path, monkeypatch):
    (tmp_path / "dropping").mkdir()
    (tmp_path / "dropping" / "new.py").write_text('class New:\n    name = "brand-new"\n\nclass Base:\n    name: str\n')
    monkeypatch.setattr(choices, "PACKAGE", tmp_path)
    assert choices.class_names.__wrapped__("dropping") == ("brand-new",)


def test_a_table_that_is_not_there_is_an_error_and_no_empty_choice():
    with pytest.raises(ValueError, match=r"models/attention.py assigns no NOTHING"):
        choices.listed_in("models/attention.py", "NOTHING")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: nanovlm-v2drop"),
        (["--list-models"], 0, "qwen2-vl-2b"),
        (["--no-such-option"], 2, "unrecognized arguments: --no-such-option"),
        (["--methods", "fastest"], 2, "unknown method 'fastest'; choose from: dense, "),
        (["--accounting", "official", "--tokens", "32"], 2, "beside --accounting --tokens would be ignored"),
        (["--image", "nowhere.png", "--prompt", "What?"], 2, "--image nowhere.png: there is no such file"),
        (["compare", "--help"], 0, "usage: nanovlm-v2drop compare"),
    ],
)
def test_help_and_wrong_options_are_answered_without_torch(arguments, code, said):
    script = (
        "import sys\nfrom nanovlm_v2drop.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print('torch' in sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=BUDGET_OF_HELP, check=False
    )
    assert done.returncode == code
    assert done.stdout.splitlines()[-1] == "False"
    assert said in " ".join((done.stdout + done.stderr).split())


def refused(arguments, capsys) -> str:
    """The one line on stderr with which a command line is refused."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accounting", "official", "--tokens", "32"], "beside --accounting --tokens would be ignored; leave one"),
        (["--ablation", "metric", "--methods", "fastv", "--seeds", "2"], "beside --ablation --methods, --seeds would be"),
        (["--claims", "--tasks", "pope"], "beside --claims --tasks would be ignored for the demo; leave it out, or name"),
        (["--claims", "--image", "a.png", "--prompt", "b"], "beside --claims --prompt, --image would be ignored"),
        (["--image", "a.png", "--prompt", "b", "--limit", "3", "--tasks", "pope"], "beside --prompt --tasks, --limit"),
        (["--image", "a.png", "--chat", "--limit", "3"], "beside --chat --limit would be ignored"),
        (["--image", "a.png", "--chat", "--methods", "dense,v2drop"], "--chat answers with one method and one budget"),
        (["--image", "a.png", "--chat", "--methods", "all"], "give --methods a single value"),
        (["--image", "a.png", "--chat", "--tokens", "48,32"], "give --tokens a single value"),
        (["--history", "cut-cache"], "--history belongs together with --chat"),
        (["--forget"], "--forget belongs together with --chat or --conversations"),
        (["--conversations", "1"], "--conversations 1 is out of range; it must be from 2 to 100,000"),
        (["--conversations", "9", "--image", "a.png", "--limit", "3"], "beside --conversations --image, --limit would be"),
        (["--chat"], "--image or --video belongs together with --prompt or --chat; add --image FILE or --video FILE"),
        (["--image", "a.png"], "--image or --video belongs together with --prompt or --chat; add --prompt QUESTION or --chat"),
        (["--prompt", "What?"], "belongs together with --prompt or --chat; add --image FILE or --video FILE"),
        (["--resume"], "--resume needs the --output"),
        (["--methods", ""], "argument --methods: nothing is named"),
        (["--methods", "nowhere.py:Own"], "there is no file nowhere.py"),
        (["--tasks", "chess"], "unknown name 'chess'; choose from: ai2d, demo, demo-video, gqa, longvideobench, mlvu, "),
        (["--ablation", "size"], "unknown name 'size'; choose from: metric, layers, steps, schedules, ranking"),
        (["--model", "gpt"], "unknown model 'gpt'; choose one of: demo, "),
        (["--retain", " , "], "argument --retain: nothing is named"),
        (["--retain", "1.5"], "1.5 must be above 0 and at most 1"),
        (["--retain", "nan"], "nan must be above 0"),
        (["--retain", "4/3"], "4/3 must be above 0 and at most 1"),
        (["--tokens", "many"], "'many' is no number"),
        (["--tokens", "0"], "0 must be above 0"),
        (["--tokens", "1e999"], "1e999 must be above 0"),
        (["--device", "foo"], "unknown device 'foo'; choose cpu, cuda, cuda:N or mps"),
        (["--limit", "0"], "--limit 0 is out of range; it must be from 1 to 10,000,000"),
        (["--limit", 10**11], "--limit 100000000000 is out of range"),
        (["--seeds", 10**11], "--seeds 100000000000 is out of range; it must be from 1 to 1,000"),
        (["--seeds", "0"], "--seeds 0 is out of range"),
        (["--seed", 10**22], "--seed 10000000000000000000000 is out of range"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--batch-size", 10**20], "--batch-size 100000000000000000000 is out of range; it must be from 1 to 4,096"),
        (["--frames", 10**9], "--frames 1000000000 is out of range; it must be from 1 to 4,096"),
        (["--max-pixels", "0"], "--max-pixels 0 is out of range"),
        (["--tensor-parallel", "0"], "--tensor-parallel 0 is out of range"),
        (["--output", ""], "argument --output: the path is empty; give a folder"),
        (["--output", "a\0b"], "has a null character"),
        (["--output", "a\udcff"], r"'a\udcff' is no valid UTF-8"),
        (["--image", "a.png", "--prompt", "What\udcff"], r"'What\udcff' is no valid UTF-8"),
        (["--image", "~no-such-user/a.png", "--prompt", "What?"], "~no-such-user/a.png: there is no such file"),
        (["--model", "a\0b"], "unknown model 'a\\x00b'"),
        (["--image", "https://example.org/cat.jpg", "--prompt", "What?"], "is a web address; only local files are read"),
        (["--video", "rtsp://camera", "--prompt", "What?"], "is a web address"),
        (["compare", "one"], "give two runs or more"),
        (["compare", "one", "two", "--format", "word"], "invalid choice: 'word'"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, message, capsys):
    assert message in refused(options, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "FOLDER/nowhere.png", "--prompt", "What?"], "nowhere.png: there is no such file"),
        (["--image", "FOLDER", "--prompt", "What?"], "holds no picture"),
        (["--video", "FOLDER", "--prompt", "What?", "--model", "demo-video"], "is a folder; give a file"),
        (["--video", "FILE", "--prompt", "What?"], "--video: demo takes pictures only; models that take a video: demo-video"),
        (["--weights", "FOLDER/nowhere"], "--weights FOLDER/nowhere: there is no such folder"),
        (["--weights", "FOLDER", "--model", "llava-1.5-7b"], "--weights FOLDER holds no config.json, no *.safetensors, no tok"),
        (["--model", "FOLDER"], "--model FOLDER holds no config.json, no *.safetensors, no tokenizer*; give the folder of a"),
        (["--model", "FOLDER", "--claims"], "--model FOLDER holds no config.json"),  # before any data is asked for
        (["--data", "FILE", "--tasks", "pope"], "--data FILE: there is no such folder"),
        (["--output", "FILE"], "FILE is a file; give a folder"),
        (["--output", "FILE/run"], "FILE is a file; give a folder"),
        (["--output", "/dev/null"], "/dev/null is a file; give a folder"),
    ],
)
def test_files_are_checked_before_anything_is_loaded(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanovlm_v2drop.cli.start", None)  # importing what loads a model would raise
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file.txt")}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert placed(message) in refused([placed(option) for option in options], capsys)


def test_a_missing_package_is_told_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else object())
    monkeypatch.setitem(sys.modules, "nanovlm_v2drop.cli.start", None)
    assert refused(["--tasks", "pope"], capsys) == "nanovlm-v2drop: this run needs the package pyarrow: pip install pyarrow"


def test_a_folder_of_pictures_stands_for_its_pictures_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "._a.JPG"):
        (tmp_path / name).write_text("")
    arguments = parse_arguments(["--image", str(tmp_path), str(tmp_path / "b.png"), "--prompt", "What?"])
    check_files_and_packages(arguments)
    assert [picture.name for picture in arguments.image] == ["a.JPG", "b.png", "b.png"]


def test_more_pictures_than_a_question_takes_are_refused(tmp_path, capsys):
    for number in range(MOST_PICTURES + 1):
        (tmp_path / f"{number}.png").write_text("")
    assert "--image gives 65 pictures; one question takes at most 64" in refused(["--image", tmp_path, "--prompt", "?"], capsys)


@pytest.mark.parametrize(
    ("options", "seeds", "methods", "tasks"),
    [
        ([], 3, ["dense", "v2drop", "random"], ["demo"]),
        (["--model", "demo-video"], 3, ["all"], ["demo-video"]),
        (["--model", "llava-1.5-7b"], 1, ["dense", "v2drop", "random"], ["pope", "mme"]),
        (["--model", "llava-1.5-7b", "--seeds", "2", "--tasks", "mme", "--methods", "fastv"], 2, ["fastv"], ["mme"]),
        (["--image", "a.png", "--chat"], 3, ["v2drop"], ["demo"]),
    ],
)
def test_what_is_not_given_follows_from_the_model(options, seeds, methods, tasks):
    arguments = parse_arguments(options)
    assert (arguments.seeds, arguments.methods, arguments.tasks) == (seeds, methods, tasks)


def test_every_example_of_the_help_is_a_valid_command_line():
    text = build_parser().format_help()
    examples = [line for line in text.splitlines() if line.strip().startswith(("nanovlm-v2drop ", "torchrun"))]
    assert len(examples) > 10
    for line in examples:
        command = line.strip().partition("   ")[0].replace('"What is this?"', "What?").replace('"What moves?"', "What?")
        words = command.split()
        if "compare" not in words:
            parse_arguments(words[words.index("train_free_eval.py") + 1 :] if words[0] == "torchrun" else words[1:])


def test_a_model_is_a_name_a_folder_or_a_repository_of_the_hub(tmp_path):
    for name in ("qwen2-vl-7b", str(tmp_path), "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2-VL-2B-Instruct@main"):
        assert parse_arguments(["--model", name]).model == name


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/usr/bin/nanovlm-v2drop", ["nanovlm-v2drop"]),
        ("/site-packages/nanovlm_v2drop/__main__.py", ["python", "-m", "nanovlm_v2drop"]),
        ("../train_free_eval.py", ["python", "../train_free_eval.py"]),
    ],
)
def test_the_command_of_a_run_can_be_typed_again(program, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--limit", "2"])
    assert typed_command(["--limit", "2"]) == [*words, "--limit", "2"]


def test_the_list_of_models_fits_a_terminal_and_cuts_nothing(capsys):
    assert cli.main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in MODELS)
    assert not any("…" in line for line in lines)
    video = next(line for line in lines if line.startswith("qwen2-vl-2b"))
    assert video.split() == ["qwen2-vl-2b", "2.2", "B", "4.4", "GB", "apache-2.0", "pictures,", "video"]


@pytest.mark.parametrize(
    ("memory", "medium", "fits"),
    [(0.5, PICTURE, None), (1, PICTURE, "smolvlm-256m"), (8, VIDEO, "qwen2-vl-2b"), (25, PICTURE, "qwen3-vl-8b")],
)
def test_the_model_that_is_named_fits_the_memory(memory, medium, fits):
    spec = fitting_model(memory, medium)
    assert (spec and spec.name) == fits


def test_options_and_chains_of_methods_are_read_without_torch(capsys):
    given = "dense,v2drop:metric=cosine,divprune+v2drop:share=0.5"
    assert parse_arguments(["--methods", given]).methods == given.split(",")
    assert "unknown method 'nobody'" in refused(["--methods", "divprune+nobody:power=2"], capsys)
    assert "method 'v2drop:metric': 'metric' is no option" in refused(["--methods", "v2drop:metric"], capsys)
    assert "there is no file mine.py" in refused(["--methods", "divprune+mine.py:Mine:power=2"], capsys)


def test_a_comparison_of_everything_in_a_folder_leaves_the_shared_script_out() -> None:
    runs = parse_comparison(["results/a", "results/b", "results/plotly-4.1.1.min.js"]).runs
    assert [run.name for run in runs] == ["a", "b"]


def test_the_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []
