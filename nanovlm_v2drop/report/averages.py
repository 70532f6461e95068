"""The average over the paper's benchmarks on screen, beside the paper's own lines."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ..evaluation.paper import shown
from .tables import print_parts


def print_averages(run: Mapping[str, Any], console: Console) -> None:
    """One table for each of the paper's lists that a run covers whole; nothing else."""
    for table in run["averages"]:
        console.print(
            f"{table['name']}: {len(table['columns'])} benchmarks; average of the percentages of dense", style="italic"
        )
        columns = ("method", "asked", *table["columns"], "average %", "interval")
        rows = [dict(zip(columns, cells(line), strict=True)) for line in table["rows"]]
        print_parts(rows, columns[:2], columns[:1], console)
        if "POPE" in table["columns"]:
            console.print("POPE here: 100 times the mean F1 of the three categories, by the first sentence (LLaVA)")
        if not any(line["label"].strip() == "paper" for line in table["rows"]):
            console.print(f"the paper has no line for {run['model']} with these methods and budgets (see --paper)")
        console.print()


def cells(line: Mapping[str, Any]) -> list[str]:
    """A line of a table of averages as texts."""
    bounds = line["interval"]
    numbers = [shown(number) for number in (*line["numbers"], line["average"])]
    return [line["label"], line["asked"], *numbers, "-" if bounds is None else f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"]
