"""--conversations: what later questions can still see, by every method and with every history, in one table."""

import argparse
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from ..dropping import TokenDropper
from ..dropping.budget import Budget
from ..evaluation.loading import load_model
from ..evaluation.methods import find_methods
from ..evaluation.plans import prompt_shape
from ..evaluation.summary import run_summary
from ..report.tables import GAP, console_for, print_parts, width_of
from ..research.conversations import TURNS, dialogues_for, measure_all, rows_of
from .planning import budgets_for

COLUMNS = (
    *("method", "budget", "history", *(f"Q{turn + 1}\n%" for turn in range(TURNS)), "later questions\n- re-prefill"),
    *("later questions\n- dense", "later turns\ntokens", "later turns\nms", "cache\nMB"),
)
NAMED = 3  # of these begin every line
# Where one table is too wide, the differences come last: then there are two tables on 80 columns.
NARROW = (*COLUMNS[: NAMED + TURNS], *COLUMNS[NAMED + TURNS + 2 :], *COLUMNS[NAMED + TURNS : NAMED + TURNS + 2])


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
    """One table, or in a narrower terminal several; then what was left out."""
    console = console_for(wide=True)
    console.print(title)
    cells = [dict(zip(COLUMNS, cells_of(row), strict=True)) for row in rows]
    fits = sum(GAP + width_of(name, itemgetter(name), cells) for name in COLUMNS) - GAP <= console.width
    ordered = [{name: row[name] for name in (COLUMNS if fits else NARROW)} for row in cells]
    print_parts(ordered, COLUMNS[:NAMED], ("method", "history"), console)
    if left_out:
        console.print(f"left out, because the method does not go down to this budget: {', '.join(left_out)}")


def cells_of(row: dict[str, Any]) -> list[str]:
    differences = [row["to_re_prefill"], row["to_dense"]]
    return [
        *(row["method"], row["budget"] or "-", row["history"]),
        *(f"{share:.1f}" for share in row["accuracy"]),
        *("-" if pair is None else f"{pair[0]:+.1f} [{pair[1][0]:+.1f}, {pair[1][1]:+.1f}]" for pair in differences),
        *(f"{row['prefilled_tokens']:.0f}", f"{row['prefill_ms']:.1f}", f"{row['cache_mb']:.2f}"),
    ]
