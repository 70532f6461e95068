"""HoloV beside the authors' code. The form without its quirks meets the count and keeps the order."""

import pytest
import torch
from golden_inputs import attention, in_a_prompt, open_parts, tokens, vision_after

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule
from nanovlm_v2drop.dropping.holov import Runs
from nanovlm_v2drop.dropping.state import MERGED

HoloV = DROPPERS["holov"]
PARTS, INPUTS, OUTPUTS = open_parts("holov_b")


def prompt_of(part):
    features = INPUTS[part]["features"]
    return in_a_prompt(features, [(1, 1, len(features))], INPUTS[part]["attention"])


@pytest.mark.parametrize("part", PARTS)
def test_tokens_their_order_and_zero_rows_equal_the_authors_code(part):
    count, wanted = PARTS[part]["count"], OUTPUTS[part]["rows"].tolist()
    kept, rows = vision_after(HoloV(CountSchedule({0: count}), released=True), prompt_of(part))
    assert kept == [number if number >= 0 else MERGED for number in wanted]
    assert kept.count(MERGED) == PARTS[part]["zero_rows"]
    assert torch.equal(rows, INPUTS[part]["features"][kept] * (torch.tensor(kept) >= 0)[:, None])
    runs = Runs(INPUTS[part]["attention"].mean(0))
    # Where the features' variance cancels, 6e-6 of it is left.
    scores = OUTPUTS[part]["run_scores"]
    torch.testing.assert_close(runs.weights, scores / scores.sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", ["64", "128", "192"])
def test_the_official_settings_are_the_released_form(setting):
    part = f"plain{setting}"
    kept, _ = vision_after(HoloV.official(setting), prompt_of(part))
    assert kept == OUTPUTS[part]["rows"].tolist()


@pytest.mark.parametrize("part", PARTS)
def test_without_the_released_quirks_the_count_is_met_in_reading_order(part):
    count = PARTS[part]["count"]
    kept, rows = vision_after(HoloV(CountSchedule({0: count})), prompt_of(part))
    released = [number for number in OUTPUTS[part]["rows"].tolist() if number >= 0]
    assert kept == sorted(kept)
    assert len(set(kept)) == count
    assert set(released) <= set(kept)  # the rest of a full run goes to others
    assert torch.equal(rows, INPUTS[part]["features"][kept])


@pytest.mark.parametrize("count", [1, 5, 17, 39])
def test_a_picture_of_any_size_keeps_any_count(count):
    packed = in_a_prompt(tokens(1, 40, 8), [(1, 5, 8)], attention(2, 3, 40, 3, 8))
    assert len(set(vision_after(HoloV(CountSchedule({0: count})), packed)[0])) == count
    assert len(vision_after(HoloV(CountSchedule({0: count}), released=True), packed)[0]) == count
