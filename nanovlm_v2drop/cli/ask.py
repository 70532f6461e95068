"""One question about pictures or a video, with every method and budget: a table of the answers, and what each method kept."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..demo.scenes import IMAGE_SIZE
from ..evaluation.loading import load_model
from ..evaluation.machine import timestamp
from ..evaluation.methods import find_methods
from ..evaluation.plans import Plan, first_seeds, prompt_shape
from ..evaluation.summary import model_line, run_summary
from ..inference import MAX_NEW_TOKENS, decode_tokens, decode_until, prefill
from ..loading.specs import PICTURE, VIDEO
from ..loading.zoo import VisionLanguageModel
from ..models.parallel import Processes
from ..models.vlm import PackedInputs
from ..processing.images import open_image
from ..processing.prompts import Request
from ..processing.video import UniformSampling, read_frames
from ..report.gallery import GalleryRow, board_of, draw_gallery
from ..report.tables import NAME_ROOM, console_for, printable
from .arguments import DEMOS
from .models import fitting_model, physical_memory_gb
from .planning import output_folder, plans_for

Row = dict[str, Any]


def answer_one(arguments: argparse.Namespace, processes: Processes) -> Row:
    """Answer --prompt with every plan; the first process prints a table and draws what was kept."""
    find_methods(arguments.methods)
    path = output_folder(arguments) / "kept.png"
    request = question_about(arguments, arguments.prompt)
    vlm = load_model(arguments)
    plans = first_seeds(plans_for(prompt_shape(vlm, request), arguments))
    answers = answers_of(vlm, request, plans)
    results = [row for row, _ in answers]
    if not processes.is_first:
        return run_summary(vlm, results)
    print_answers(vlm, request, results, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    board = board_of(vlm, request)
    draw_gallery(board, arguments.prompt, [drawn for _, drawn in answers]).save(path)
    note = f"; not drawn, because of another shape than the first picture: {board.left_out}" if board.left_out else ""
    print(f"kept tokens: {path}{note}")
    return {**run_summary(vlm, results), "picture": str(path)}


def question_about(arguments: argparse.Namespace, text: str) -> Request:
    """A request about --image and --video, which are decoded here, before any weights are loaded.

    Raises ValueError for a blank text, and for a file that is no picture or video.
    """
    if not text.strip():
        raise ValueError(f"--prompt {text!r} is blank; give a question")
    if arguments.video is not None:
        read_frames(arguments.video, UniformSampling(1))
    pictures = [open_image(picture) for picture in arguments.image or ()]
    return Request(text=text, images=pictures, video=None if arguments.video is None else str(arguments.video))


def answers_of(vlm: VisionLanguageModel, request: Request, plans: Sequence[Plan]) -> list[tuple[Row, GalleryRow]]:
    """The row and the drawing of every plan. The first prefill of a process is slow, so one is made before and not counted."""
    started = timestamp(vlm.device)
    packed = vlm.prepare([request])
    vision_ms = (timestamp(vlm.device) - started) * 1000
    prefill(vlm.model.language_model, packed)
    return [answer_with(vlm, packed, plan, vision_ms) for plan in plans]


def answer_with(vlm: VisionLanguageModel, packed: PackedInputs, plan: Plan, vision_ms: float) -> tuple[Row, GalleryRow]:
    decoder = vlm.model.language_model
    started = timestamp(vlm.device)
    with plan.answering():
        prefilled = prefill(decoder, packed, plan.dropper)
        filled = timestamp(vlm.device)
        (token_ids,) = decode_until(decode_tokens(decoder, prefilled), vlm.config.eos_token_ids, MAX_NEW_TOKENS)
    finished = timestamp(vlm.device)
    text = vlm.tokenizer.decode(token_ids).strip()
    entering = plan.schedule.vision_tokens_per_layer(packed.vision_counts[0], vlm.config.text_config.num_hidden_layers)
    row = {
        "method": plan.method,
        "label": plan.label,
        "asked_tokens": plan.asked_tokens,
        "text": text,
        "vision_tokens": packed.vision_counts[0],
        "mean_vision_tokens": round(sum(entering) / len(entering), 2),
        "final_vision_tokens": entering[-1],
        "prefill_ms": round((filled - started) * 1000, 3),
        "total_ms": round(vision_ms + (finished - started) * 1000, 3),
        "note": plan.note_on([plan.shape]),
    }
    return row, GalleryRow(plan.row, text, [(layer, kept[0].tolist()) for layer, kept in prefilled.kept])


def print_answers(vlm: VisionLanguageModel, request: Request, rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    """The answers with their tokens and times, and notes on single rows."""
    console = console_for(wide=False)
    console.print(model_line(vlm))
    if note := beyond_demo(vlm, request, arguments):
        console.print(note)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold", max_width=NAME_ROOM - 3)  # the answer needs its ten columns
    for name in ("vision\ntokens", "mean a\nlayer", "last\nlayer", "prefill\nms", "total\nms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answer", min_width=10)
    for row in rows:
        name = row["label"] if row["asked_tokens"] is None else f"{row['label']} {row['asked_tokens']:g}"
        counts = f"{row['vision_tokens']}", f"{row['mean_vision_tokens']:.1f}", f"{row['final_vision_tokens']}"
        times = f"{row['prefill_ms']:.1f}", f"{row['total_ms']:.1f}"
        table.add_row(*(Text(printable(cell)) for cell in (name, *counts, *times, row["text"])))
    console.print(table)
    for row in rows:
        if row["note"]:
            console.print(f"{row['label']}: {row['note']}")


def beyond_demo(vlm: VisionLanguageModel, request: Request, arguments: argparse.Namespace) -> str:
    """A note where a demo is shown a picture or video that it cannot know, with a model that would fit; else ""."""
    sizes = [picture.size for picture in media_of(request)]
    odd = next((size for size in sizes if size != (IMAGE_SIZE, IMAGE_SIZE)), None)
    if vlm.name not in DEMOS or odd is None:
        return ""
    note = (
        f"note: {vlm.name} knows only synthetic scenes of {IMAGE_SIZE} x {IMAGE_SIZE} pixels. This is {odd[0]} x {odd[1]}, "
        "so its answers mean nothing"
    )
    on_gpu = vlm.device.type == "cuda"
    memory = torch.cuda.mem_get_info(vlm.device)[1] / 1e9 if on_gpu else physical_memory_gb()
    spec = fitting_model(memory, PICTURE if arguments.video is None else VIDEO)
    if spec is None:
        return f"{note}."
    return f"{note}; --model {spec.name} fits this machine ({spec.download_size:.1f} GB to download)."


def media_of(request: Request) -> list[Image.Image]:
    """The pictures of a request, and one frame of each of its videos."""
    frames = [frame for video in request.videos for frame in read_frames(video, UniformSampling(1))]
    return [open_image(picture) for picture in request.images] + frames
