"""Pictures exactly as nanoVLM makes them: scaled to 0..1 and nothing else, one tile or several.

A picture is resized to whole tiles, its shape nearly kept, and cut into them, row by row. Before the tiles stands the whole
picture in one tile. A picture of one tile stands alone. The first models squeeze every picture into one tile.

Shapes: S = image_size (pixels along a side of a tile); sizes are (height, width).
Source: github.com/huggingface/nanoVLM, data/custom_transforms.py and data/processors.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..models.config import NanoVLMConfig
from ..models.config.nanovlm import GLOBAL, IMAGE
from ..models.vlm import VisionInput
from .images import PlannedMedium, resize_bicubic, resize_picture
from .opening import ImageSource, image_size, open_image
from .video import SampledVideo


@dataclass(frozen=True)
class NanoVLMImageProcessor:
    """Turns pictures into what nanoVLM's tower reads.

    `image_size` is a tile's side in pixels, `token_grid` its side in vision tokens. `max_side` is the longest side of a resized
    picture in pixels, None for the models of one tile; `resize_to_max_side`: smaller pictures grow to it.
    """

    image_size: int
    token_grid: int
    max_side: int | None = None
    resize_to_max_side: bool = False

    @classmethod
    def from_config(cls, config: NanoVLMConfig) -> "NanoVLMImageProcessor":
        """The model's config holds all that there is; nanoVLM has no other settings file."""
        return cls(config.vision_config.image_size, config.token_grid, config.max_side, config.resize_to_max_side)

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """The cost of one picture: (1 + tiles, 3, S, S) with the whole picture first, or (1, 3, S, S) for a single tile.

        Raises what `open_image` raises for the header, and ValueError for one of several pictures where the model takes one.
        """
        size, grid = image_size(picture), (1, self.token_grid, self.token_grid)
        if self.max_side is None:
            if not alone:
                raise ValueError("this nanoVLM takes one picture a request; ask about each picture by itself")
            return PlannedMedium((grid,), lambda: VisionInput(self._squeezed(picture), (grid,), size))
        height, width = self.whole_tiles(*size, self.max_side)
        rows, columns = height // self.image_size, width // self.image_size
        grids, text = (grid,) * (rows * columns + (rows * columns > 1)), tiles_text(rows, columns)
        return PlannedMedium(grids, lambda: VisionInput(self._tiles(picture, height, width), grids, size, text=text), text)

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture, as `plan_image` says; raises what `open_image` raises too."""
        return self.plan_image(picture, alone).read()

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """Raises ValueError: nanoVLM was trained on pictures alone."""
        raise ValueError("nanoVLM takes pictures only, not a video; give its frames as images")

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """Raises ValueError: nanoVLM was trained on pictures alone."""
        raise ValueError("nanoVLM takes pictures only, not a video; give its frames as images")

    def whole_tiles(self, height: int, width: int, max_side: int) -> tuple[int, int]:
        """The size of a picture in whole tiles: both sides are rounded up, and the long one is `max_side` at most."""
        side, long, short = self.image_size, max(height, width), min(height, width)
        target = max_side if self.resize_to_max_side else min(max_side, math.ceil(long / side) * side)
        other = max(math.ceil(short * (target / long) / side) * side, side)
        return (other, target) if width >= height else (target, other)

    def _squeezed(self, picture: ImageSource) -> Tensor:
        side = self.image_size
        return scaled(resize_picture(open_image(picture), side, side, Image.Resampling.BILINEAR))[None]

    def _tiles(self, picture: ImageSource, height: int, width: int) -> Tensor:
        side = self.image_size
        pixels = scaled(resize_bicubic(open_image(picture), width, height))
        tiles = pixels.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if len(tiles) == 1:
            return tiles
        whole = F.interpolate(pixels[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
        return torch.cat([whole, tiles])


def scaled(picture: Image.Image) -> Tensor:
    """RGB bytes to float32 (3, height, width) from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def tiles_text(rows: int, columns: int) -> str:
    """How a picture of so many tiles is written, each tile with one image token."""
    tiles = [f"<row_{row}_col_{column}>{IMAGE}" for row in range(1, rows + 1) for column in range(1, columns + 1)]
    return f"{GLOBAL}{IMAGE}" + ("".join(tiles) if len(tiles) > 1 else "")
