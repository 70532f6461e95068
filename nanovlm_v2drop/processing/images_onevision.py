"""Pictures and frames to pixel values, exactly as LLaVA-OneVision's official processors make them ("anyres").

A picture alone in its request keeps its detail: it is fitted into one of the `image_grid_pinpoints`, padded, and cut into
tiles of the tower's size; before them comes the whole picture in one tile, squeezed into the square. Where a request has
several pictures each is one tile, padded to a square. A video's frames are one tile each, squeezed into the square.

Shapes: S = image_size (pixels on a side); sizes are (height, width).
Sources: transformers models/llava_onevision/image_processing_pil_llava_onevision.py and image_processing_utils.py;
github.com/LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ..models.arrange import select_best_resolution, unpadded_grid, video_grids
from ..models.config import LlavaNextConfig, LlavaOnevisionConfig
from ..models.vlm import VisionInput
from .images import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    FIXED_SETTINGS,
    ImageProcessor,
    ImageSource,
    check_settings,
    check_size,
    normalise,
    open_image,
    pad_to_square,
    resize_bicubic,
)
from .preprocessor import read_settings

# SigLIP's, where a folder stores none, as the original LLaVA-OneVision's does not.
SIGLIP_IMAGE_MEAN = (0.5, 0.5, 0.5)
SIGLIP_IMAGE_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class OnevisionImageProcessor:
    """Turns pictures and videos into what LLaVA-OneVision's tower reads, with the grids of the tokens they will become.

    `image_size` is a tile's side and `patch_size` a patch's, in pixels; `image_grid_pinpoints` are sizes (height, width) in
    pixels, multiples of `image_size`; `max_tiles` is the number in `vision_aspect_ratio` ("anyres_max_9"), the tiles'
    worth of tokens that a picture may cost before they are interpolated; mean and std are per RGB channel, on the 0..1 scale;
    `mm_spatial_pool_mode` and `mm_newline_position` say how many tokens a video becomes, as in the model's config.
    Raises ValueError for values that no picture could be processed with.
    """

    image_size: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    patch_size: int
    max_tiles: int
    image_mean: tuple[float, float, float] = SIGLIP_IMAGE_MEAN
    image_std: tuple[float, float, float] = SIGLIP_IMAGE_STD
    mm_spatial_pool_mode: str = LlavaOnevisionConfig.mm_spatial_pool_mode
    mm_newline_position: str = LlavaOnevisionConfig.mm_newline_position

    def __post_init__(self) -> None:
        ImageProcessor(self.image_size, self.image_mean, self.image_std)  # refuses impossible values
        if not 1 <= self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} must be between 1 and image_size {self.image_size}")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, got {self.max_tiles}")
        if not self.image_grid_pinpoints:
            raise ValueError("image_grid_pinpoints must name at least one size (height, width)")
        for pinpoint in self.image_grid_pinpoints:
            if len(pinpoint) != 2 or any(side < 1 or side % self.image_size for side in pinpoint):
                raise ValueError(f"image_grid_pinpoints: {pinpoint} must be two multiples of image_size {self.image_size}")

    @classmethod
    def from_folder(cls, folder: str | Path, config: LlavaNextConfig) -> "OnevisionImageProcessor":
        """Read mean and std from a checkpoint folder; its tower's own hold where it stores none. The rest is the `config`'s.

        Raises ValueError where the folder's settings disagree with it, or ask for something else than a bicubic resize
        and a normalisation, and FileNotFoundError for a missing folder.
        """
        settings = read_settings(Path(folder))
        vision, pinpoints = config.vision_config, config.image_grid_pinpoints
        check_size("size", settings.get("size"), vision.image_size)
        if _pinpoints(settings.get("image_grid_pinpoints", pinpoints)) != pinpoints:
            raise ValueError(f"{folder}: the image settings' image_grid_pinpoints are not those of the model's config.json")
        check_settings(folder, settings, FIXED_SETTINGS)
        mean = tuple(settings.get("image_mean", cls.image_mean))
        std = tuple(settings.get("image_std", cls.image_std))
        video_layout = config.video_layout if isinstance(config, LlavaOnevisionConfig) else ()
        return cls(vision.image_size, pinpoints, vision.patch_size, config.max_tiles, mean, std, *video_layout)

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture: (1 + tiles, 3, S, S) where it is the only one of its request, base tile first; else (1, 3, S, S).

        Raises what `open_image` raises, and ValueError for a picture too thin to fit.
        """
        opened = open_image(picture)
        size = (opened.height, opened.width)
        side = self.patch_grid
        if not alone:
            return VisionInput(self._normalise([self.padded_square(opened)]), ((1, side, side), (1, 1, 1)), size)
        high, wide = (pixels // self.image_size for pixels in select_best_resolution(size, self.image_grid_pinpoints))
        rows, columns = unpadded_grid(size, high, wide, side, self.max_tiles)
        tiles = [self._squeeze(opened), *self.tiles(opened)]
        return VisionInput(self._normalise(tiles), ((1, side, side), (1, rows, columns + 1)), size)

    def video(self, frames: Sequence[Image.Image]) -> VisionInput:
        """The frames of one video, each squeezed into the square: (F, 3, S, S).

        Raises what `open_image` raises, and ValueError for no frame and for frames of different sizes.
        """
        pictures = [open_image(frame) for frame in frames]
        sizes = {(picture.height, picture.width) for picture in pictures}
        if len(sizes) != 1:
            found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)) or "no frame"
            raise ValueError(f"a video must have at least one frame, and all of one size; got {found}")
        grids = video_grids(len(pictures), self.patch_grid, self.mm_spatial_pool_mode, self.mm_newline_position)
        pixel_values = self._normalise([self._squeeze(picture) for picture in pictures])
        return VisionInput(pixel_values, grids, sizes.pop(), is_video=True)

    def tiles(self, picture: Image.Image) -> list[Image.Image]:
        """The picture fitted into its pinpoint and cut into tiles of S x S pixels, row by row."""
        height, width = select_best_resolution((picture.height, picture.width), self.image_grid_pinpoints)
        canvas, step = fit_into(picture, width, height), self.image_size
        corners = [(left, top) for top in range(0, height, step) for left in range(0, width, step)]
        return [canvas.crop((left, top, left + step, top + step)) for left, top in corners]

    def padded_square(self, picture: Image.Image) -> Image.Image:
        """The picture on a square of the mean colour, S x S pixels."""
        red, green, blue = (int(255 * value) for value in self.image_mean)
        return self._squeeze(pad_to_square(picture, (red, green, blue)))

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        return resize_bicubic(picture, self.image_size, self.image_size)

    def _normalise(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([normalise(picture, self.image_mean, self.image_std) for picture in pictures])


@dataclass(frozen=True)
class NextImageProcessor(OnevisionImageProcessor):
    """LLaVA-1.6's: every picture in tiles, also where there are several, and no video.

    Source: transformers models/llava_next/image_processing_pil_llava_next.py.
    """

    image_mean: tuple[float, float, float] = CLIP_IMAGE_MEAN
    image_std: tuple[float, float, float] = CLIP_IMAGE_STD

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture: (1 + tiles, 3, S, S), base tile first; whether it is alone in its request changes nothing here."""
        return super().image(picture, alone=True)

    def video(self, frames: Sequence[Image.Image]) -> VisionInput:
        """Raises ValueError: LLaVA-1.6 was trained on pictures alone."""
        raise ValueError("LLaVA-1.6 takes pictures only, not a video; give its frames as images")


def fit_into(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to the largest size that fits, its shape kept, and centre on black; an odd rest goes right and below."""
    # Black before the normalisation, so a tower sees (0 - mean) / std there, not 0.
    canvas = Image.new("RGB", (width, height))
    resized = resize_bicubic(picture, *_fitted_size(picture.width, picture.height, width, height))
    canvas.paste(resized, ((width - resized.width) // 2, (height - resized.height) // 2))
    return canvas


def _fitted_size(width: int, height: int, max_width: int, max_height: int) -> tuple[int, int]:
    """The limiting side exactly, the other rounded up, so that no picture vanishes."""
    scale_width, scale_height = max_width / width, max_height / height
    if scale_width < scale_height:
        return max_width, min(math.ceil(height * scale_width), max_height)
    return min(math.ceil(width * scale_height), max_width), max_height


def _pinpoints(sizes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    return tuple(cast(tuple[int, int], tuple(size)) for size in sizes)  # the constructor refuses other lengths
