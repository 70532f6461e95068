"""The rows of a run: how they are named, which budget they belong to, and by what they are ranked."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..dropping import DROPPERS
from ..evaluation.plans import DENSE

Row = Mapping[str, Any]

PUBLISHED = "published"  # the budget of rows that follow a released setting instead of a number of tokens
BUDGET_MARGIN = 1.05  # a method whose mean is further above the budget did not meet it


def title_of(method: str) -> str:
    """A method by the name of its class: V2Drop for v2drop."""
    return DROPPERS[method].__name__ if method in DROPPERS else method


def label_of(row: Row) -> str:
    return row["label"].replace(row["method"], title_of(row["method"]), 1)


def budget_of(row: Row) -> str:
    return PUBLISHED if row["asked_tokens"] is None else f"{row['asked_tokens']:g}"


def timed_note(rows: Sequence[Row]) -> str:
    """Of how many questions a task's times and peak memories are."""
    counts = sorted({row["timed"] for row in rows if row["timed"]})
    if not counts:
        return "times: none were taken"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"times: of {number} questions, each answered once more by every method alone"


def at_budget(rows: Sequence[Row], budget: str) -> list[Row]:
    return [row for row in rows if row["method"] != DENSE and budget_of(row) == budget]


def met_budget(row: Row) -> bool:
    return row["asked_tokens"] is None or row["mean_vision_tokens"] <= row["asked_tokens"] * BUDGET_MARGIN


def standing(row: Row) -> tuple[float, Sequence[float]]:
    """The value and interval that methods are ranked by: the share of dense's score, or the score itself without dense."""
    if row["relative_score"] is None:
        return row["score"], row["score_interval"]
    return row["relative_score"], row["relative_interval"]


def by_place(row: Row) -> tuple[float, str, float]:
    """Sorts rows by budget, from large to small, then by where tokens leave, then by score, the best first."""
    return -(row["asked_tokens"] or float("inf")), row["acts"], -row["score"]


def leaves_out_zero(bounds: Sequence[float]) -> bool:
    """Whether an interval of a difference lies on one side of zero."""
    return bounds[0] > 0 or bounds[1] < 0
