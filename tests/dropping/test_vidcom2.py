"""VidCom2 beside the authors' code, at the totals that it keeps."""

import pytest
import torch
from golden_inputs import in_a_prompt, open_parts, tokens, video, vision_after

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule
from nanovlm_v2drop.dropping.vidcom2 import frame_rates, similarities

VidCom2 = DROPPERS["vidcom2"]
PARTS, INPUTS, OUTPUTS = open_parts("vidcom2_b")
EXACT = [part for part in PARTS if part != "capped60"]


def in_frames(part):
    return INPUTS[part]["features"].unflatten(0, (PARTS[part]["frames"], -1))


@pytest.mark.parametrize("part", PARTS)
def test_scores_and_rates_equal_the_authors_code(part):
    to_video, to_frame = similarities(in_frames(part))
    torch.testing.assert_close(to_video + to_frame, OUTPUTS[part]["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(frame_rates(to_video, PARTS[part]["rate"]), OUTPUTS[part]["rates"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", EXACT)
def test_at_the_authors_total_the_same_tokens_stay_and_so_does_onevisions_newline(part):
    features, frames, size = INPUTS[part]["features"], PARTS[part]["frames"], PARTS[part]["size"]
    side = round(size**0.5)
    newline = torch.ones(1, features.shape[1])
    packed = in_a_prompt(torch.cat([features, newline]), [(frames, side, side), (1, 1, 1)])
    kept, _ = vision_after(VidCom2(CountSchedule({0: PARTS[part]["total"] + 1})), packed)
    assert kept == [*OUTPUTS[part]["kept"].tolist(), len(features)]


@pytest.mark.parametrize("part", ["llavavideo25", "llavavideo15"])
def test_llava_videos_newlines_stay_and_are_counted(part):
    frames = in_frames(part).unflatten(1, (13, 13))
    newlines = torch.ones(len(frames), 13, 1, frames.shape[-1])
    features = torch.cat([frames, newlines], dim=2).flatten(0, 2)
    packed = in_a_prompt(features, [(len(frames), 13, 14)])
    kept, _ = vision_after(VidCom2(CountSchedule({0: PARTS[part]["total"] + 13 * len(frames)})), packed)
    assert kept == sorted(OUTPUTS[part]["rows_with_newlines"].tolist())


def test_what_a_full_frame_cannot_use_goes_to_the_others():
    part = "capped60"
    features, frames, size = INPUTS[part]["features"], PARTS[part]["frames"], PARTS[part]["size"]
    kept, _ = vision_after(VidCom2(CountSchedule({0: 470})), in_a_prompt(features, [(frames, 14, 14)]))
    assert len(kept) == 470  # the authors' code keeps 463 of the 470 that its rate asks for
    counts = torch.tensor(kept).div(size, rounding_mode="floor").bincount()
    assert counts.max() == size == OUTPUTS[part]["counts"].max()
    assert (counts >= OUTPUTS[part]["counts"]).all()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 100, 143])
def test_any_count_is_met_and_no_frame_is_empty_where_it_suffices(count):
    kept, _ = vision_after(VidCom2(CountSchedule({0: count})), in_a_prompt(video(3, 4, 36, 16), [(4, 6, 6)]))
    assert len(set(kept)) == count
    assert len({number // 36 for number in kept}) >= min(count, 4)


def test_a_frame_that_takes_almost_everything_leaves_one_token_to_each_other_frame():
    frames = tokens(3, 4 * 36, 16).unflatten(0, (4, 36)) * 0.02 + torch.ones(16)
    frames[2] = tokens(9, 36, 16)
    kept, _ = vision_after(VidCom2(CountSchedule({0: 5})), in_a_prompt(frames.flatten(0, 1), [(4, 6, 6)]))
    counts = torch.tensor(kept).div(36, rounding_mode="floor").bincount(minlength=4)
    assert counts.tolist() == [1, 1, 2, 1]
