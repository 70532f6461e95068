"""The notebooks are committed as they ran, and still run."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from nanovlm_v2drop import DROPPERS, PrefillState
from nanovlm_v2drop.models.attention import BACKENDS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")


def read(name: str):
    return nbformat.read(FOLDER / name, as_version=4)


def test_there_are_nine_lessons_in_order():
    assert [name.partition("_")[0] for name in NOTEBOOKS] == [f"0{number}" for number in range(1, 10)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    assert "display_data" in kinds  # a lesson without a figure has lost it
    assert (FOLDER / name).stat().st_size < 800_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_says_what_one_will_know_and_ends_with_exercises(name):
    text = [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]
    assert text[0].startswith("# ")
    assert "will know" in "".join(text[:2])
    assert "exercises" in text[-1].lower()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_leaves_no_trace_of_the_machine_that_it_ran_on(name):
    content = (FOLDER / name).read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/~-])/(?:[\w.-]+/)+[\w-]+\.\w+", content)  # a file by its whole path
    assert "Traceback" not in content
    assert "Warning:" not in content


def printed_by(name: str, source: str) -> list[str]:
    """The lines that the only cell of a lesson with `source` in it has printed."""
    (cell,) = [cell for cell in read(name).cells if cell.cell_type == "code" and source in cell.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").splitlines()


def test_a_lesson_shows_the_fields_of_the_present_prefill_state():
    lines = printed_by("07_your_own_method.ipynb", "dataclasses.fields(state)")
    assert [line.split()[0] for line in lines] == [field.name for field in fields(PrefillState)]


def test_a_lesson_lists_the_present_methods():
    (line,) = printed_by("07_your_own_method.ipynb", '", ".join(DROPPERS)')
    assert line.partition("methods: ")[2].split(", ") == list(DROPPERS)


def test_a_lesson_tries_the_present_attention_back_ends():
    _, *lines = printed_by("02_prefill_and_cache.ipynb", "for name in BACKENDS")  # the first line is what "auto" takes
    assert [line.split()[0] for line in lines] == list(BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name):
    from nbclient import NotebookClient

    notebook = read(name)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
