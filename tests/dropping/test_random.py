"""The random controls: nested, different for every sample and seed, and even."""

import pytest
import torch
from tiny import one_prompt, tiny_decoder

from nanovlm_v2drop.dropping import DROPPERS, Chain, CountSchedule, DropSchedule
from nanovlm_v2drop.dropping.random import z_order
from nanovlm_v2drop.dropping.state import MERGED
from nanovlm_v2drop.inference import initial_state, prefill
from nanovlm_v2drop.models.vlm import PackedInputs

SCHEDULE = DropSchedule({1: 0.75, 3: 0.5, 4: 0.5})
both = pytest.mark.parametrize("method", [DROPPERS["random"], DROPPERS["random-grid"]])


def picture(seed: int, grid: tuple[int, int, int] = (1, 12, 12)) -> PackedInputs:
    count = grid[0] * grid[1] * grid[2]
    rows = torch.arange(count + 3)
    mask = (rows >= 1) & (rows <= count)
    return PackedInputs(torch.zeros(count + 3, 4), rows, mask, [count + 3], seeds=(seed,), vision_grids=((grid,),))


def kept_numbers(method, packed: PackedInputs, count: int, seed: int = 0) -> list[int]:
    state = initial_state(packed)
    indices = state.vision_indices[method(DropSchedule({0: 0.5}), seed).select(state, (count,))]
    return indices[indices >= 0].tolist()


@both
def test_random_subsets_are_nested_and_depend_on_the_seed(method):
    decoder, packed = tiny_decoder(), one_prompt(5, 24, 7)
    first, second, third = (set(kept[0].tolist()) for _, kept in prefill(decoder, packed, method(SCHEDULE)).kept)
    assert third < second < first
    kept = {tuple(prefill(decoder, packed, method(SCHEDULE, seed=seed)).kept[-1][1][0].tolist()) for seed in range(5)}
    assert len(kept) > 1


@both
def test_random_draws_differ_between_samples(method):
    runs = [prefill(tiny_decoder(), one_prompt(5, 24, 7, seed=seed), method(SCHEDULE)) for seed in range(5)]
    assert len({tuple(run.kept[0][1][0].tolist()) for run in runs}) > 1


@both
def test_every_token_is_as_likely_as_any_other(method):
    counts = torch.zeros(144)
    for seed in range(2000):
        counts[kept_numbers(method, picture(seed), 20)] += 1
    expected = 2000 * 20 / 144
    assert (counts - expected).abs().max() < 5 * (expected * (1 - 20 / 144)) ** 0.5


@both
def test_tokens_that_an_earlier_method_has_made_are_drawn_one_by_one(method):
    decoder, packed, made = tiny_decoder(), one_prompt(3, 24, 4), []
    for seed in range(60):
        first = DROPPERS["visionzip"](CountSchedule({0: 16}), contextual_share=0.5)
        out = prefill(decoder, packed, Chain([first, method(CountSchedule({2: 12, 4: 8}), seed=seed)]))
        made.append([sum(rows == MERGED for rows in sequences[0].tolist()) for _, sequences in out.survivors])
    assert {each[0] for each in made} == {9}  # the class token and eight contextual ones, beside seven patches
    for place, kept in ((1, 12), (2, 8)):
        counts = torch.tensor([each[place] for each in made], dtype=torch.float64)
        assert counts.mean() == pytest.approx(9 * kept / 16, abs=0.6)
        assert counts.std() < 1.5  # all or none of them would be 4 apart


@pytest.mark.parametrize("count", [8, 20, 36])
def test_every_quarter_of_the_picture_keeps_its_share_on_the_grid(count):
    for seed in range(20):
        kept = torch.zeros(16, 16)
        for number in kept_numbers(DROPPERS["random-grid"], picture(seed, (1, 16, 16)), count):
            kept[number // 16, number % 16] = 1
        quarters = kept.unflatten(0, (2, 8)).unflatten(2, (2, 8)).sum((1, 3))
        assert (quarters - count / 4).abs().max() <= 1


def test_the_curve_goes_through_quadrants_of_quadrants_and_frames_one_after_the_other():
    assert z_order([(1, 2, 4)]).argsort().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    frames = z_order([(2, 2, 2), (1, 1, 3)]).argsort().tolist()
    assert frames == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
