"""The lessons are committed as they ran, still run, and keep their form.

The form: at most 1,200 words, one screen of imports, public names from the package itself, the time and the lessons that one
needs under the title, links between lessons, folded solutions that run, and alternative text for every picture.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import nanovlm_v2drop
from nanovlm_v2drop import DROPPERS, PrefillState
from nanovlm_v2drop.models.attention import BACKENDS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MOST_WORDS, MOST_IMPORT_LINES, LONGEST_LINE = 1200, 25, 100
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)]+)\)")
nbformat = pytest.importorskip("nbformat")
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def texts(name: str) -> list[str]:
    """The source of every markdown cell."""
    return [cell.source for cell in read(name).cells if cell.cell_type == "markdown"]


def solutions(name: str) -> str:
    """What the last cell folds."""
    _, _, rest = texts(name)[-1].partition("<details>")
    return rest.partition("</details>")[0]


def solution_code(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", solutions(name), flags=re.DOTALL | re.MULTILINE)


def pictures(name: str) -> Iterator[Any]:
    """Every output that is a picture."""
    for cell in code_cells(name):
        yield from (output for output in cell.outputs if "image/png" in output.get("data", {}))


def import_nodes(name: str) -> list[ast.Import | ast.ImportFrom]:
    trees = [ast.parse(cell.source) for cell in code_cells(name)]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def printed(name: str) -> str:
    """Everything that the code cells print, and their source."""
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    shown = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join([*shown, *(cell.source for cell in code_cells(name))])


def test_there_are_nine_lessons_in_order():
    assert [name.partition("_")[0] for name in NOTEBOOKS] == [f"0{number}" for number in range(1, 10)]


@every_notebook
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(name):
    code = code_cells(name)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}
    assert (FOLDER / name).stat().st_size < 800_000


@every_notebook
def test_every_picture_has_alternative_text_of_its_own(name):
    alternatives = [output.metadata.get("image/png", {}).get("alt", "") for output in pictures(name)]
    assert alternatives  # a lesson without a figure has lost it
    assert len(set(alternatives)) == len(alternatives)
    assert all(len(alternative.split()) >= 8 for alternative in alternatives)
    for text in texts(name):
        assert "![](" not in text
        assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))


@every_notebook
def test_a_notebook_says_what_one_will_know_what_it_takes_and_ends_with_exercises(name):
    first, *_, last = texts(name)
    title, _, time, *_ = first.splitlines()
    assert title.startswith("# ")
    assert re.fullmatch(r"\*\d\d minutes; needs .+\.\*", time)
    assert "you will know" in first
    assert "## Exercises" in last


@every_notebook
def test_a_notebook_needs_only_earlier_lessons_and_links_to_its_neighbours(name):
    number = NOTEBOOKS.index(name)
    needed = re.findall(r"\[lesson (\d)\]\((\S+?)\)", texts(name)[0].splitlines()[2])
    assert all(NOTEBOOKS[int(lesson) - 1] == link and int(lesson) <= number for lesson, link in needed)
    assert bool(needed) == (number > 0)
    neighbours = NOTEBOOKS[max(number - 1, 0) : number] + NOTEBOOKS[number + 1 : number + 2]
    assert LINK.findall(texts(name)[-1].splitlines()[-1]) == neighbours


@every_notebook
def test_every_link_to_a_file_leads_to_one(name):
    links = [link for text in texts(name) for link in LINK.findall(text) if not link.startswith("https://")]
    assert all((FOLDER / link).is_file() for link in links)


@every_notebook
def test_a_notebook_has_at_most_1200_words(name):
    assert sum(len(text.split()) for text in texts(name)) <= MOST_WORDS


@every_notebook
def test_a_notebook_imports_at_most_one_screen_and_all_in_its_first_cell(name):
    nodes = import_nodes(name)
    assert sum(node.end_lineno - node.lineno + 1 for node in nodes) <= MOST_IMPORT_LINES
    in_first = [node for node in ast.parse(code_cells(name)[0].source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(in_first) == len(nodes)


@every_notebook
def test_a_notebook_imports_public_names_from_the_package_itself(name):
    for node in import_nodes(name):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanovlm_v2drop."):
            assert not {alias.name for alias in node.names} & set(nanovlm_v2drop.__all__), ast.unparse(node)


@every_notebook
def test_code_lines_have_at_most_100_columns(name):
    lines = [line for cell in code_cells(name) for line in cell.source.splitlines()]
    lines += [line for block in solution_code(name) for line in block.splitlines()]
    assert not [line for line in lines if len(line) > LONGEST_LINE]


@every_notebook
def test_every_exercise_has_a_folded_solution(name):
    exercises = texts(name)[-1].partition("<details>")[0]
    numbers = re.findall(r"^(\d)\. ", exercises, flags=re.MULTILINE)
    assert len(numbers) >= 2
    assert "<summary>Solutions</summary>\n\n" in solutions(name)  # without the empty line markdown is not rendered
    assert re.findall(r"^(\d)\. ", solutions(name), flags=re.MULTILINE) == numbers
    assert len(solution_code(name)) == len(numbers)


@every_notebook
def test_every_decimal_of_the_text_is_printed_by_a_cell(name):
    """Solutions are apart, as they have no output; names such as LLaVA-1.5 and paper numbers are no figures."""
    text = "\n".join(texts(name))
    text = re.sub(r"<details>.*?</details>|`[^`]*`|\[[^\]]*\]\([^)]*\)|LLaVA-1\.5\S*", "", text, flags=re.DOTALL)
    decimals = set(re.findall(r"\d+\.\d+", text))
    assert not {decimal for decimal in decimals if decimal not in printed(name)}


@every_notebook
def test_a_notebook_leaves_no_trace_of_the_machine_that_it_ran_on(name):
    content = (FOLDER / name).read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.:/~-])/(?:[\w.-]+/)+[\w-]+\.\w+", content)  # a file by its whole path
    assert "Traceback" not in content
    assert "Warning:" not in content


def printed_by(name: str, source: str) -> list[str]:
    """The lines that the only cell of a lesson with `source` in it has printed."""
    (cell,) = [cell for cell in code_cells(name) if source in cell.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream").splitlines()


def test_a_lesson_shows_the_fields_of_the_present_prefill_state():
    lines = printed_by("07_your_own_method.ipynb", "dataclasses.fields(state)")
    assert [line.split()[0] for line in lines] == [field.name for field in fields(PrefillState)]


def test_a_lesson_lists_the_present_methods():
    line, *_ = printed_by("07_your_own_method.ipynb", '", ".join(DROPPERS)')
    assert line.partition("methods: ")[2].split(", ") == list(DROPPERS)


def test_a_lesson_tries_the_present_attention_back_ends():
    _, *lines = printed_by("02_prefill_and_cache.ipynb", "for name in BACKENDS")  # the first line is what "auto" takes
    assert [line.split()[0] for line in lines] == list(BACKENDS)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_and_so_do_its_solutions(name):
    from nbclient import NotebookClient

    notebook = read(name)
    notebook.cells += [nbformat.v4.new_code_cell(block) for block in solution_code(name)]
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
