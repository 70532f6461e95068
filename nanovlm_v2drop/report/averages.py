"""The average over the paper's benchmarks on screen, beside the paper's own lines."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..evaluation.paper import shown
from .tables import printable


def print_averages(run: Mapping[str, Any], console: Console) -> None:
    """One table for each of the paper's lists that a run covers whole; nothing else."""
    for table in run["averages"]:
        console.print(
            f"{table['name']}: {len(table['columns'])} benchmarks; average of the percentages of dense", style="italic"
        )
        console.print(drawn(table["rows"], table["columns"]))
        if "POPE" in table["columns"]:
            console.print("POPE here: 100 times the mean F1 of the three categories, by the first sentence (LLaVA)")
        if not any(line["label"].strip() == "paper" for line in table["rows"]):
            console.print(f"the paper has no line for {run['model']} with these methods and budgets (see --paper)")
        console.print()


def drawn(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("method", "asked", *columns, "average %", "interval"):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(printable(text)) for text in cells(line)))
    return table


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line of a table of averages as texts."""
    bounds = line["interval"]
    numbers = [shown(number) for number in (*line["numbers"], line["average"])]
    return [line["label"], line["asked"], *numbers, "-" if bounds is None else f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"]
