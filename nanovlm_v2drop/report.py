"""What a run leaves to look at: the table on screen, summary.json, and pictures of the vision tokens that were kept."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

CELL = 240  # pixels on a side of one picture in a gallery
MARGIN, LINE = 12, 20
INK, PAPER = (30, 30, 30), (250, 250, 250)


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


def write_summary(output: Path, run: dict[str, Any]) -> None:
    """`output`/summary.json: the object that also ends stdout, with the command that made it."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class GalleryRow:
    """One method's answer to a picture: `stages` are (layer, numbers of the patches that are left from it on)."""

    method: str
    answer: str
    stages: Sequence[tuple[int, Sequence[int]]]


def draw_gallery(picture: Image.Image, question: str, rows: Sequence[GalleryRow], grid_size: int) -> Image.Image:
    """For each method, what is left of the picture (as the tower sees it) at each stage, dropped patches faded."""
    columns = max(1, *(len(row.stages) for row in rows))
    height = MARGIN + 2 * LINE + len(rows) * (CELL + 2 * LINE + MARGIN)
    canvas = Image.new("RGB", (MARGIN + columns * (CELL + MARGIN), height), PAPER)
    pen = ImageDraw.Draw(canvas)
    write(pen, (MARGIN, MARGIN), question)
    for number, row in enumerate(rows):
        top = MARGIN + 2 * LINE + number * (CELL + 2 * LINE + MARGIN)
        write(pen, (MARGIN, top), f"{row.method}: {row.answer}")
        for column, (layer_idx, kept) in enumerate(row.stages or [(0, range(grid_size**2))]):
            left = MARGIN + column * (CELL + MARGIN)
            canvas.paste(fade_dropped(picture, kept, grid_size), (left, top + LINE))
            write(pen, (left, top + LINE + CELL), f"from layer {layer_idx}: {len(kept)} tokens")
    return canvas


def fade_dropped(picture: Image.Image, kept: Sequence[int], grid_size: int) -> Image.Image:
    """`picture` at CELL pixels a side, with every patch outside `kept` faded to a pale shadow of itself."""
    visible = np.zeros(grid_size**2, dtype=np.uint8)
    visible[list(kept)] = 255
    mask = Image.fromarray(visible.reshape(grid_size, grid_size)).resize((CELL, CELL), Image.Resampling.NEAREST)
    full = picture.resize((CELL, CELL), Image.Resampling.LANCZOS)
    faded = Image.blend(full, Image.new("RGB", full.size, PAPER), 0.85)
    return Image.composite(full, faded, mask)


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    pen.text(place, text, fill=INK, font=ImageFont.load_default(15))
