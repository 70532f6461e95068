"""What README shows works as it stands there."""

import re
from pathlib import Path

from nanovlm_v2drop import DropSchedule
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[1]


def test_the_python_examples_run_one_after_the_other(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert isinstance(names["schedule"], DropSchedule)
    sample = load_task("demo").first_sample()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{sample.request.text} {sample.answer} [(1, tensor(")
    assert printed[-1]


def test_every_file_that_the_tree_names_is_there():
    tree = (ROOT / "README.md").read_text().split("train_free_eval.py        the")[1].split("```")[0]
    for name in re.findall(r"^  (\S+\.py|\S+/)(?: (\S+\.py))?", tree, re.M):
        assert all((ROOT / "nanovlm_v2drop" / part).exists() for part in name if part), name
