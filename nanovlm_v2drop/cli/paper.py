"""`--paper`: the paper's own result tables, and nothing else. Nothing here imports torch."""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..evaluation.paper import TABLES, PaperTable, shown

SOURCE = "V2Drop, arXiv 2509.01552 (CVPR 2026)"
WIDTH = 100  # where stdout is no terminal


def print_paper(model: str) -> int:
    """Print the tables of a model, or all of them for a demo model; returns the exit status, 2 where the paper has none."""
    tables = [table for table in TABLES if table.model == model or model in ("demo", "demo-video")]
    if not tables:
        known = ", ".join(dict.fromkeys(table.model for table in TABLES))
        print(f"nanovlm-v2drop: the paper has no results for {model}; it has some for: {known}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    for table in tables:
        console.print(f"{SOURCE}, {table.title}", style="italic")
        console.print(drawing(table))
        console.print()
    return 0


def drawing(table: PaperTable) -> Table:
    """The table as the paper has it."""
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("budget", "method", *table.columns, *table.extra, "average\n%"):
        drawn.add_column(title, justify="left" if title in ("budget", "method") else "right", no_wrap=True)
    drawn.add_row("-", "all tokens", *map(shown, (*table.dense, 100.0)))
    for row in table.rows:
        drawn.add_row(row.budget, row.method, *map(shown, (*row.numbers, row.average)))
    return drawn
