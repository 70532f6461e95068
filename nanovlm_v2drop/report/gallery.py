"""Pictures of the vision tokens that each method kept, stage by stage: drawn, or described for the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..evaluate import Record
from ..plans import Plan
from ..tasks import Sample

CELL = 240  # pixels on a side of one picture in a gallery
MARGIN, LINE = 12, 20
INK, PAPER = (30, 30, 30), (250, 250, 250)


@dataclass(frozen=True)
class GalleryRow:
    """One method's answer to a picture: `stages` are (layer, numbers of the patches that are left from it on)."""

    method: str
    answer: str
    stages: Sequence[tuple[int, Sequence[int]]]


def describe_gallery(
    task: str, sample: Sample, picture: Image.Image, grid_size: int, answered: Sequence[tuple[Plan, Record]], num_layers: int
) -> dict[str, Any]:
    """One entry of galleries.json: the picture as the tower sees it, and what each plan kept and answered."""
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return {
        "task": task,
        "sample_id": sample.sample_id,
        "question": sample.text.strip(),
        "answer": sample.answer,
        "picture": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        "grid": [grid_size, grid_size],
        "rows": [describe_answer(plan, record, num_layers) for plan, record in answered],
    }


def describe_answer(plan: Plan, record: Record, num_layers: int) -> dict[str, Any]:
    entering = plan.schedule.vision_tokens_per_layer(record.vision_tokens, num_layers)
    return {
        "method": plan.method,
        "label": plan.label,
        "asked_tokens": plan.asked_tokens,
        "answer": record.text,
        "correct": record.correct,
        "stages": [
            {"layer": layer, "tokens": entering[layer], "kept": kept}
            for layer, kept in zip(plan.schedule, record.kept, strict=True)
        ],
    }


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
