"""What README shows works as it stands there."""

import re
from pathlib import Path

from nanovlm_v2drop import DropSchedule
from nanovlm_v2drop.demo import scenes

ROOT = Path(__file__).parents[1]


def test_the_python_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    things = (scenes.Thing("red", "circle", 3, 40, 40, 28), scenes.Thing("blue", "star", 8, 100, 110, 30))
    scenes.draw_scene(scenes.Scene(things, 5)).save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert isinstance(names["schedule"], DropSchedule)
    assert capsys.readouterr().out.splitlines()[0].startswith("8 [(1, tensor(")


def test_every_file_that_the_tree_names_is_there():
    tree = (ROOT / "README.md").read_text().split("train_free_eval.py        the")[1].split("```")[0]
    for name in re.findall(r"^  (\S+\.py|\S+/)(?: (\S+\.py))?", tree, re.M):
        assert all((ROOT / "nanovlm_v2drop" / part).exists() for part in name if part), name
