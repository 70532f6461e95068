"""Pictures of the vision tokens that each method kept after each drop point, drawn as an image or described for the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..evaluation.plans import Plan
from ..evaluation.records import Record
from ..evaluation.summary import prompt_shape_of
from ..loading.zoo import VisionLanguageModel
from ..models.config import LlavaOnevisionConfig
from ..models.vlm import VisionInput
from ..processing.images import ImageProcessor
from ..processing.opening import open_image
from ..processing.prompts import Request
from ..processing.video import read_frames
from ..tasks import Sample
from .lettering import LINE, lines_of

CELL = 240  # least height in pixels of one picture in a gallery
PLACE = 10  # least side in pixels of a place in it
LONGEST = 2048  # most pixels along one of its sides, whatever the other limits say
FRAMES_A_ROW = 4
FRAME_SIDE = 512  # longest side in pixels of a video's frame that is kept for a board
PIXELS = 12  # side of one place in a board's picture
MARGIN = 12
INK, PAPER = (30, 30, 30), (250, 250, 250)


@dataclass(frozen=True)
class GalleryRow:
    """One method's answer to a picture; `stages` are pairs of a layer and the patches that are left from this layer on."""

    method: str
    answer: str
    stages: Sequence[tuple[int, Sequence[int]]]


@dataclass(frozen=True)
class Board:
    """The pictures or frames of a prompt, as the vision tower sees them, cut into places; FRAMES_A_ROW of them side by side.

    `grid`: rows and columns of places. `cells`: for each vision token of the prompt the number of its place, -1 where it has
    none: newlines, and pictures and tiles that are cut otherwise than the first. `left_out` counts these pictures.
    """

    picture: Image.Image
    grid: tuple[int, int]
    cells: Sequence[int]
    left_out: int = 0

    def places(self, kept: Sequence[int]) -> list[int]:
        return [self.cells[number] for number in kept if self.cells[number] >= 0]


def board_of(vlm: VisionLanguageModel, request: Request) -> Board:
    """The board of a request with at least one picture or video."""
    _, media = vlm.tokens_and_media(request)
    panels = seen_pictures(vlm, request, media)
    grids = [medium.overview_grid[1:] for medium in media for _ in range(medium.overview_grid[0])]
    alike = [panel for panel, grid in zip(panels, grids, strict=True) if grid == grids[0]]
    (rows, columns), across, newlines = grids[0], min(FRAMES_A_ROW, len(alike)), newline_columns(vlm, media[0])
    columns -= newlines
    width, height, down = columns * PIXELS, rows * PIXELS, -(-len(alike) // across)
    picture = Image.new("RGB", (across * width, down * height), INK)
    line = int(len(alike) > 1)  # between pictures, so that similar frames can be told apart
    for place, panel in enumerate(alike):
        resized = panel.resize((width - line, height - line), Image.Resampling.BICUBIC)
        picture.paste(resized, (place % across * width, place // across * height))
    cells = board_cells(media, across, newlines)
    return Board(picture, (down * rows, across * columns), cells, left_out=len(panels) - len(alike))


def newline_columns(vlm: VisionLanguageModel, medium: VisionInput) -> int:
    """The number of columns of a medium's first grid that are newlines and show nothing: one in the frames of LLaVA-Video."""
    config = vlm.config
    return int(medium.is_video and isinstance(config, LlavaOnevisionConfig) and config.mm_newline_position == "grid")


def seen_pictures(vlm: VisionLanguageModel, request: Request, media: Sequence[VisionInput]) -> list[Image.Image]:
    """The pictures of a request, and those frames of its videos that have tokens of their own, in the order of the tokens."""
    processor, pictures, videos = vlm.image_processor, iter(request.images), iter(request.videos)
    seen: list[Image.Image] = []
    for medium in media:
        if medium.is_video:
            frames = read_frames(next(videos), vlm.sampling, shrink)
            seen += frames[:: -(-len(frames) // medium.overview_grid[0])]
        else:
            picture = open_image(next(pictures))
            seen.append(processor.to_square(picture) if isinstance(processor, ImageProcessor) else picture)
    return seen


def shrink(frame: Image.Image) -> Image.Image:
    """A frame no larger than a board shows it, its shape kept: a long video of large frames does not fit into memory."""
    frame.thumbnail((FRAME_SIDE, FRAME_SIDE), Image.Resampling.BICUBIC)
    return frame


def board_cells(media: Sequence[VisionInput], across: int, newlines: int) -> list[int]:
    """For each vision token the number of its place on a board with `across` pictures side by side; -1 for newlines."""
    _, rows, columns = media[0].overview_grid
    cells: list[int] = []
    place, shown = 0, columns - newlines
    for medium in media:
        for number, (frames, high, wide) in enumerate(medium.grids):
            if number != medium.overview or (high, wide) != (rows, columns):
                cells += [-1] * (frames * high * wide)
                continue
            for frame in range(place, place + frames):
                corner = (frame // across * rows * across + frame % across) * shown
                for start in range(corner, corner + rows * across * shown, across * shown):
                    cells += [*range(start, start + shown), *[-1] * newlines]
            place += frames
    return cells


def describe_gallery(
    task: str, sample: Sample, board: Board, answered: Sequence[tuple[Plan, Record]], num_layers: int
) -> dict[str, Any]:
    """One entry of galleries.json: what the tower sees, and what each plan kept and answered."""
    file = io.BytesIO()
    board.picture.save(file, format="PNG")
    return {
        "task": task,
        "sample_id": sample.sample_id,
        "question": sample.text.strip(),
        "answer": sample.answer,
        "picture": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        "grid": list(board.grid),
        "rows": [describe_answer(plan, record, num_layers, board) for plan, record in answered],
    }


def describe_answer(plan: Plan, record: Record, num_layers: int, board: Board) -> dict[str, Any]:
    schedule = plan.schedule_for(prompt_shape_of(vars(record), num_layers))
    entering = schedule.vision_tokens_per_layer(record.vision_tokens, num_layers)
    return {
        "method": plan.method,
        "label": plan.label,
        "asked_tokens": plan.asked_tokens,
        "answer": record.text,
        "correct": record.correct,
        "stages": [
            {"layer": layer, "tokens": entering[layer], "kept": board.places(kept), "merged": entering[layer] - len(kept)}
            for layer, kept in zip(schedule, record.kept, strict=True)
        ],
    }


def draw_gallery(board: Board, question: str, rows: Sequence[GalleryRow]) -> Image.Image:
    """For each method the picture, as the tower sees it, after each drop point; patches of dropped tokens are faded."""
    strips = [strip_of(board, row) for row in rows]
    width = max(CELL, *(strip.width for strip in strips))
    texts = [text_picture(text, width) for text in (question, *(f"{row.method}: {row.answer}" for row in rows))]
    parts = [texts[0], *(part for pair in zip(texts[1:], strips, strict=True) for part in pair)]
    gaps = [LINE, *[0, MARGIN] * len(rows)]  # below each part
    canvas = Image.new("RGB", (width + 2 * MARGIN, MARGIN + sum(gaps) + sum(part.height for part in parts)), PAPER)
    top = MARGIN
    for part, gap in zip(parts, gaps, strict=True):
        canvas.paste(part, (MARGIN, top))
        top += part.height + gap
    return canvas


def strip_of(board: Board, row: GalleryRow) -> Image.Image:
    """The pictures of one method side by side, each above its layer and the number of its tokens."""
    stages = row.stages or [(0, range(len(board.cells)))]
    pictures = [fade_dropped(board.picture, board.places(kept), board.grid) for _, kept in stages]
    captions = [text_picture(f"from layer {layer_idx}: {len(kept)} tokens") for layer_idx, kept in stages]
    widths = [max(picture.width, caption.width) for picture, caption in zip(pictures, captions, strict=True)]
    height = pictures[0].height
    strip = Image.new("RGB", (sum(widths) + MARGIN * (len(widths) - 1), height + LINE), PAPER)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = sum(widths[:number]) + MARGIN * number
        strip.paste(picture, (left, 0))
        strip.paste(caption, (left, height))
    return strip


def drawn_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels at which a board of these rows and columns is drawn: by CELL, PLACE and LONGEST."""
    rows, columns = grid
    side = min(max(CELL / rows, PLACE), LONGEST / max(rows, columns))
    return max(1, round(side * columns)), max(1, round(side * rows))


def fade_dropped(picture: Image.Image, kept: Sequence[int], grid: tuple[int, int]) -> Image.Image:
    """`picture` in its `drawn_size`, in which every place of `grid` that is not in `kept` is faded."""
    rows, columns = grid
    visible, size = np.zeros(rows * columns, dtype=np.uint8), drawn_size(grid)
    visible[list(kept)] = 255
    mask = Image.fromarray(visible.reshape(rows, columns)).resize(size, Image.Resampling.NEAREST)
    full = picture.resize(size, Image.Resampling.LANCZOS)
    faded = Image.blend(full, Image.new("RGB", full.size, PAPER), 0.85)
    return Image.composite(full, faded, mask)


def text_picture(text: str, width: int = LONGEST) -> Image.Image:
    """A text in lines of at most `width` pixels."""
    font, lines = lines_of(text, width)
    picture = Image.new("RGB", (max(int(font.getlength(line)) + 1 for line in lines), LINE * len(lines)), PAPER)
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        pen.text((0, LINE * number), line, fill=INK, font=font)
    return picture
