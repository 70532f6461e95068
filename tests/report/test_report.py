"""Pictures of kept tokens, and the tables."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.evaluation.plans import Plan
from nanovlm_v2drop.models.vlm import VisionInput
from nanovlm_v2drop.report.gallery import CELL, Board, GalleryRow, board_cells, describe_gallery, draw_gallery, fade_dropped
from nanovlm_v2drop.report.tables import print_run
from nanovlm_v2drop.tasks import Sample


def test_kept_patches_stay_as_they_are_and_dropped_ones_fade():
    picture = Image.new("RGB", (12, 12), (200, 0, 0))
    faded = np.asarray(fade_dropped(picture, [1], (2, 2)))
    half = CELL // 2
    assert (faded[:half, half:] == (200, 0, 0)).all()
    assert (faded[:half, :half, 1] > 200).all()
    assert (faded[half:, :, 1] > 200).all()


def test_a_gallery_has_one_row_a_method_and_one_column_a_stage():
    rows = [GalleryRow("dense", "yes", []), GalleryRow("v2drop", "no", [(1, [0, 1]), (2, [0])])]
    board = Board(Image.new("RGB", (12, 12)), (2, 2), range(4))
    gallery = draw_gallery(board, "Is it?", rows)
    assert gallery.size[0] > 2 * CELL
    assert gallery.size[1] > 2 * CELL
    without = draw_gallery(board, "Is it?", rows[:1])
    assert without.size[0] < 2 * CELL


ROW = {
    "method": "v2drop", "label": "v2drop l1", "task": "demo", "asked_tokens": 48.0, "vision_tokens": 144.0,
    "mean_vision_tokens": 48.25, "final_vision_tokens": 1.0, "score": 80.0, "score_interval": [70.0, 90.0],
    "relative_score": 97.5, "relative_interval": [95.0, 99.0], "metrics": {"score": 80.0, "digit": 75.0}, "samples": 60,
    "seeds": [0], "vision_ms": 3.21, "prefill_ms": 12.34, "decode_ms": 4.56, "total_ms": 20.11, "items_per_s": 50.0,
    "peak_memory_mb": 321.0, "prefill_tflops": 0.000917, "kv_cache_mb": 1.52, "note": "", "paper": {},
}  # fmt: skip
DENSE = {**ROW, "method": "dense", "label": "dense", "asked_tokens": None, "items_per_s": 25.0}
BIAS = {
    "task": "demo", "method": "v2drop", "label": "v2drop l1", "asked_tokens": 48.0, "layer": 1, "kept_share": 0.33,
    "bins": [0.25, None, *[0.4] * 8], "kl_bits": 0.1234, "chi_square": 56.7, "frames": [0.3],
}  # fmt: skip


def printed(rows, bias=()) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_run(rows, bias, console)
    return console.export_text()


@pytest.mark.parametrize(("relative", "shown"), [(None, "│          - │"), (97.5, "97.5 [95.0, 99.0]")])
def test_the_table_shows_scores_with_their_intervals_and_costs(relative, shown):
    text = printed([{**ROW, "relative_score": relative}])
    for cell in ("v2drop l1", "48.2", "80.0 [70.0, 90.0]", "0.917", "1.52", "75", "12.3", "20.1", "50.0", "321", shown):
        assert cell in text


def test_throughput_stands_beside_dense_where_dense_ran():
    assert "2.00x" in printed([DENSE, ROW])
    assert "2.00x" not in printed([ROW])


def test_notes_seeds_and_the_papers_numbers_are_printed_where_there_are_any():
    text = printed([{**ROW, "note": "cannot go lower", "seeds": [0, 1, 2], "paper": {"MME": 1712, "GQA": 56.3}}])
    for words in ("v2drop l1 48: cannot go lower", "the paper's numbers", "MME", "1712", "56.3"):
        assert words in text
    assert "paper" not in printed([ROW])


def test_position_bias_is_a_table_of_tenths_and_an_empty_tenth_is_a_dash():
    text = printed([ROW], [BIAS])
    cells = [cell.strip() for cell in text.splitlines()[-2].strip("│").split("│")]
    assert cells == ["v2drop l1", "48", "1", "33", "25", "-", *["40"] * 8, "0.1234", "57"]


def test_what_is_kept_of_each_frame_is_a_table_for_videos_only():
    assert "by frame" not in printed([ROW], [BIAS])
    text = printed([ROW], [{**BIAS, "frames": [0.5, 0.25, *[0.1] * 30]}])
    cells = [cell.strip() for cell in text.splitlines()[-2].strip("│").split("│")]
    assert cells == ["v2drop l1", "48", "1", "50", *["10"] * 15]  # every second of 32


def test_frames_of_a_video_lie_side_by_side_on_a_board_and_newlines_nowhere():
    """Four frames in a row and one below, each of 1 x 2 tokens, then a newline and a picture cut otherwise."""
    video = VisionInput(torch.zeros(0), ((5, 1, 2), (1, 1, 1)), (2, 4), is_video=True)
    other = VisionInput(torch.zeros(0), ((1, 2, 2),), (4, 4))
    cells = board_cells([video, other], across=4, newlines=0)
    assert cells == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1, -1, -1, -1]
    assert Board(Image.new("RGB", (96, 24)), (2, 8), cells).places([0, 9, 10, 14]) == [0, 9]


def test_a_gallery_entry_counts_merged_tokens_and_lists_the_original_ones():
    schedule = DropSchedule({1: 0.5})
    plan = Plan("v2drop", DROPPERS["v2drop"](schedule), 2.0)
    answers = {"text": "yes", "correct": 1.0, "vision_tokens": 4, "kept": [[3]]}
    record = SimpleNamespace(**answers)
    sample = Sample("digit-1", " What? ", (), "no", "digit")
    board = Board(Image.new("RGB", (12, 12)), (2, 2), range(4))
    entry = describe_gallery("demo", sample, board, [(plan, record)], num_layers=3)
    assert (entry["question"], entry["answer"], entry["grid"]) == ("What?", "no", [2, 2])
    assert entry["rows"][0]["stages"] == [{"layer": 1, "tokens": 2, "kept": [3], "merged": 1}]
    picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (12, 12)
