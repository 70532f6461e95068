"""Pictures of kept tokens, and the tables."""

import base64
import csv
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule
from nanovlm_v2drop.dropping.budget import Budget, Shape
from nanovlm_v2drop.evaluation.plans import Plan
from nanovlm_v2drop.models.vlm import VisionInput
from nanovlm_v2drop.report.gallery import (
    CELL,
    LONGEST,
    PAPER,
    PLACE,
    Board,
    GalleryRow,
    board_cells,
    describe_gallery,
    draw_gallery,
    drawn_size,
    fade_dropped,
)
from nanovlm_v2drop.report.results_csv import write_csv
from nanovlm_v2drop.report.tables import (
    WIDTH,
    best_rows,
    by_budget,
    print_details,
    print_parts,
    print_scores,
    printable,
)
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


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((12, 12), (CELL, CELL)),  # one picture of the demo
        ((12, 24), (2 * CELL, CELL)),  # eight frames of the demo
        ((128, 32), (320, 1280)),  # 64 frames of SmolVLM2: ten pixels a token, not two
        ((1, 107), (LONGEST, 19)),  # a ribbon of Qwen2-VL, which would be 25,680 pixels wide
        ((107, 1), (PLACE, 107 * PLACE)),
        ((1, 4000), (LONGEST, 1)),
    ],
)
def test_a_board_is_drawn_as_large_as_its_tokens_need_and_no_larger_than_a_picture_can_be_looked_at(grid, size):
    assert drawn_size(grid) == size
    assert fade_dropped(Image.new("RGB", (12, 12)), [0], grid).size == size


def test_captions_of_narrow_pictures_and_long_texts_stay_inside_the_gallery():
    """A caption is wider than a picture of one column; nothing may be cut or lie over its neighbour."""
    rows = [GalleryRow("v2drop", "yes " * 40, [(1, [0, 1]), (2, [0]), (3, [0])])]
    board = Board(Image.new("RGB", (12, 240)), (20, 1), range(20))
    narrow = draw_gallery(board, "Is it\nthere?", rows)
    captions = np.asarray(narrow)[-32:]
    gaps = np.flatnonzero((captions == PAPER).all(axis=(0, 2)))
    columns = np.split(gaps, np.flatnonzero(np.diff(gaps) > 1) + 1)
    assert sum(len(gap) >= 12 for gap in columns) == 4  # margins at both ends, and two gaps between three captions
    assert narrow.height > draw_gallery(board, "Is it there?", [GalleryRow("v2drop", "yes", rows[0].stages)]).height


@pytest.mark.parametrize(("width", "tables"), [(80, 1), (60, 2), (48, 3)])
def test_columns_that_do_not_fit_behind_the_named_ones_go_into_further_tables(width, tables, capsys):
    row = {
        "method": "divprune+v2drop:share=0.5:metric=cosine",
        "first": "10.25",
        "second\n%": "+0.0 [+0.0, +0.0]",
        "third": "3",
    }
    print_parts([row], ("method",), ("method",), Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("method") for line in lines) == tables
    cells = [cell for line in lines if line.startswith("divprune") for cell in re.split(r"\s{2,}", line.strip())]
    assert [cell for cell in cells if not cell.startswith("divprune")] == ["10.25", "+0.0 [+0.0, +0.0]", "3"]
    assert max(map(len, lines)) <= width


ROW = {
    "method": "v2drop", "label": "v2drop l1", "acts": "in the decoder", "task": "demo", "asked_tokens": 48.0,
    "vision_tokens": 144.0, "mean_vision_tokens": 48.25, "final_vision_tokens": 1.0, "score": 80.0,
    "score_interval": [70.0, 90.0], "relative_score": 97.5, "relative_interval": [95.0, 99.0], "difference": None,
    "difference_interval": None, "metrics": {"score": 80.0, "digit": 75.0}, "samples": 60, "timed": 8,
    "seeds": [0], "vision_ms": 3.21, "prefill_ms": 12.34, "decode_ms": 4.56, "total_ms": 20.11, "items_per_s": 50.0,
    "peak_memory_mb": 321.0, "decode_ms_per_token": None, "prefill_tflops": 0.000917, "kv_cache_mb": 1.52, "note": "",
    "paper": {},
}  # fmt: skip
DENSE = {**ROW, "method": "dense", "label": "dense", "asked_tokens": None, "items_per_s": 25.0}
BIAS = {
    "task": "demo", "method": "v2drop", "label": "v2drop l1", "asked_tokens": 48.0, "layer": 1, "kept_share": 0.33,
    "bins": [0.25, None, *[0.4] * 8], "kl_bits": 0.1234, "chi_square": 56.7, "frames": [0.3],
}  # fmt: skip


def printed(rows, bias=(), width=200) -> str:
    """All tables of a run, the first screen among them."""
    console = Console(record=True, width=width, file=io.StringIO(), markup=False, highlight=False)
    print_scores(rows, console)
    print_details(rows, bias, console)
    return console.export_text()


def first_screen(rows, styled=False) -> str:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), markup=False, highlight=False, force_terminal=styled)
    print_scores(rows, console)
    return console.export_text(styles=styled)


def line_of(text, name) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize(("relative", "shown"), [(None, ["-"]), (97.5, ["97.5", "±", "2.0"])])
def test_the_first_screen_has_scores_with_half_widths_tokens_and_times(relative, shown):
    cells = line_of(first_screen([DENSE, {**ROW, "relative_score": relative, "prefill_ms": 6.17}]), "v2drop l1")
    assert cells == ["v2drop", "l1", "48", "48.2", "80.0", "±", "10.0", *shown, "6.2", "2.00x"]


def test_without_dense_there_is_no_speed_up():
    assert line_of(first_screen([ROW]), "v2drop l1")[-1] == "-"


def test_the_first_screen_is_at_most_78_columns_wide_and_one_table_whatever_the_names_and_scores():
    wide = {"score": 1826.3, "score_interval": [1790.0, 1860.0], "relative_interval": [80.0, 100.0], "prefill_ms": 12345.6}
    name = "a method with a name that is far too long for a screen"
    text = first_screen([{**DENSE, **wide}, *({**ROW, **wide, "label": label} for label in (name, "short"))])
    assert max(map(len, text.splitlines())) <= 78
    assert sum(line.startswith("a method with") for line in text.splitlines()) == 1
    assert "1826 ± 35" in text
    published = {**wide, "asked_tokens": None, "label": "v2drop released-qwen2-vl"}
    assert "v2drop released-qwen2-vl  " in first_screen([{**DENSE, **wide}, {**ROW, **published}])


def test_the_best_of_those_that_met_a_budget_is_bold():
    rows = [
        {**ROW, "label": label, "relative_score": score, "mean_vision_tokens": tokens, "asked_tokens": 48.0}
        for label, score, tokens in (("second", 90.0, 48.0), ("best", 95.0, 48.3), ("over the budget", 99.0, 144.0))
    ]
    lines = first_screen(rows, styled=True).splitlines()
    bold = [line for line in lines if line.startswith("\x1b[1m") and "48" in line]
    assert ["best" in line for line in bold] == [True]
    assert best_rows(rows[:1]) == []


def test_names_with_square_brackets_are_printed_as_they_are():
    for name in ("mine[l2]", "a[/x]", "[bold]b[/bold]"):
        assert name in first_screen([{**ROW, "label": name, "note": f"a note on {name}"}])


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert printable("red\x1b[2J\r\nblue") == "red\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\nblue"


def test_pope_and_mme_show_what_papers_report_and_the_papers_own_numbers():
    pope = {"f1_random": 0.91, "f1_popular": 0.89, "f1_adversarial": 0.88, "f1_mean_of_categories": 0.893, "yes_ratio": 0.5}
    text = first_screen([{**ROW, "task": "pope", "metrics": {"score": 90.0, **pope}}])
    assert line_of(text.partition("papers report")[2], "v2drop l1")[2:] == ["48", "0.910", "0.890", "0.880", "0.893", "0.500"]
    assert line_of(text, "llava-1.5-7b, papers")[2:] == ["-", "0.873", "0.861", "0.842", "0.859", "-"]
    bounds = {"f1_random": [0.90, 0.93], "exact_accuracy": [0.4, 0.5]}
    text = first_screen([{**ROW, "task": "pope", "metrics": {**pope, "exact_accuracy": 0.45}, "metric_intervals": bounds}])
    assert "score: accuracy by the first sentence (LLaVA), %" in text
    assert "0.910 ± 0.015" in text
    assert "0.450 ± 0.050" in text
    mme = {"score": 1700.4, "perception": 1400.0, "cognition": 300.4, "accuracy": 0.8, "accuracy_plus": 0.6}
    text = first_screen([{**ROW, "task": "mme", "metrics": mme}])
    assert line_of(text.partition("papers report")[2], "v2drop l1")[2:] == ["48", "1700.4", "1400.0", "300.4", "0.800", "0.600"]
    assert line_of(text, "llava-1.5-7b, papers")[2:] == ["-", "1862.0", "1510.7", "-", "-", "-"]
    assert "papers" not in first_screen([ROW])


def test_rows_stand_by_budget_from_large_to_small_below_dense():
    rows = [{**ROW, "label": f"at {budget}", "asked_tokens": budget} for budget in (16.0, 48.0, None, 32.0)]
    order = [row["label"] for row in by_budget([*rows, DENSE])]
    assert order == ["dense", "at None", "at 48.0", "at 32.0", "at 16.0"]


def test_the_other_tables_have_intervals_costs_and_throughput():
    text = printed([DENSE, ROW])
    for cell in ("80.0 [70.0, 90.0]", "97.5 [95.0, 99.0]", "0.917", "1.52", "75.0", "12.3", "20.1", "50.0", "321", "2.00x"):
        assert cell in text
    assert "2.00x" not in printed([ROW])


def test_differences_to_v2drop_are_grouped_by_where_tokens_leave_and_starred_where_zero_is_outside():
    before = {"acts": "before the decoder", "difference": -4.0, "difference_interval": [-6.0, -2.0]}
    rows = [
        ROW,
        {**ROW, "method": "fastv", "label": "fastv", "score": 83.0, "difference": 3.0, "difference_interval": [-1.0, 7.0]},
        {**ROW, "method": "divprune", "label": "divprune", "score": 76.0, **before},
    ]
    text = printed(rows).split("by where tokens leave")[1]
    assert [line_of(text, name)[2] for name in ("divprune", "fastv")] == ["before", "in"]
    assert text.index("divprune") < text.index("fastv") < text.index("v2drop l1")
    assert "-4.0 [-6.0, -2.0]*" in text
    assert "+3.0 [-1.0, +7.0]\n" in text


def test_a_table_that_is_too_wide_goes_on_below_with_the_names_again():
    text = printed([DENSE, ROW], width=60)
    assert max(map(len, text.splitlines())) <= 60
    parts = text.partition("time and memory")[2]
    assert parts.count("v2drop l1") == 2
    assert {"peak MB", "beside dense"} <= {name for name in ("peak MB", "beside dense") if name in parts}


def test_notes_seeds_and_the_papers_numbers_are_printed_where_there_are_any():
    text = printed([{**ROW, "note": "cannot go lower", "seeds": [0, 1, 2], "paper": {"MME": 1712, "GQA": 56.3}}])
    for words in ("v2drop l1 x3 48: cannot go lower", "the paper's numbers", "MME", "1712", "56.3"):
        assert words in text
    assert "paper" not in printed([ROW])


def test_position_bias_is_a_table_of_tenths_and_an_empty_tenth_is_a_dash():
    cells = line_of(printed([ROW], [BIAS]).partition("by tenth")[2], "v2drop l1")
    assert cells == ["v2drop", "l1", "48", "1", "33", "25", "-", *["40"] * 8, "0.1234", "57"]


def test_what_is_kept_of_each_frame_is_a_table_for_videos_only():
    assert "by frame" not in printed([ROW], [BIAS])
    text = printed([ROW], [{**BIAS, "frames": [0.5, 0.25, *[0.1] * 30]}])
    cells = line_of(text.partition("by frame")[2], "v2drop l1")
    assert cells == ["v2drop", "l1", "48", "1", "50", *["10"] * 15]  # every second of 32


def test_a_spreadsheet_gets_one_line_a_row_with_bounds_and_the_tasks_own_numbers(tmp_path):
    alone = {**DENSE, "relative_score": None, "relative_interval": None}
    write_csv([alone, {**ROW, "seeds": [0, 1], "note": "a, b"}], tmp_path / "r.csv")
    dense, own = csv.DictReader((tmp_path / "r.csv").open())
    assert (own["score"], own["score_low"], own["score_high"], own["relative_high"]) == ("80.0", "70.0", "90.0", "99.0")
    assert (own["metric.digit"], own["seeds"], own["note"]) == ("75.0", "0 1", "a, b")
    assert (dense["asked_tokens"], dense["relative_score"], dense["relative_low"]) == ("", "", "")


def test_frames_of_a_video_lie_side_by_side_on_a_board_and_newlines_nowhere():
    """Four frames in a row and one below, each of 1 x 2 tokens, then a newline and a picture cut otherwise."""
    video = VisionInput(torch.zeros(0), ((5, 1, 2), (1, 1, 1)), (2, 4), is_video=True)
    other = VisionInput(torch.zeros(0), ((1, 2, 2),), (4, 4))
    cells = board_cells([video, other], across=4, newlines=0)
    assert cells == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1, -1, -1, -1, -1]
    assert Board(Image.new("RGB", (96, 24)), (2, 8), cells).places([0, 9, 10, 14]) == [0, 9]


def test_a_gallery_entry_counts_merged_tokens_and_lists_the_original_ones():
    schedule = DropSchedule({1: 0.5})
    plan = Plan("v2drop", DROPPERS["v2drop"], lambda shape: schedule, Shape(4, 2), Budget(tokens=2))
    answers = {"text": "yes", "correct": 1.0, "vision_tokens": 4, "vision_grids": [[1, 2, 2]], "kept": [[3]]}
    record = SimpleNamespace(**answers)
    sample = Sample("digit-1", " What? ", (), "no", "digit")
    board = Board(Image.new("RGB", (12, 12)), (2, 2), range(4))
    entry = describe_gallery("demo", sample, board, [(plan, record)], num_layers=3)
    assert (entry["question"], entry["answer"], entry["grid"]) == ("What?", "no", [2, 2])
    assert entry["rows"][0]["stages"] == [{"layer": 1, "tokens": 2, "kept": [3], "merged": 1}]
    picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (12, 12)
