"""--conversations: what later questions can still see, by every method and with every history, in one table."""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..dropping import TokenDropper
from ..dropping.budget import Budget
from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.plans import prompt_shape
from ..evaluation.summary import run_summary
from ..report.tables import console_for, printable
from ..research.conversations import TURNS, dialogues_for, measure_all, rows_of
from .planning import budgets_for

COLUMNS = (
    *("method", "budget", "history", *(f"Q{turn + 1}\n%" for turn in range(TURNS)), "later questions\n- re-prefill"),
    *("later questions\n- dense", "later turns\ntokens", "later turns\nms", "cache\nMB"),
)
PARTS = ((*range(3 + TURNS), *range(5 + TURNS, len(COLUMNS))), (0, 1, 2, 3 + TURNS, 4 + TURNS))  # for 80 columns
UNLIMITED = 10_000  # columns, wider than any table


def run_conversations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns the object that ends the run, whose results are the rows."""
    methods = find_methods(arguments.methods)
    vlm = load_model(arguments)
    dialogues = dialogues_for(vlm.name, arguments.conversations)
    budgets = budgets_for(prompt_shape(vlm, dialogues[0].request), arguments)
    measured = measure_all(vlm, methods, budgets, dialogues, forget=arguments.forget, batch_size=arguments.batch_size)
    rows = rows_of(list(measured))
    seen = "no earlier question" if arguments.forget else "the earlier turns"
    title = f"{vlm.name}: {arguments.conversations} conversations of {TURNS} questions; later questions see {seen}"
    print_rows(title, rows, below_floor(methods, budgets, rows))
    return run_summary(vlm, rows)


def below_floor(
    methods: Sequence[type[TokenDropper] | None], budgets: Sequence[Budget], rows: Sequence[dict[str, Any]]
) -> list[str]:
    """The methods with their budgets that have no row."""
    measured = {(row["method"], row["budget"]) for row in rows}
    asked = ((method.name, str(budget)) for method in methods if method is not None for budget in budgets)
    return [" ".join(pair) for pair in asked if pair not in measured]


def print_rows(title: str, rows: Sequence[dict[str, Any]], left_out: Sequence[str]) -> None:
    """One table, or in a narrower terminal two; then what was left out."""
    console = console_for(wide=True)
    console.print(title)
    whole = tuple(range(len(COLUMNS)))
    width = console.measure(table_of(rows, whole), options=console.options.update(width=UNLIMITED)).maximum
    for columns in (whole,) if width <= console.width else PARTS:
        console.print(table_of(rows, columns))
    if left_out:
        console.print(f"left out, because the method does not go down to this budget: {', '.join(left_out)}")


def table_of(rows: Sequence[dict[str, Any]], columns: Sequence[int]) -> Table:
    """The columns of COLUMNS with these numbers."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number in columns:
        table.add_column(COLUMNS[number], justify="left" if number in (0, 2) else "right", no_wrap=True)
    for row in rows:
        cells = cells_of(row)
        table.add_row(*(Text(printable(cells[number])) for number in columns))
    return table


def cells_of(row: dict[str, Any]) -> list[str]:
    differences = [row["to_re_prefill"], row["to_dense"]]
    return [
        *(row["method"], row["budget"] or "-", row["history"]),
        *(f"{share:.1f}" for share in row["accuracy"]),
        *("-" if pair is None else f"{pair[0]:+.1f} [{pair[1][0]:+.1f}, {pair[1][1]:+.1f}]" for pair in differences),
        *(f"{row['prefilled_tokens']:.0f}", f"{row['prefill_ms']:.1f}", f"{row['cache_mb']:.2f}"),
    ]
