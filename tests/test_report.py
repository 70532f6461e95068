"""Pictures of kept tokens, and the table."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from nanovlm_v2drop.report.gallery import CELL, GalleryRow, draw_gallery, fade_dropped
from nanovlm_v2drop.report.tables import print_table


def test_kept_patches_stay_as_they_are_and_dropped_ones_fade():
    picture = Image.new("RGB", (12, 12), (200, 0, 0))
    faded = np.asarray(fade_dropped(picture, [1], grid_size=2))
    half = CELL // 2
    assert (faded[:half, half:] == (200, 0, 0)).all()
    assert (faded[:half, :half, 1] > 200).all()
    assert (faded[half:, :, 1] > 200).all()


def test_a_gallery_has_one_row_a_method_and_one_column_a_stage():
    rows = [GalleryRow("dense", "yes", []), GalleryRow("v2drop", "no", [(1, [0, 1]), (2, [0])])]
    gallery = draw_gallery(Image.new("RGB", (12, 12)), "Is it?", rows, grid_size=2)
    assert gallery.size[0] > 2 * CELL
    assert gallery.size[1] > 2 * CELL
    without = draw_gallery(Image.new("RGB", (12, 12)), "Is it?", rows[:1], grid_size=2)
    assert without.size[0] < 2 * CELL


@pytest.mark.parametrize(("relative", "shown"), [(None, "-"), (97.5, "97.5 % [95.0, 99.0]")])
def test_the_table_shows_scores_with_their_intervals(relative, shown):
    row = {
        "method": "v2drop", "task": "demo", "asked_tokens": 48.0, "vision_tokens": 144.0, "mean_vision_tokens": 48.25,
        "score": 80.0, "score_interval": [70.0, 90.0], "relative_score": relative,
        "relative_interval": relative and [95.0, 99.0], "metrics": {"score": 80.0, "digit": 75.0}, "samples": 60,
        "prefill_ms": 12.34, "prefill_tflops": 0.000917, "kv_cache_mb": 1.52,
    }  # fmt: skip
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table([row], console)
    text = console.export_text()
    assert "80.0 [70.0, 90.0]" in text
    assert shown in text
    assert "48.2" in text
    assert "digit" in text
