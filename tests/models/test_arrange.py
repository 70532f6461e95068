"""The features of LLaVA-OneVision's tiles and frames have the same places as in transformers, for pictures of any shape."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovlm_v2drop.models.arrange import (
    arrange_picture,
    arrange_single,
    arrange_video,
    select_best_resolution,
    unpadded_grid,
    video_grids,
)

IMAGE_SIZE = 384
PINPOINTS = tuple((384 * high, 384 * wide) for high in range(1, 7) for wide in range(1, 7))
sides = st.integers(1, 2500)
NEWLINE = torch.tensor([7.0, -7.0])
ONEVISION, LLAVA_VIDEO = ("bilinear", "one_token"), ("average", "grid")  # mm_spatial_pool_mode, mm_newline_position


def modeling():
    return pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")


def official_model(patch_grid: int) -> SimpleNamespace:
    """The part of transformers' model that its arranging methods read."""
    vision = SimpleNamespace(image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // patch_grid)
    assert vision.image_size // vision.patch_size == patch_grid
    return SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=list(PINPOINTS)))


def official_picture(values: Tensor, size: tuple[int, int], patch_grid: int, max_tiles: int = 9) -> Tensor:
    pack = modeling().LlavaOnevisionModel.pack_image_features
    [arranged], [length] = pack(official_model(patch_grid), [values], [size], NEWLINE, f"anyres_max_{max_tiles}")
    assert len(arranged) == length
    return arranged


def tiles_of(size: tuple[int, int]) -> tuple[int, int]:
    height, width = select_best_resolution(size, PINPOINTS)
    return height // IMAGE_SIZE, width // IMAGE_SIZE


def random_values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def num_tokens(size: tuple[int, int], max_tiles: int = 9) -> int:
    rows, columns = unpadded_grid(size, *tiles_of(size), patch_grid=27, max_tiles=max_tiles)
    return 27**2 + rows * (columns + 1)


# The pinpoint


@given(height=sides, width=sides)
@example(height=1, width=2500)
@settings(max_examples=300, deadline=None)
def test_the_pinpoint_and_the_number_of_tiles_are_those_of_transformers(height: int, width: int) -> None:
    high, wide = tiles_of((height, width))
    official = modeling()
    assert official.get_anyres_image_grid_shape((height, width), list(PINPOINTS), IMAGE_SIZE) == (high, wide)
    assert official.image_size_to_num_patches((height, width), list(PINPOINTS), IMAGE_SIZE) == 1 + high * wide


@given(size=st.tuples(sides, sides), pinpoints=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1))
@settings(max_examples=300, deadline=None)
def test_any_list_of_pinpoints_is_read_as_transformers_reads_it(
    size: tuple[int, int], pinpoints: list[tuple[int, int]]
) -> None:
    assert select_best_resolution(size, pinpoints) == modeling().select_best_resolution(size, pinpoints)


# Pictures


@given(size=st.tuples(sides, sides), patch_grid=st.sampled_from([2, 3, 8, 27]), max_tiles=st.sampled_from([1, 4, 9]))
@example(size=(2304, 2304), patch_grid=27, max_tiles=9)
@example(size=(1, 2500), patch_grid=27, max_tiles=9)
@example(size=(820, 1107), patch_grid=27, max_tiles=9)  # 60 rows are covered, of which float arithmetic makes 59.99999999999999
@example(size=(369, 820), patch_grid=27, max_tiles=9)  # and 60 columns
@settings(max_examples=120, deadline=None)
def test_a_picture_of_any_size_is_arranged_as_transformers_does(size: tuple[int, int], patch_grid: int, max_tiles: int) -> None:
    tiles = tiles_of(size)
    values = random_values(1 + math.prod(tiles), patch_grid**2, 2)
    try:
        rows, columns = unpadded_grid(size, *tiles, patch_grid, max_tiles)
    except ValueError:
        assume(False)
    arranged = arrange_picture(values, size, tiles, NEWLINE, max_tiles)
    assert len(arranged) == patch_grid**2 + rows * (columns + 1)
    assert torch.equal(arranged, official_picture(values, size, patch_grid, max_tiles))


@pytest.mark.parametrize(
    ("size", "tiles", "patch_grid", "max_tiles"),
    [((1, 2500), (1, 1), 2, 9), ((2500, 1), (1, 1), 8, 9), ((1, 1153), (1, 4), 3, 1)],
)
def test_a_picture_of_which_no_token_is_left_is_refused_with_its_size(
    size: tuple[int, int], tiles: tuple[int, int], patch_grid: int, max_tiles: int
) -> None:
    message = f"the picture is {size[1]}x{size[0]}: none of its .* would become a token; cut it into less extreme shapes"
    with pytest.raises(ValueError, match=message):
        unpadded_grid(size, *tiles, patch_grid, max_tiles)
    values = torch.zeros(1 + math.prod(tiles), patch_grid**2, 2)
    with pytest.raises(ValueError, match=message):
        arrange_picture(values, size, tiles, NEWLINE, max_tiles)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((336, 336), 1485),
        ((384, 384), 1485),
        ((480, 640), 2929),
        ((768, 1024), 4725),
        ((899, 1024), 6551),
        ((1080, 1920), 7269),
        ((2304, 2304), 7371),
    ],
)
def test_the_real_grid_gives_the_known_numbers_of_tokens(size: tuple[int, int], expected: int) -> None:
    assert num_tokens(size) == expected


@given(size=st.tuples(sides, sides))
@settings(max_examples=300, deadline=None)
def test_no_picture_costs_much_more_than_the_tokens_of_ten_tiles(size: tuple[int, int]) -> None:
    rows, columns = unpadded_grid(size, *tiles_of(size), patch_grid=27, max_tiles=9)
    assert 1 <= rows * columns <= 1.1**2 * 9 * 27**2


@given(size=st.tuples(sides, sides))
@settings(max_examples=100, deadline=None)
def test_a_picture_on_its_side_has_the_same_grid_on_its_side(size: tuple[int, int]) -> None:
    high, wide = tiles_of(size)
    rows, columns = unpadded_grid(size, high, wide, 27, 9)
    assert unpadded_grid(size[::-1], wide, high, 27, 9) == (columns, rows)


def test_tiles_stand_row_by_row_with_the_base_tile_before_them() -> None:
    values = torch.arange(5.0)[:, None, None].expand(5, 4, 1)
    arranged = arrange_picture(values, (768, 768), (2, 2), torch.tensor([-1.0]), max_tiles=9)
    rows = [[1, 1, 2, 2, -1]] * 2 + [[3, 3, 4, 4, -1]] * 2
    assert arranged[:, 0].tolist() == [0, 0, 0, 0, *(value for row in rows for value in row)]


def test_the_tokens_of_the_padding_are_left_out() -> None:
    # 768 x 384 of 768 x 768 pixels: one of four columns of patches is padding at each end.
    values = torch.arange(5 * 4.0).reshape(5, 4, 1)
    arranged = arrange_picture(values, (768, 384), (2, 2), torch.tensor([-1.0]), max_tiles=9)
    assert arranged[4:, 0].reshape(4, 3).tolist() == [[5, 8, -1], [7, 10, -1], [13, 16, -1], [15, 18, -1]]


def test_the_map_is_shrunk_only_where_it_is_more_than_a_tenth_over_the_cap_on_a_side() -> None:
    assert unpadded_grid((100, 110), 1, 1, 10, max_tiles=1) == (10, 10)
    assert unpadded_grid((384, 384 * 6), 1, 6, 10, max_tiles=5) == (10, 60)  # sqrt(6 / 5) = 1.095
    assert unpadded_grid((384, 384 * 5), 1, 5, 10, max_tiles=4) == (8, 44)  # sqrt(5 / 4) = 1.118


def test_arranging_keeps_the_dtype() -> None:
    values = random_values(2, 9, 2).bfloat16()
    arranged = [arrange_picture(values, (9, 9), (1, 1), NEWLINE, 9), arrange_single(values[:1], NEWLINE)]
    assert {tokens.dtype for tokens in [*arranged, arrange_video(values, NEWLINE, *ONEVISION)]} == {torch.bfloat16}


@pytest.mark.parametrize(("count", "patches"), [(4, 9), (6, 9), (5, 8)])
def test_tiles_that_make_no_picture_are_refused(count: int, patches: int) -> None:
    with pytest.raises(ValueError, match=r"tiles do not make a picture of 2x2 tiles|with P a square number of patches"):
        arrange_picture(torch.zeros(count, patches, 2), (9, 9), (2, 2), NEWLINE, 9)


# One tile, and videos


def test_one_of_several_pictures_is_arranged_as_transformers_does() -> None:
    values = random_values(1, 9, 2)
    arranged = arrange_single(values, NEWLINE)
    assert arranged.shape == (10, 2)
    assert torch.equal(arranged, official_picture(values, (100, 60), 3))


def test_a_picture_that_is_not_alone_has_no_second_tile() -> None:
    with pytest.raises(ValueError, match="has one tile, got 2"):
        arrange_single(torch.zeros(2, 9, 2), NEWLINE)


@pytest.mark.parametrize("patch_grid", [1, 2, 3, 8, 27])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_video_is_pooled_as_transformers_does_with_one_newline_at_its_end(frames: int, patch_grid: int) -> None:
    values = random_values(frames, patch_grid**2, 2)
    official = modeling().LlavaOnevisionModel.apply_pooling(official_model(patch_grid), values).flatten(0, 1)
    arranged = arrange_video(values, NEWLINE, *ONEVISION)
    assert torch.equal(arranged, torch.cat([official, NEWLINE[None]]))
    assert sum(map(math.prod, video_grids(frames, patch_grid, *ONEVISION))) == len(arranged)


def test_32_frames_cost_6273_tokens_and_64_of_llava_video_11648() -> None:
    assert len(arrange_video(torch.zeros(32, 27**2, 1), torch.zeros(1), *ONEVISION)) == 6273
    assert len(arrange_video(torch.zeros(64, 27**2, 1), torch.zeros(1), *LLAVA_VIDEO)) == 11648


def slowly_pooled(frame: Tensor, pool_mode: str) -> Tensor:
    """(g, g, C) -> (q, q, C), token by token."""
    patch_grid = len(frame)
    if pool_mode == "average":
        side = patch_grid // 2
        tokens = [frame[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for y in range(side) for x in range(side)]
        return torch.stack(tokens).unflatten(0, (side, side))
    official = modeling().LlavaOnevisionModel.apply_pooling(official_model(patch_grid), frame.flatten(0, 1)[None])[0]
    return official.unflatten(0, (math.isqrt(len(official)), -1))


@pytest.mark.parametrize("pool_mode", ["average", "bilinear"])
@pytest.mark.parametrize("patch_grid", [2, 3, 8, 27])
def test_a_newline_stands_behind_every_row_of_every_frame_of_llava_video(patch_grid: int, pool_mode: str) -> None:
    values = random_values(3, patch_grid**2, 2)
    expected: list[Tensor] = []
    for frame in values:
        for row in slowly_pooled(frame.unflatten(0, (patch_grid, patch_grid)), pool_mode):
            expected += [*row, NEWLINE]
    arranged = arrange_video(values, NEWLINE, pool_mode, "grid")
    torch.testing.assert_close(arranged, torch.stack(expected))
    ((frames, rows, columns),) = video_grids(3, patch_grid, pool_mode, "grid")
    assert (frames, columns - rows, frames * rows * columns) == (3, 1, len(arranged))


def test_patches_of_a_video_that_make_no_square_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values \(2, 8, 1\) must be \(tiles or frames, P, C\)"):
        arrange_video(torch.zeros(2, 8, 1), torch.zeros(1), *ONEVISION)
