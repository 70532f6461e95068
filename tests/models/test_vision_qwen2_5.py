"""Qwen2.5-VL's tower gives the vision tokens of transformers', and traces in the order of the patches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovlm_v2drop.models.config import Qwen2_5_VLVisionConfig
from nanovlm_v2drop.models.vision_qwen2 import Grid
from nanovlm_v2drop.models.vision_qwen2_5 import Qwen2_5_VLVisionTower, frame_windows

# Windows of 3 x 3 vision tokens: 12 // 2 // 2.
SIZES = {
    "depth": 4,
    "hidden_size": 48,
    "out_hidden_size": 20,
    "intermediate_size": 40,
    "num_heads": 3,
    "patch_size": 2,
    "window_size": 12,
    "fullatt_block_indexes": (1, 3),
}
ODD, DIVIDED, THIN, SMALL = (1, 10, 14), (1, 12, 6), (1, 2, 22), (1, 4, 4)
CLIP = (3, 8, 10)
ALL = [ODD, CLIP, SMALL, THIN, DIVIDED, SMALL]
WINDOWS_LAST = {"fullatt_block_indexes": (0, 2)}


def reference(**changes):
    """transformers' tower, with weights so large that every layer and every position matters."""
    module = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = module.Qwen2_5_VLVisionConfig(**SIZES | changes)
    config._attn_implementation = "eager"
    tower = module.Qwen2_5_VisionTransformerPretrainedModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1.5 * noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.3 * noise)
    return tower


def tower_like(official, attention: str = "auto", **changes) -> Qwen2_5_VLVisionTower:
    tower = Qwen2_5_VLVisionTower(Qwen2_5_VLVisionConfig(**SIZES | changes), attention).eval().requires_grad_(False)
    tower.load_state_dict(official.state_dict(), strict=True)
    return tower


def pixels(grids: Sequence[Grid], seed: int = 1) -> Tensor:
    return torch.randn(sum(map(prod, grids)), 24, generator=torch.Generator().manual_seed(seed))


def official_order(grids: Sequence[Grid], side: int = 3) -> tuple[Tensor, list[int]]:
    """The patches in transformers' window order, and the lengths of its windows."""
    vision_utils = pytest.importorskip("transformers.vision_utils")
    order, ends = vision_utils.get_vision_window_index(torch.tensor(grids), 2, side * 4, 2)
    return (order[:, None] * 4 + torch.arange(4)).flatten(), ends.diff().tolist()


def assert_close(ours: Tensor, official: Tensor) -> None:
    torch.testing.assert_close(ours, official, atol=1e-4 * float(official.abs().max()), rtol=0)


@contextmanager
def recorded_attention() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Softmax weights (1, H, n, n) and rotated keys (1, H, n, head_dim) of every segment in every block of transformers'."""
    module = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    original, recorded = module.eager_attention_forward, []

    def record(attention, query, key, *arguments, **settings):
        attended, weights = original(attention, query, key, *arguments, **settings)
        recorded.append((weights, key))
        return attended, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", record)
        yield recorded


# The tower


@pytest.mark.parametrize(
    "grids", [[ODD], [DIVIDED], [THIN], [SMALL], [CLIP], ALL], ids=["odd", "divided", "thin", "small", "clip", "packed"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_vision_tokens_equal_those_of_transformers(grids, attention):
    official = reference()
    wanted = official(pixels(grids), torch.tensor(grids))
    tower = tower_like(official, attention)
    tokens = tower(pixels(grids), grids)
    assert tokens.shape == (sum(map(prod, grids)) // 4, 20)
    assert_close(tokens, wanted.pooler_output)
    assert_close(tower.encode(pixels(grids), grids)[1][official_order(grids)[0]], wanted.last_hidden_state)


@pytest.mark.parametrize(
    "changes",
    [
        WINDOWS_LAST,
        {"fullatt_block_indexes": ()},
        {"fullatt_block_indexes": (0, 1, 2, 3, 9)},
        {"window_size": 4},
        {"window_size": 15},
        {"window_size": 100},
        {"spatial_merge_size": 1},
        {"depth": 1},
        {"temporal_patch_size": 1, "in_channels": 6},
    ],
    ids=str,
)
def test_other_towers_equal_those_of_transformers(changes):
    official = reference(**changes)
    wanted = official(pixels(ALL), torch.tensor(ALL)).pooler_output
    assert_close(tower_like(official, **changes)(pixels(ALL), ALL), wanted)


def test_windows_and_frames_both_matter():
    official = reference()
    tokens = [tower_like(official, fullatt_block_indexes=full)(pixels([ODD]), [ODD]) for full in ((), (1, 3), (0, 1, 2, 3))]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (tokens[first] - tokens[second]).abs().max() > 0.1


def test_faint_patches_show_the_epsilon_of_transformers_norms():
    official = reference()
    faint = 3e-4 * pixels(ALL)
    assert_close(tower_like(official)(faint, ALL), official(faint, torch.tensor(ALL)).pooler_output)


def test_the_input_of_the_last_block_is_what_it_reads():
    official = reference()
    tower = tower_like(official)
    block_input, output = tower.encode(pixels(ALL), ALL)
    shorter = tower_like(official)
    del shorter.blocks[-1]
    assert torch.equal(block_input, shorter.encode(pixels(ALL), ALL)[1])
    assert torch.equal(tower(pixels(ALL), ALL), tower.merger(output))


def test_a_pack_equals_its_pictures_one_by_one_and_a_clip_its_frames():
    tower = tower_like(reference())
    together = tower(pixels(ALL), ALL)
    frames = [(1, rows, columns) for count, rows, columns in ALL for _ in range(count)]
    parts = pixels(ALL).split([prod(frame) for frame in frames])
    alone = torch.cat([tower(part, [frame]) for part, frame in zip(parts, frames, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


# Windows


grids_of_patches = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)).map(
    lambda grid: (grid[0], 2 * grid[1], 2 * grid[2])
)


@given(grids=st.lists(grids_of_patches, min_size=1, max_size=4), side=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_windows_and_their_order_are_those_of_transformers_and_the_way_back_undoes_it(grids, side):
    config = Qwen2_5_VLVisionConfig(**SIZES | {"depth": 1, "window_size": 4 * side})
    with torch.device("meta"):
        tower = Qwen2_5_VLVisionTower(config)
    seqlens, forth, back = tower.windows(grids, torch.device("cpu"))
    order, lengths = official_order(grids, side)
    assert forth.tolist() == order.tolist()
    assert seqlens == lengths
    assert forth[back].tolist() == back[forth].tolist() == list(range(len(order)))


def test_a_window_holds_neighbours_and_the_edges_what_is_left():
    windows = frame_windows(4, 6, 2, 2)  # 2 x 3 vision tokens
    assert [window.tolist() for window in windows] == [[*range(8), *range(12, 20)], [*range(8, 12), *range(20, 24)]]


# What methods that choose tokens before the decoder ask for


def test_received_attention_is_the_mean_over_the_queries_of_the_same_frame_in_the_order_of_the_patches():
    official = reference()
    with recorded_attention() as recorded:
        official(pixels(ALL), torch.tensor(ALL))
    frames = sum(count for count, _, _ in ALL)
    wanted = torch.cat([weights[0].mean(1) for weights, _ in recorded[-frames:]], dim=-1)
    back = official_order(ALL)[0].argsort()
    tower = tower_like(official)
    block_input, _ = tower.encode(pixels(ALL), ALL)
    received = tower.received_attention(block_input, ALL)
    torch.testing.assert_close(received, wanted[:, back], atol=1e-5, rtol=1e-3)
    assert (received - wanted).abs().max() > 1e-2  # the order of the windows is another one
    assert_close(tower.keys(block_input, ALL), torch.cat([key[0] for _, key in recorded[-frames:]], dim=1)[:, back])


def test_a_tower_that_ends_with_windows_gives_the_attention_inside_of_them():
    official = reference(**WINDOWS_LAST)
    with recorded_attention() as recorded:
        official(pixels(ALL), torch.tensor(ALL))
    order, lengths = official_order(ALL)
    last = recorded[-len(lengths) :]
    back = order.argsort()
    tower = tower_like(official, **WINDOWS_LAST)
    block_input, _ = tower.encode(pixels(ALL), ALL)
    wanted = torch.cat([weights[0].mean(1) for weights, _ in last], dim=-1)[:, back]
    torch.testing.assert_close(tower.received_attention(block_input, ALL), wanted, atol=1e-5, rtol=1e-3)
    assert_close(tower.keys(block_input, ALL), torch.cat([key[0] for _, key in last], dim=1)[:, back])


# What the tower refuses


def test_a_window_smaller_than_a_vision_token_is_refused():
    with pytest.raises(ValueError, match="window_size 3 must be at least the 4 pixels of a vision token"):
        Qwen2_5_VLVisionConfig(**SIZES | {"window_size": 3})


def test_a_width_that_two_axes_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size 42 must be a positive multiple of 4 \* num_heads .*12"):
        Qwen2_5_VLVisionConfig(**SIZES | {"hidden_size": 42})


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 3), (0, 4, 4)])
def test_a_grid_that_cannot_be_merged_is_refused_with_the_merge_size(grid):
    tower = Qwen2_5_VLVisionTower(Qwen2_5_VLVisionConfig(**SIZES))
    with pytest.raises(ValueError, match=r"grid \(\d, \d, \d\).*multiples of spatial_merge_size 2"):
        tower(pixels([grid]), [grid])
