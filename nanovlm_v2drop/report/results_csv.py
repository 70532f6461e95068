"""results.csv: the rows of a run for a spreadsheet or pandas, one line a method and budget."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIELDS = (
    "task", "method", "label", "acts", "asked_tokens", "vision_tokens", "mean_vision_tokens", "final_vision_tokens", "samples",
    "seeds", "score", "score_low", "score_high", "relative_score", "relative_low", "relative_high", "difference",
    "difference_low", "difference_high", "vision_ms", "prefill_ms", "decode_ms", "decode_ms_per_token", "total_ms",
    "items_per_s", "prefill_tflops", "kv_cache_mb", "peak_memory_mb", "note",
)  # fmt: skip


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows; the task's own numbers are columns `metric.NAME`, and what was not measured is an empty cell."""
    lines = [csv_line(row) for row in rows]
    metrics = list(dict.fromkeys(name for line in lines for name in line if name.startswith("metric.")))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*FIELDS, *metrics], restval="")
        writer.writeheader()
        writer.writerows(lines)


def csv_line(row: Mapping[str, Any]) -> dict[str, Any]:
    score_low, score_high = row["score_interval"]
    relative_low, relative_high = row["relative_interval"] or (None, None)
    difference_low, difference_high = row["difference_interval"] or (None, None)
    bounds = {"score_low": score_low, "score_high": score_high, "relative_low": relative_low, "relative_high": relative_high}
    bounds |= {"difference_low": difference_low, "difference_high": difference_high}
    known = {**row, **bounds, "seeds": " ".join(map(str, row["seeds"]))}
    metrics = {f"metric.{name}": value for name, value in row["metrics"].items() if name != "score"}
    return {**{name: known[name] for name in FIELDS}, **metrics}
