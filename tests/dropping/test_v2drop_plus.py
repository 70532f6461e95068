"""V2Drop-plus beside its rule in loops; its kept counts, its frames and its schedules."""

import math
from dataclasses import replace

import pytest
import torch
from golden_inputs import in_a_prompt, tokens
from tiny import one_prompt, pack_together, tiny_prompts

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, NotANumber
from nanovlm_v2drop.dropping.state import MERGED
from nanovlm_v2drop.dropping.v2drop_plus import frame_numbers, of_prompt
from nanovlm_v2drop.inference import initial_state

V2DropPlus = DROPPERS["v2drop-plus"]


def cosine(one, other):
    norms = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    return sum(x * y for x, y in zip(one, other, strict=True)) / max(norms, 1e-12)


def rule_in_loops(rows, frames, count, layer_idx):
    """The numbers of the kept tokens, in order, of lists of floats."""
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[x - y for x, y in zip(row, mean, strict=True)] for row in rows]
    unusual = [1 - cosine(row, mean) for row in rows]
    novelty = []
    for own, frame in enumerate(frames):
        rivals = [j for j in range(len(rows)) if frames[j] == frame and (unusual[j], -j) > (unusual[own], -own)]
        distance = min((1 - cosine(centred[own], centred[j]) for j in rivals), default=2.0)
        novelty.append(distance * unusual[own] ** (1.0 if layer_idx == 0 else 0.5))
    at_entrance = max(round(0.3 * count), 4 * len(set(frames)))
    num_novel = min(count, at_entrance if layer_idx == 0 else max(count // 2, round(len(rows) / 9)))
    by_novelty = sorted(range(len(rows)), key=lambda j: -novelty[j])
    others = sorted(by_novelty[num_novel:], key=lambda j: unusual[j])
    return sorted(by_novelty[:num_novel] + others[: count - num_novel])


def state_at(packed, layer_idx, hidden_states=None):
    state = initial_state(packed)
    hidden_states = state.hidden_states if hidden_states is None else hidden_states
    return replace(state, layer_idx=layer_idx, hidden_states=hidden_states, previous=state.hidden_states)


def kept(state, counts):
    """The kept vision tokens of each sequence."""
    after = V2DropPlus(DropSchedule({}))
    taken = state.take(after.select(state, counts), counts)
    return [part[part >= 0].tolist() for part in taken.vision_indices.split(taken.seqlens)]


@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("family", ["llava-1.5", "llava-onevision"])
@pytest.mark.parametrize("count", [1, 2, 7, 23])
def test_the_kept_tokens_are_those_of_the_rule_in_loops(layer_idx, family, count):
    for seed in range(4):
        packed = one_prompt(5, 24, 7, seed=seed, family=family)
        frames = [i // 6 for i in range(24)] if family == "llava-1.5" else [i // 5 for i in range(20)] + [4] * 4
        rows = packed.inputs_embeds[packed.vision_mask].double().tolist()
        assert kept(state_at(packed, layer_idx), (count,)) == [rule_in_loops(rows, frames, count, layer_idx)]


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_each_sequence_of_a_batch_keeps_what_it_keeps_alone(layer_idx):
    parts, counts = tiny_prompts(), (9, 5, 0)
    alone = [kept(state_at(part, layer_idx), (count,))[0] for part, count in zip(parts, counts, strict=True)]
    assert kept(state_at(pack_together(parts), layer_idx), counts) == alone
    assert [len(numbers) for numbers in alone] == list(counts)


def test_of_tokens_that_are_the_same_the_first_is_kept():
    packed = one_prompt(3, 27, 4)  # 27 tokens are one frame
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    packed.inputs_embeds[3:30] = rows[torch.tensor([0, 0, 0, 1, 0, 0, 2, 0, 1, 2] + [0] * 17)]
    assert kept(state_at(packed, 1), (3,)) == [[0, 3, 6]]


def test_a_picture_of_one_colour_keeps_its_first_tokens():
    packed = one_prompt(3, 13, 4)
    packed.inputs_embeds[3:16] = 1.0
    assert kept(state_at(packed, 1), (4,)) == [[0, 1, 2, 3]]


def test_what_two_frames_show_is_kept_of_both():
    packed = one_prompt(3, 24, 4)  # four frames of six tokens
    packed.inputs_embeds[3:27] = torch.tensor([1.0] * 31 + [0.0])
    packed.inputs_embeds[[3 + 2, 3 + 3, 3 + 14, 3 + 15]] = torch.tensor([1.0] * 31 + [9.0])
    assert kept(state_at(packed, 1), (2,)) == [[2, 14]]


def test_at_layer_0_most_of_what_stays_is_the_most_usual_background():
    packed = one_prompt(3, 25, 4)
    packed.inputs_embeds[3:28] = 1.0
    packed.inputs_embeds[3:28, :20] += 0.01 * torch.arange(25)[:, None]  # the later, the more unusual, by a little
    packed.inputs_embeds[3 + 7] = -1.0
    usual = 1 - torch.cosine_similarity(packed.inputs_embeds[3:28], packed.inputs_embeds[3:28].mean(0, keepdim=True), dim=-1)
    (numbers,) = kept(state_at(packed, 0), (10,))
    assert len(numbers) == 10
    assert 7 in numbers
    assert set(usual.argsort()[:6].tolist()) <= set(numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_half_precision_is_ranked_in_float32(dtype, layer_idx):
    packed = one_prompt(5, 24, 7, seed=3)
    rounded = packed.inputs_embeds.to(dtype)
    assert kept(state_at(packed, layer_idx, rounded), (8,)) == kept(state_at(packed, layer_idx, rounded.float()), (8,))


def test_half_precision_does_not_overflow():
    packed = one_prompt(5, 24, 7, seed=3)
    large = (packed.inputs_embeds * 8000).to(torch.float16)
    assert large.isfinite().all()
    assert kept(state_at(packed, 1, large), (8,)) == kept(state_at(packed, 1), (8,))


def test_a_hidden_state_that_is_not_a_number_is_refused():
    packed = one_prompt(5, 24, 7)
    packed.inputs_embeds[9, 3] = torch.nan
    with pytest.raises(NotANumber, match="v2drop-plus scored a vision token NaN"):
        kept(state_at(packed, 1), (8,))


@pytest.mark.parametrize(
    ("mean", "shape", "layers"),
    [
        (48, (144, 12, 1), [3, 6]),
        (32, (144, 12, 1), [2, 6]),
        (16, (144, 12, 1), [0, 3]),
        (72.25, (289, 12, 8), [0, 3]),
        (43.35, (289, 12, 8), [0, 3]),
        (192, (576, 32, 1), [8, 16]),
        (128, (576, 32, 1), [5, 16]),
        (20, (576, 32, 1), [0, 8]),
    ],
)
def test_the_first_drop_is_as_deep_as_the_budget_allows(mean, shape, layers):
    schedule = V2DropPlus.schedule_for(mean, *shape)
    assert list(schedule) == layers
    assert schedule.mean_tokens(*shape[:2]) == pytest.approx(mean, abs=0.5)


@pytest.mark.parametrize("num_layers", [2, 3, 4, 6, 28, 80])
@pytest.mark.parametrize("frames", [1, 8])
def test_every_budget_of_every_depth_has_a_schedule(num_layers, frames):
    for mean in range(4, 65, 5):
        schedule = V2DropPlus.schedule_for(mean, 64, num_layers, frames)
        assert schedule.mean_tokens(64, num_layers) == pytest.approx(mean, abs=0.5)


def test_a_token_that_another_method_has_made_is_of_the_frame_of_its_neighbour():
    assert of_prompt(torch.tensor([-2, 3, 5, -2, -2, 9])).tolist() == [3, 3, 5, 5, 5, 9]
    assert of_prompt(torch.tensor([0, 1])).tolist() == [0, 1]
    assert of_prompt(torch.tensor([-2, -2])).tolist() == [0, 0]
    assert of_prompt(torch.tensor([], dtype=torch.long)).tolist() == []
    two_pictures = in_a_prompt(tokens(3, 20, 32), [(1, 4, 4), (1, 2, 2)])
    made = DROPPERS["visionzip"](DropSchedule({0: 0.6}), contextual_share=0.5)(initial_state(two_pictures))
    (frames,) = frame_numbers(made)
    assert frames.tolist() == sorted(frames.tolist())
    assert (made.vision_indices == MERGED).any()
