"""FastVID beside its rules in loops."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden_inputs import attention, in_a_prompt, tokens, video, vision_after

from nanovlm_v2drop.dropping import DROPPERS, CountSchedule
from nanovlm_v2drop.dropping.fastvid import segments_of
from nanovlm_v2drop.inference import initial_state

FastVID = DROPPERS["fastvid"]


def scene(frames: int, size: int, seed: int = 0, noise: float = 0.1) -> torch.Tensor:
    """Frames (frames, size, 24) of three scenes, one after the other."""
    scenes = tokens(seed, 3 * size, 24).unflatten(0, (3, size))
    chosen = scenes[torch.arange(frames) * 3 // frames]
    return chosen + noise * torch.randn(chosen.shape, generator=torch.Generator().manual_seed(seed + 1))


def test_segments_start_at_the_least_similar_frames_and_hold_anchors_in_every_fourth_frame():
    frames = scene(24, 6, noise=0.01)
    similarity = [float(F.cosine_similarity(a.mean(0), b.mean(0), dim=0)) for a, b in pairwise(frames)]
    least = sorted(range(23), key=similarity.__getitem__)[:7]
    cuts = {0} | {place + 1 for place in range(23) if place in least or similarity[place] < 0.9}
    segments, has_anchors = segments_of(frames)
    start = 0
    for frame in range(24):
        start = frame if frame in cuts else start
        assert int(segments[frame]) == sum(cut <= frame for cut in cuts)
        assert bool(has_anchors[frame]) == ((frame - start) % 4 == 0)


@pytest.mark.parametrize("count", [1, 2, 9, 40, 107])
def test_any_count_is_met_and_salient_tokens_are_those_with_most_attention(count):
    features, received = scene(12, 9, noise=0.01).flatten(0, 1), attention(5, 2, 108)
    kept, rows = vision_after(FastVID(CountSchedule({0: count})), in_a_prompt(features, [(12, 3, 3)], received))
    assert kept == sorted(set(kept))
    assert len(kept) == count
    is_plain = (rows == features[kept]).all(-1)
    assert is_plain.sum() >= count - int(0.4 * count)  # all but anchors stay as they are


def test_an_anchor_holds_at_least_sixty_percent_of_itself_and_the_mean_of_its_tokens():
    features, received = scene(8, 9).flatten(0, 1), attention(6, 2, 72)
    kept, rows = vision_after(FastVID(CountSchedule({0: 10})), in_a_prompt(features, [(8, 3, 3)], received))
    segments, has_anchors = segments_of(features.unflatten(0, (8, 9)))
    anchors = [token for token, row in zip(kept, rows, strict=True) if not torch.equal(row, features[token])]
    assert 1 <= len(anchors) <= 4
    for token in anchors:
        assert has_anchors[token // 9]
        row, own = rows[kept.index(token)], features[token]
        rivals = [other for other in anchors if segments[other // 9] == segments[token // 9]]
        joined = []
        for other in set(range(72)) - set(kept):
            if segments[other // 9] == segments[token // 9]:
                like = {rival: float(F.cosine_similarity(features[other], features[rival], dim=0)) for rival in rivals}
                joined += [features[other]] if max(like, key=like.get) == token else []
        weight = max(1 / (len(joined) + 1), 0.6)
        torch.testing.assert_close(row, weight * own + (1 - weight) * torch.stack(joined).mean(0), atol=1e-5, rtol=0)


def test_position_ids_are_kept():
    packed = in_a_prompt(video(3, 8, 16, 24), [(8, 4, 4)], attention(2, 2, 128))
    dropper = FastVID(CountSchedule({0: 30}))
    kept, _ = vision_after(dropper, packed)
    after = dropper(initial_state(packed))
    assert after.position_ids[after.vision_mask].tolist() == [5 + token for token in kept]
    assert after.next_position.tolist() == [len(packed.inputs_embeds)]


def test_half_precision_features_stay_in_their_type():
    features = scene(8, 9).flatten(0, 1)
    packed = in_a_prompt(features, [(8, 3, 3)], attention(6, 2, 72))
    half = replace(packed, inputs_embeds=packed.inputs_embeds.bfloat16())
    _, rows = vision_after(FastVID(CountSchedule({0: 20})), half)
    assert rows.dtype == torch.bfloat16
