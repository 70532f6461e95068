"""What README and docs show works as it stands there."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import rows_of, write_rows
from PIL import Image
from qwen2vl import qwen2vl_reference, qwen2vl_tokenizer, write_qwen2vl_folder
from smolvlm import smollm2_tokenizer, smolvlm_reference, write_smolvlm_folder
from tiny_tasks import mme_rows, pope_rows, write_shards

from nanovlm_v2drop import cli
from nanovlm_v2drop.benchmark import answer, checkpoint, picture
from nanovlm_v2drop.benchmark.run import build_parser
from nanovlm_v2drop.cli.arguments import parse_arguments, parse_comparison
from nanovlm_v2drop.evaluation.lmms_eval.arguments import parse_model_arguments
from nanovlm_v2drop.loading import saving
from nanovlm_v2drop.research import precision
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_COMMANDS = ("git clone", "cd ", "python3 -m venv ", "bash .ci/run", "hf download ")
PROGRAMS = (".venv/bin/python train_free_eval.py", "nanovlm-v2drop", "train_free_eval.py")
MODULES = {module.__name__: module for module in (answer, checkpoint, picture, precision, saving)}
OFFICIAL = {"smolvlm-256m": "smolvlm", "qwen2-vl-2b": "qwen2vl", "llava-1.5-7b": "llava"}


def commands(page: str) -> list[str]:
    """The commands of all bash blocks: continued lines joined, comments left out, parts of `a && b` apart."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def parse(command: str) -> None:
    """Have the program's own parser read a command, behind settings of the environment; one that nobody knows is an error."""
    command = re.sub(r"^([A-Z_]+=\S+ +)+", "", command)
    words = shlex.split(command)
    if command.startswith(OTHER_COMMANDS):
        return
    if "pip" in words[0]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[([\w-]+)\]", command)) <= set(extras)
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
    elif "--model_args" in words:
        parse_lmms_eval(words)
    elif words[0] == "torchrun":
        parse_arguments(words[words.index("train_free_eval.py") + 1 :])
    elif words[1:3] == ["-m", "nanovlm_v2drop.benchmark"]:
        build_parser().parse_args(words[3:])
    elif words[1:3] == ["-m", "nanovlm_v2drop.research.smollm2"]:
        assert len(words) == 4
    elif words[1] == "-m" and words[2] in MODULES:
        MODULES[words[2]].build_parser().parse_args(words[3:])
    elif words[1] == "-c":
        exec(words[2], {})
    elif words[1:] in (["-m", "pytest", "-n", "auto"], ["lab", "notebooks"]):
        assert words[0] in (".venv/bin/python", ".venv/bin/jupyter")
    else:
        program = next(program for program in PROGRAMS if command.startswith(program))
        argv = shlex.split(command.removeprefix(program))
        parse_comparison(argv[1:]) if argv[:1] == ["compare"] else parse_arguments(argv)


def parse_lmms_eval(words: list[str]) -> None:
    """A command of lmms-eval, of which `--model_args` is ours to read."""
    assert any(word.endswith(("lmms-eval", "lmms_eval")) for word in words)
    assert words[words.index("--model") + 1] == "nanovlm_v2drop"
    given = dict(part.split("=", 1) for part in words[words.index("--model_args") + 1].split(","))
    parse_model_arguments(given).plan()


@pytest.fixture(scope="module")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the benchmarks that README's commands name."""
    folder = tmp_path_factory.mktemp("DATA")
    for task, place in {"gqa": "GQA", "scienceqa": "ScienceQA", "textvqa": "textvqa", "mmbench": "MMBench"}.items():
        write_rows(folder / place, task, rows_of(task, 8))
    write_shards(folder / "POPE", pope_rows())
    write_shards(folder / "MME", mme_rows())
    return folder


@pytest.fixture
def user_folder(tmp_path: Path, benchmark_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that README's commands name."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").save("photo.jpg")
    shutil.copy(ROOT / "weights" / "demo-video" / "clip.mp4", "clip.mp4")
    (method,) = re.findall(r"```python\n(# my_method\.py\n.*?)```", README, re.S)
    Path("my_method.py").write_text(method)
    Path("DATA").symlink_to(benchmark_data)
    return tmp_path


@pytest.mark.parametrize("command", sorted({command for page in PAGES for command in commands(page.read_text())}))
def test_every_command_that_is_shown_is_one_that_its_program_takes(command: str, user_folder: Path) -> None:
    parse(command)


@pytest.mark.parametrize("command", [".venv/bin/python train_free_eval.py --mehtods all", "nanovlm compare", "bash run"])
def test_a_command_that_no_program_takes_is_found(command: str) -> None:
    with pytest.raises((SystemExit, StopIteration)):
        parse(command)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 2000


def test_the_python_examples_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    sample = load_task("demo").first_sample()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{sample.request.text} {sample.answer} [(1, tensor(")
    assert names["generate"](names["vlm"], [names["request"]], names["LargestNorm"], retain=1 / 3)[0].text


def test_every_room_that_the_tree_names_is_there_and_every_room_is_named() -> None:
    tree = README.split("train_free_eval.py   the")[1].split("```")[0]
    named = {name.rstrip("/") for name in re.findall(r"^  (\S+)", tree, re.M)}
    package = ROOT / "nanovlm_v2drop"
    assert named == {path.parent.name for path in package.glob("*/__init__.py")}


def test_every_link_leads_to_a_file() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def official_folders(tiny_llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random checkpoints of the official models that README asks."""
    place, tokenizer = tmp_path_factory.mktemp("official"), smollm2_tokenizer()
    for name in ("smolvlm", "qwen2vl"):
        (place / name).mkdir()
    return {
        "llava": tiny_llava_folder,
        "smolvlm": write_smolvlm_folder(place / "smolvlm", smolvlm_reference(tokenizer, "Idefics3"), tokenizer),
        "qwen2vl": write_qwen2vl_folder(place / "qwen2vl", qwen2vl_reference(qwen2vl_tokenizer()), qwen2vl_tokenizer()),
    }


RUNS = [command.removeprefix(PROGRAMS[0]).strip() for command in commands(README) if command.startswith(PROGRAMS[0])]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_readmes_commands_run(command: str, official_folders: dict[str, Path], user_folder: Path, capsys: object) -> None:
    argv = shlex.split(command.replace("DIR", "WEIGHTS").replace("--data WEIGHTS", "--data DATA"))
    model = argv[argv.index("--model") + 1] if "--model" in argv else "demo"
    if model in OFFICIAL:
        weights = [str(official_folders[OFFICIAL[model]])]
        argv = argv[: argv.index("--weights")] + argv[argv.index("--weights") + 2 :] if "--weights" in argv else argv
        argv += ["--weights", *weights, *([] if "--retain" in argv else ["--retain", "0.5"])]  # they have six layers
        argv += ["--data", "DATA"] if "--image" not in argv and "--video" not in argv and "--data" not in argv else []
    argv += [] if "--prompt" in argv or "--list-models" in argv else ["--limit", "28" if model in OFFICIAL else "4"]
    assert cli.main([*argv, *([] if "--list-models" in argv else ["--output", str(user_folder / "run")])]) == 0


def test_readme_tells_the_size_of_the_core() -> None:
    files = [f"dropping/{name}" for name in ("v2drop", "base", "state", "schedule")]
    files += ["inference/prefill_loop", "inference/decoding"]
    files += [f"models/{name}" for name in ("decoder", "attention", "kv_cache", "vision", "vlm")]
    lines = sum(len((ROOT / "nanovlm_v2drop" / f"{file}.py").read_text().splitlines()) for file in files)
    (told,) = re.findall(r"The core has about ([\d,]+) lines", README)
    assert abs(lines - int(told.replace(",", ""))) < 100
