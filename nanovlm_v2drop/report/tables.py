"""The tables of a run on screen."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """One line a method and budget, one table a task; intervals are 95 %."""
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        table = Table(title=f"{task}: {own[0]['samples']} samples, {own[0]['vision_tokens']:g} vision tokens a prompt")
        for title in ("method", "asked", "mean tokens", "score", "relative to dense", "prefill ms", "TFLOPs", "KV MB"):
            table.add_column(title, justify="left" if title == "method" else "right")
        for row in own:
            table.add_row(*table_cells(row))
        console.print(table)
        print_kinds(own, console)


def table_cells(row: dict[str, Any]) -> list[str]:
    asked = "-" if row["asked_tokens"] is None else f"{row['asked_tokens']:g}"
    relative = "-" if row["relative_score"] is None else with_interval(row["relative_score"], row["relative_interval"], " %")
    return [
        row["method"],
        asked,
        f"{row['mean_vision_tokens']:.1f}",
        with_interval(row["score"], row["score_interval"]),
        relative,
        f"{row['prefill_ms']:.1f}",
        f"{row['prefill_tflops']:.4g}",
        f"{row['kv_cache_mb']:.2f}",
    ]


def with_interval(value: float, bounds: Sequence[float], unit: str = "") -> str:
    return f"{value:.1f}{unit} [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def print_kinds(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The task's own numbers beside the headline: question kinds, sub-metrics."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"] if name != "score"))
    table = Table(title=f"{rows[0]['task']}: by kind")
    for title in ("method", "asked", *names):
        table.add_column(title, justify="left" if title == "method" else "right")
    for row in rows:
        values = [f"{row['metrics'][name]:.4g}" if name in row["metrics"] else "-" for name in names]
        table.add_row(*table_cells(row)[:2], *values)
    console.print(table)
