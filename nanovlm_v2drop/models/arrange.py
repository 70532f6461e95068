"""The arrangement of LLaVA-OneVision's tiles and frames as vision tokens.

A picture alone in its request is cut into tiles. Its tokens are those of a coarse view of the whole picture (the base tile),
followed by those of the assembled tiles, without padding and with a newline token behind every row. A video's frames are
pooled, with a newline token behind the last frame (LLaVA-OneVision) or behind every row (LLaVA-Video). These functions do not
depend on a model: they arrange projected features, attention maps (with zeros for a newline) and keys.

Shapes: P patches of one tile or frame, g x g of them; C channels of any meaning; n vision tokens. Sizes are always (height,
width). All rounding follows the official code, including its float arithmetic.
Sources: transformers models/llava_onevision/modeling_llava_onevision.py (pack_image_features, unpad_image, apply_pooling),
image_processing_utils.py (select_best_resolution); github.com/LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# The official code does not shrink a map that is only slightly over the cap.
CAP_TOLERANCE = 1.1
POOLING_STRIDE = 2


def select_best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The pinpoint (height, width) in pixels that a picture of `size` is fitted into.

    It is the pinpoint that keeps most of the picture's pixels. Among pinpoints that keep equally many, it is the smallest.
    """
    # max takes the first of candidates that are equal in both.
    return max(pinpoints, key=lambda pinpoint: (_pixels_kept(size, pinpoint), -pinpoint[0] * pinpoint[1]))


def _pixels_kept(size: tuple[int, int], pinpoint: tuple[int, int]) -> int:
    """Pixels of the picture after shrinking it into the pinpoint. Enlarging adds none."""
    height, width = size
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    return min(int(width * scale) * int(height * scale), width * height)


def unpadded_grid(size: tuple[int, int], tiles_high: int, tiles_wide: int, patch_grid: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the tiles' tokens, without newlines, for a picture of `size` pixels.

    This is the area of the `tiles_high` x `tiles_wide` tiles without padding. It is shrunk if it is much larger than
    `max_tiles` tiles. `patch_grid` is the side of one tile in patches.

    Raises ValueError for a picture so thin that no token remains.
    """
    covered = _without_padding(size, tiles_high * patch_grid, tiles_wide * patch_grid)
    rows, columns = _capped(*covered, max_tiles * patch_grid**2)
    if not rows * columns:
        shape = f"{tiles_wide * patch_grid}x{tiles_high * patch_grid} patches"
        raise ValueError(
            f"the picture is {size[1]}x{size[0]}: none of its {shape} would become a token; cut it into less extreme shapes"
        )
    return rows, columns


def _without_padding(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The part of a map (height, width) that a picture of `size` covers. Equal parts are cut off at both ends."""
    original_height, original_width = size
    if original_width / original_height > width / height:
        # Rounding comes before truncation: 27.0, stored as 26.999999999999996, must not become 26.
        covered = int(round(original_height * (width / original_width), 7))
        return height - 2 * ((height - covered) // 2), width
    covered = int(round(original_width * (height / original_height), 7))
    return height, width - 2 * ((width - covered) // 2)


def _capped(height: int, width: int, max_tokens: int) -> tuple[int, int]:
    """The same shape with about `max_tokens` tokens, if it has many more."""
    ratio = math.sqrt(height * width / max_tokens)
    return (int(height // ratio), int(width // ratio)) if ratio > CAP_TOLERANCE else (height, width)


def arrange_picture(values: Tensor, size: tuple[int, int], tiles: tuple[int, int], newline: Tensor, max_tiles: int) -> Tensor:
    """Values of a picture alone in its request, (1 + tiles, P, C) with the base tile first -> values of its tokens (n, C).

    `size` is the picture's size in pixels, `tiles` the number of tiles (vertically, horizontally). `newline` (C,) stands behind
    every row of the tiles. Raises ValueError where the number of tiles or patches does not fit, and for a picture so thin that
    no token remains.
    """
    patch_grid = _patch_grid(values)
    if len(values) != 1 + math.prod(tiles):
        raise ValueError(f"{len(values)} tiles do not make a picture of {tiles[0]}x{tiles[1]} tiles and a base tile")
    grid = unpadded_grid(size, *tiles, patch_grid, max_tiles)
    rows = _tile_map(values[1:], tiles)  # (C, rows, columns)
    rows = _centre(rows, *_without_padding(size, *rows.shape[1:]))
    if rows.shape[1:] != grid:
        rows = F.interpolate(rows[None], grid, mode="bilinear", align_corners=False)[0]
    ends = newline.to(rows)[:, None, None].expand(-1, grid[0], 1)
    return torch.cat([values[0], torch.cat([rows, ends], dim=-1).flatten(1).T])


def _tile_map(values: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Tiles (rows * columns, P, C), row by row, as one map (C, rows * g, columns * g)."""
    patch_grid = _patch_grid(values)
    grid = values.unflatten(1, (patch_grid, patch_grid)).unflatten(0, tiles)  # (rows, columns, g, g, C)
    return grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)


def _centre(values: Tensor, height: int, width: int) -> Tensor:
    top, left = (values.shape[1] - height) // 2, (values.shape[2] - width) // 2
    return values[:, top : top + height, left : left + width]


def arrange_single(values: Tensor, newline: Tensor) -> Tensor:
    """Values of one of several pictures in a request, (1, P, C) -> values of its tokens (P + 1, C): one newline at the end.

    Raises ValueError for more tiles than one.
    """
    if len(values) != 1:
        raise ValueError(f"a picture that is not alone in its request has one tile, got {len(values)}")
    return torch.cat([values[0], newline.to(values)[None]])


def arrange_video(values: Tensor, newline: Tensor, pool_mode: str, newline_position: str) -> Tensor:
    """Values of a video's frames (F, P, C) -> values of its tokens (n, C); `video_grids` gives their number.

    `pool_mode` and `newline_position` are mm_spatial_pool_mode and mm_newline_position of the original config.json. Raises
    ValueError if the patches do not form a square.
    """
    patch_grid = _patch_grid(values)
    frames = values.unflatten(1, (patch_grid, patch_grid)).permute(0, 3, 1, 2)  # (F, C, g, g)
    side, newline = pooled_grid(patch_grid, pool_mode), newline.to(values)
    if pool_mode == "average":
        pooled = F.avg_pool2d(frames, POOLING_STRIDE)
    else:
        pooled = F.interpolate(frames, (side, side), mode="bilinear", align_corners=False)
    if newline_position == "grid":
        pooled = torch.cat([pooled, newline[:, None, None].expand(len(frames), -1, side, 1)], dim=-1)
    tokens = pooled.permute(0, 2, 3, 1).flatten(0, 2)
    return tokens if newline_position == "grid" else torch.cat([tokens, newline[None]])


def video_grids(frames: int, patch_grid: int, pool_mode: str, newline_position: str) -> tuple[tuple[int, int, int], ...]:
    """Frames, rows and columns of a video's tokens. Newlines behind the rows are a column; a single newline is a grid."""
    side = pooled_grid(patch_grid, pool_mode)
    return ((frames, side, side + 1),) if newline_position == "grid" else ((frames, side, side), (1, 1, 1))


def pooled_grid(patch_grid: int, pool_mode: str) -> int:
    """Tokens along one side of a video's frame of `patch_grid` patches: half, rounded down for averages and up otherwise."""
    return patch_grid // POOLING_STRIDE if pool_mode == "average" else math.ceil(patch_grid / POOLING_STRIDE)


def _patch_grid(values: Tensor) -> int:
    side = math.isqrt(values.shape[1])
    if side**2 != values.shape[1]:
        raise ValueError(f"values {tuple(values.shape)} must be (tiles or frames, P, C) with P a square number of patches")
    return side
