"""`nanovlm-v2drop compare RUN RUN2`: finished runs in a table, and all of them in one report page."""

import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..evaluation.bootstrap import Resampled, interval
from ..evaluation.comparison import Comparison, compare, read_run
from ..report.page import write_common_page
from ..report.rows import leaves_out_zero
from ..report.tables import console_for, plus_minus, print_parts, signed

NAMED = ("task", "method", "asked", "samples")  # columns that stand in every part of a table
DIFFERENCES = "differences are paired by question, with 95 % intervals; * leaves out zero"


def print_comparison(folders: Sequence[Path], form: str, report: Path | None) -> int:
    """Print finished runs beside the first of them, in one of WRITERS; returns the exit status.

    `report`: where to write a page with the comparison and the tables and figures of all runs.
    """
    try:
        if report is not None and report.is_dir():
            raise ValueError(f"--report {report} is a folder; give the file that is to be written")
        comparisons = compare([read_run(folder) for folder in folders])
        print(WRITERS[form](folders, comparisons), flush=True)
        if report is not None:
            compared = [columns_of(folders), *map(cells_of, comparisons)]
            print(f"report: {write_common_page(folders, compared, report)}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"nanovlm-v2drop: {error}", file=sys.stderr)
        return 2
    return 0


def columns_of(runs: Sequence[Path]) -> list[str]:
    """task, method, asked, samples, score of run 1, and for each other run its score and the difference to run 1."""
    names = [*NAMED, "run 1"]
    for number in range(2, len(runs) + 1):
        names += [f"run {number}", f"{number} - 1"]
    return names


def cells_of(comparison: Comparison) -> list[str]:
    task, label, asked = comparison.key
    first, *others = comparison.scores
    cells = [task, label, "-" if asked is None else f"{asked:g}", f"{comparison.questions}", score_cell(first)]
    for own, gain in zip(others, comparison.differences, strict=True):
        cells += [score_cell(own), difference_cell(gain)]
    return cells


def score_cell(own: Resampled | None) -> str:
    return "-" if own is None else plus_minus(own.score, interval(own.draws))


def difference_cell(gain: tuple[float, list[float]] | None) -> str:
    return "-" if gain is None else signed(*gain).rstrip()


def as_table(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    console, columns = console_for(wide=len(runs) > 2), columns_of(runs)
    rows = [dict(zip(columns, cells_of(comparison), strict=True)) for comparison in comparisons]
    with console.capture() as captured:
        print_parts(rows, NAMED, ("task", "method"), console)
    legend = [f"run {number}: {folder}" for number, folder in enumerate(runs, 1)]
    return "\n".join([*legend, captured.get().rstrip(), DIFFERENCES])


def as_markdown(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    names = columns_of(runs)
    lines = [names, ["---"] * 2 + ["---:"] * (len(names) - 2), *map(cells_of, comparisons)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines]
    legend = [f"Run {number}: `{folder}`." for number, folder in enumerate(runs, 1)]
    return "\n".join([*legend, "", *table, "", f"{DIFFERENCES}."])


def as_latex(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    names = columns_of(runs)
    rows = [" & ".join(map(latex_text, cells)) + r" \\" for cells in (names, *map(cells_of, comparisons))]
    legend = [*(f"% run {number}: {folder}" for number, folder in enumerate(runs, 1)), f"% {DIFFERENCES}"]
    begin = r"\begin{tabular}{ll" + "r" * (len(names) - 2) + "}"
    return "\n".join([*legend, begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"])


def latex_text(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def as_csv(runs: Sequence[Path], comparisons: Sequence[Comparison]) -> str:
    """One line a row and run, with plain numbers."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    fields = ("score", "score_low", "score_high", "difference", "difference_low", "difference_high", "significant")
    writer.writerow(["task", "method", "asked", "samples", "run", *fields])
    for comparison in comparisons:
        gains = [None, *comparison.differences]
        for folder, own, gain in zip(runs, comparison.scores, gains, strict=True):
            if own is not None:
                beside = [] if gain is None else [round(gain[0], 3), *gain[1], int(leaves_out_zero(gain[1]))]
                numbers = [round(own.score, 3), *interval(own.draws), *beside]
                writer.writerow([*comparison.key, comparison.questions, folder, *numbers])
    return file.getvalue().rstrip("\n")


WRITERS: Mapping[str, Callable[[Sequence[Path], Sequence[Comparison]], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "latex": as_latex,
    "csv": as_csv,
}
