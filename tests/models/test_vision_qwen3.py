"""Qwen3-VL's tower: interpolated positions against torch's own interpolation, and everything against transformers' tower."""

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovlm_v2drop.models.config import Qwen3VLVisionConfig
from nanovlm_v2drop.models.vision_qwen2 import Grid, patch_places
from nanovlm_v2drop.models.vision_qwen3 import Qwen3VLVisionTower

SIZES: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": 24,
    "patch_size": 4,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": (0, 2),
}
GRIDS: list[Grid] = [(1, 6, 6), (1, 2, 14), (3, 10, 4), (1, 2, 2)]


def tower(**changes: Any) -> Qwen3VLVisionTower:
    torch.manual_seed(0)
    made = Qwen3VLVisionTower(Qwen3VLVisionConfig(**{**SIZES, **changes}))
    for name, weight in made.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name and weight.dim() == 1), std=0.2)
    return made.eval().requires_grad_(False)


def patches(grids: list[Grid], config: Qwen3VLVisionConfig) -> Tensor:
    columns = 3 * config.temporal_patch_size * config.patch_size**2
    return torch.randn(sum(map(prod, grids)), columns, generator=torch.Generator().manual_seed(1))


def interpolated(made: Qwen3VLVisionTower, grid: Grid) -> Tensor:
    """(l, D): torch's interpolation of the square of learned positions, read in the order of the patches."""
    side = made.config.position_side
    square = made.pos_embed.weight.T.unflatten(1, (side, side))[None]
    resized = F.interpolate(square, grid[1:], mode="bilinear", align_corners=True)[0]
    rows, columns = patch_places(grid, made.config.spatial_merge_size, torch.device("cpu")).T
    return resized[:, rows, columns].T


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 36, 49]))
def test_learned_positions_are_interpolated_to_any_grid(frames: int, rows: int, columns: int, positions: int) -> None:
    made, grid = tower(num_position_embeddings=positions), (frames, 2 * rows, 2 * columns)
    found = made.learned_positions([grid], torch.device("cpu"))
    torch.testing.assert_close(found, interpolated(made, grid), atol=1e-5, rtol=0)


def test_a_picture_as_large_as_the_square_has_its_positions_unchanged() -> None:
    made = tower()
    rows, columns = patch_places((1, 6, 6), 2, torch.device("cpu")).T
    assert torch.equal(made.learned_positions([(1, 6, 6)], torch.device("cpu")), made.pos_embed.weight[rows * 6 + columns])


def test_the_tower_equals_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    made = tower()
    settings = {**SIZES, "deepstack_visual_indexes": [0, 2]}
    official = transformers.Qwen3VLVisionModel(transformers.models.qwen3_vl.Qwen3VLVisionConfig(**settings)).eval()
    official.load_state_dict(made.state_dict(), strict=True)
    pixel_values = patches(GRIDS, made.config)
    with torch.no_grad():
        theirs = official(pixel_values, grid_thw=torch.tensor(GRIDS))
    before, output, deepstack = made.encode_levels(pixel_values, GRIDS)
    torch.testing.assert_close(output, theirs.last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(made(pixel_values, GRIDS), theirs.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(deepstack, torch.stack(theirs.deepstack_features, dim=1), atol=1e-4, rtol=0)
    assert made.encode(pixel_values, GRIDS)[0] is not before
    assert torch.equal(made.encode(pixel_values, GRIDS)[0], before)


def test_pictures_do_not_see_each_other_nor_frames_other_frames() -> None:
    made = tower()
    pixel_values = patches(GRIDS, made.config)
    frames = [(1, *grid[1:]) for grid in GRIDS for _ in range(grid[0])]
    parts = pixel_values.split([prod(frame) for frame in frames])
    together, alone = (
        made.encode_levels(pixel_values, GRIDS),
        [made.encode_levels(*pair) for pair in zip(parts, [[f] for f in frames], strict=True)],
    )
    for index in range(3):
        torch.testing.assert_close(together[index], torch.cat([each[index] for each in alone]), atol=1e-4, rtol=0)


def test_without_taps_there_are_no_levels() -> None:
    made = tower(deepstack_visual_indexes=())
    assert made.encode_levels(patches(GRIDS, made.config), GRIDS)[2].shape == (sum(map(prod, GRIDS)) // 4, 0, 24)


@pytest.mark.parametrize(
    ("grid", "message"), [((1, 3, 4), "multiples of spatial_merge_size 2"), ((0, 2, 2), "must be positive")]
)
def test_grids_that_cannot_be_merged_are_refused(grid: Grid, message: str) -> None:
    made = tower()
    with pytest.raises(ValueError, match=message):
        made.encode_levels(patches([grid], made.config), [grid])
