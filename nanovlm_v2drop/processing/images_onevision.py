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
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..models.arrange import select_best_resolution, unpadded_grid, video_grids
from ..models.config import LlavaNextConfig, LlavaOnevisionConfig
from ..models.vlm import VisionInput
from .image_settings import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    FIXED_SETTINGS,
    Channels,
    check_settings,
    read_image_settings,
    read_statistics,
    squeezes,
)
from .images import ImageProcessor, PlannedMedium, normalise, pad_to_square, resize_bicubic
from .opening import ImageSource, check_pixel_count, image_size, open_image
from .video import SampledVideo, take_all

# SigLIP's. They hold where a folder stores no image settings, as the original LLaVA-OneVision's.
SIGLIP_IMAGE_MEAN: Channels = (0.5, 0.5, 0.5)
SIGLIP_IMAGE_STD: Channels = (0.5, 0.5, 0.5)


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
    image_mean: Channels = SIGLIP_IMAGE_MEAN
    image_std: Channels = SIGLIP_IMAGE_STD
    mm_spatial_pool_mode: str = LlavaOnevisionConfig.mm_spatial_pool_mode
    mm_newline_position: str = LlavaOnevisionConfig.mm_newline_position
    settings_class: ClassVar[str] = "LlavaOnevisionImageProcessor"  # of transformers

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
        settings = read_image_settings(folder, cls.settings_class)
        vision, pinpoints = config.vision_config, config.image_grid_pinpoints
        check_settings(folder, settings, FIXED_SETTINGS)
        squeezes(folder, settings, vision.image_size)  # refuses other sizes; a tile is square, so both forms mean the same
        if settings.get("image_grid_pinpoints", pinpoints) != pinpoints:
            raise ValueError(f"{folder}: the image settings' image_grid_pinpoints are not those of the model's config.json")
        mean, std = read_statistics(settings, cls.image_mean, cls.image_std)
        video_layout = config.video_layout if isinstance(config, LlavaOnevisionConfig) else ()
        return cls(vision.image_size, pinpoints, vision.patch_size, config.max_tiles, mean, std, *video_layout)

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """The cost of one picture: (1 + tiles, 3, S, S) where it is alone in its request, base tile first; else (1, 3, S, S).

        Raises what `open_image` raises for the header, and ValueError for a picture too thin to fit.
        """
        size, side = image_size(picture), self.patch_grid
        if not alone:
            grids: tuple[tuple[int, int, int], ...] = ((1, side, side), (1, 1, 1))
            return PlannedMedium(grids, lambda: VisionInput(self._one_tile(picture), grids, size))
        height, width = select_best_resolution(size, self.image_grid_pinpoints)
        check_pixel_count("the picture would become", 1, width, height, "use a model with smaller image_grid_pinpoints")
        high, wide = height // self.image_size, width // self.image_size
        rows, columns = unpadded_grid(size, high, wide, side, self.max_tiles)
        grids = ((1, side, side), (1, rows, columns + 1))
        return PlannedMedium(grids, lambda: VisionInput(self._all_tiles(picture), grids, size))

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture, as `plan_image` says; raises what `open_image` raises, and ValueError for a picture too thin to fit."""
        return self.plan_image(picture, alone).read()

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The cost of a video, each frame squeezed into the square: (F, 3, S, S).

        Raises ValueError for frames that would have more than `pixel_limit` pixels in all.
        """
        side = self.image_size
        check_pixel_count("the video would become", video.num_frames, side, side, "take fewer frames (--frames)")
        return PlannedMedium(self._video_grids(video.num_frames), lambda: self._read_video(video))

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """The frames of one video, each squeezed into the square: (F, 3, S, S).

        Raises what `open_image` raises, and ValueError for no frame and for frames of different sizes.
        """
        return self.plan_video(take_all(frames)).read()

    def _video_grids(self, num_frames: int) -> tuple[tuple[int, int, int], ...]:
        return video_grids(num_frames, self.patch_grid, self.mm_spatial_pool_mode, self.mm_newline_position)

    def _read_video(self, video: SampledVideo) -> VisionInput:
        frames = video.read(self._squeeze)
        grids = self._video_grids(len(frames))
        return VisionInput(self._normalise(frames), grids, (video.height, video.width), is_video=True)

    def _one_tile(self, picture: ImageSource) -> Tensor:
        return self._normalise([self.padded_square(open_image(picture))])

    def _all_tiles(self, picture: ImageSource) -> Tensor:
        opened = open_image(picture)
        return self._normalise([self._squeeze(opened), *self.tiles(opened)])

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
        pixel_values = torch.empty(len(pictures), 3, self.image_size, self.image_size)
        for row, picture in zip(pixel_values, pictures, strict=True):
            row.copy_(normalise(picture, self.image_mean, self.image_std))
        return pixel_values


@dataclass(frozen=True)
class NextImageProcessor(OnevisionImageProcessor):
    """LLaVA-1.6's: every picture in tiles, also where there are several, and no video.

    Source: transformers models/llava_next/image_processing_pil_llava_next.py.
    """

    image_mean: Channels = CLIP_IMAGE_MEAN
    image_std: Channels = CLIP_IMAGE_STD
    settings_class: ClassVar[str] = "LlavaNextImageProcessor"

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """One picture: (1 + tiles, 3, S, S), base tile first; whether it is alone in its request changes nothing here."""
        return super().plan_image(picture, alone=True)

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
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
