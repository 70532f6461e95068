"""Pictures and video frames to patches, exactly as Qwen2-VL's official processors make them, with Pillow and numpy only.

A picture keeps its shape: it is resized to the nearest multiples of 28 pixels whose product lies between `min_pixels` and
`max_pixels`, and cut into patches of 14 x 14 pixels. A patch spans two frames; a picture counts as two equal ones.
Source: transformers models/qwen2_vl/image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py.
"""

# Shapes: F frames, H and W pixels; t, h, w frames (groups of temporal_patch_size), rows and columns of patches

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.config import Qwen2VLVisionConfig
from ..models.vlm import VisionInput
from .images import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    FIXED_SETTINGS,
    ImageSource,
    check_settings,
    open_image,
    resize_bicubic,
)
from .preprocessor import read_settings, read_video_settings

Channels = tuple[float, float, float]

# What every official checkpoint stores: 4 to 16384 vision tokens a picture. The class default in transformers is lower.
FACTOR = Qwen2VLVisionConfig.patch_size * Qwen2VLVisionConfig.spatial_merge_size
MIN_PIXELS = 4 * FACTOR**2
MAX_PIXELS = 16384 * FACTOR**2
MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, factor: int = FACTOR, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width in pixels that a picture is resized to: multiples of `factor`, near the picture's shape.

    Their product is brought between `min_pixels` and `max_pixels`, as near as the multiples allow. Raises ValueError for a
    picture without pixels, or one more than MAX_ASPECT_RATIO times as long as it is wide.
    """
    short, long = sorted((height, width))
    if not 0 < long <= MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"the picture is {width}x{height} pixels: Qwen2-VL takes an aspect ratio of {MAX_ASPECT_RATIO} at most; "
            "cut it into less extreme shapes"
        )
    # Python's round: a half goes to the even multiple. A side under half a factor becomes 0, and the product too small.
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        return height, width
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        height, width = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return height, width
    return rounded


@dataclass(frozen=True)
class Qwen2VLImageProcessor:
    """Turns pictures and videos into the patches that Qwen2-VL's tower reads.

    Sides in pixels, of a patch and counted in patches: `patch_size`, `merge_size` (patches that become one vision token),
    `temporal_patch_size` (frames). `min_pixels` and `max_pixels` bound a picture after resizing, `video_min_pixels` and
    `video_max_pixels` one frame of a video. `image_mean` and `image_std` are per RGB channel, on the 0..1 scale.
    Raises ValueError for values that no picture could be processed with.
    """

    patch_size: int = Qwen2VLVisionConfig.patch_size
    temporal_patch_size: int = Qwen2VLVisionConfig.temporal_patch_size
    merge_size: int = Qwen2VLVisionConfig.spatial_merge_size
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    video_min_pixels: int = MIN_PIXELS
    video_max_pixels: int = MAX_PIXELS
    image_mean: Channels = CLIP_IMAGE_MEAN
    image_std: Channels = CLIP_IMAGE_STD

    def __post_init__(self) -> None:
        for prefix in ("", "video_"):
            low, high = getattr(self, f"{prefix}min_pixels"), getattr(self, f"{prefix}max_pixels")
            if not (type(low) is int and type(high) is int and 0 < low <= high and self.factor**2 <= high):
                raise ValueError(
                    f"{prefix}min_pixels {low!r} and {prefix}max_pixels {high!r} must be whole numbers, positive and in this "
                    f"order, and leave room for one vision token of {self.factor}x{self.factor} = {self.factor**2} pixels"
                )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                "image_mean and image_std must be three values each, one per RGB channel, and image_std positive; "
                f"got {self.image_mean!r} and {self.image_std!r}"
            )

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: Qwen2VLVisionConfig, max_pixels: int | None = None
    ) -> "Qwen2VLImageProcessor":
        """Read the settings of a checkpoint folder; what it does not store is as in the official checkpoints.

        `max_pixels` replaces the folder's bound for a picture and for a frame, and lowers the minimum to itself where that is
        higher. Frames go by the folder's own video settings, or by those of its pictures where it has none, as in
        transformers 4.57. Raises FileNotFoundError for a missing folder, and ValueError where the settings disagree with the
        tower's `config`, or ask for something else than a bicubic resize and a normalisation.
        """
        settings = read_settings(Path(folder))
        video_settings = read_video_settings(Path(folder)) or settings
        statistics = _read_statistics(settings)
        for each in (settings, video_settings):
            _check_settings(folder, each, config)
            if _read_statistics(each) != statistics:
                raise ValueError(f"{folder}: videos have another image_mean or image_std than pictures; give both the same")
        return cls(
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
            *_read_bounds(folder, settings, max_pixels),
            *_read_bounds(folder, video_settings, max_pixels),
            *statistics,
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a vision token."""
        return self.patch_size * self.merge_size

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture; `alone` changes nothing here. Raises what `open_image` and `smart_resize` raise."""
        return self._medium([picture], self.min_pixels, self.max_pixels, is_video=False)

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """The frames of one video, all of one size; the last is repeated until they fill whole patches.

        The official processor resizes frames with torchvision, this one with Pillow: values differ by 2 levels of 255 at most.
        Raises ValueError for no frames or frames of several sizes, and what `open_image` and `smart_resize` raise.
        """
        return self._medium(frames, self.video_min_pixels, self.video_max_pixels, is_video=True)

    def _medium(self, sources: Sequence[ImageSource], min_pixels: int, max_pixels: int, is_video: bool) -> VisionInput:
        frames = [open_image(source) for source in sources]
        if len({frame.size for frame in frames}) != 1:
            sizes = sorted({f"{frame.width}x{frame.height}" for frame in frames})
            raise ValueError(f"a video needs one frame or more, all of one size; got {len(frames)} frames of sizes {sizes}")
        width, height = frames[0].size
        new_height, new_width = smart_resize(height, width, self.factor, min_pixels, max_pixels)
        pixels = np.stack([np.asarray(resize_bicubic(frame, new_width, new_height)) for frame in frames])
        grid = -(-len(frames) // self.temporal_patch_size), new_height // self.factor, new_width // self.factor
        return VisionInput(self._patches(pixels), (grid,), (height, width), is_video)

    def _patches(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(F, H, W, 3) -> (t * h * w, 3 * temporal_patch_size * patch_size ** 2), patches in merge order."""
        channels = self._normalise(np.concatenate([pixels, *[pixels[-1:]] * (-len(pixels) % self.temporal_patch_size)]))
        square = (-1, self.merge_size, self.patch_size)  # along one side of the picture
        cut = channels.unflatten(3, square).unflatten(2, square).unflatten(1, (-1, self.temporal_patch_size))
        # (C, t, frame, h / merge, row, y, w / merge, column, x): the squares of patches that merge become neighbours.
        return cut.permute(1, 3, 6, 4, 7, 0, 2, 5, 8).flatten(5).flatten(0, 4)

    def _normalise(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(F, H, W, 3) -> (3, F, H, W) float32, equal to the official values to the last bit."""
        # A byte has 256 levels, so a table holds all values: the pixels themselves are never wider than the result.
        levels = np.arange(256, dtype=np.float32) / 255
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        tables = ((levels[:, None] - mean) / std).T
        return torch.from_numpy(np.stack([table[pixels[..., channel]] for channel, table in enumerate(tables)]))


def _read_statistics(settings: dict[str, Any]) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel."""
    mean, std = settings.get("image_mean", CLIP_IMAGE_MEAN), settings.get("image_std", CLIP_IMAGE_STD)
    return cast(Channels, tuple(mean)), cast(Channels, tuple(std))


def _read_bounds(folder: str | Path, settings: dict[str, Any], max_pixels: int | None) -> tuple[int, int]:
    """The smallest and largest number of pixels, in either spelling: min_pixels and max_pixels, or inside `size`."""
    size = settings.get("size") or {}
    spellings = ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")
    if not isinstance(size, dict) or not {*spellings[0], *spellings[1]}.issuperset(size):
        raise ValueError(f"{folder}: size {size!r} is not supported; expected shortest_edge and longest_edge, in pixels in all")
    given = {**size, **{name: settings[name] for name in ("min_pixels", "max_pixels") if settings.get(name) is not None}}
    low, high = (
        next((given[name] for name in names if name in given), default)
        for names, default in zip(spellings, (MIN_PIXELS, MAX_PIXELS), strict=True)
    )
    return (low, high) if max_pixels is None else (min(low, max_pixels), max_pixels)


def _check_settings(folder: str | Path, settings: dict[str, Any], config: Qwen2VLVisionConfig) -> None:
    """Refuse settings that would give the tower other patches than it was trained on."""
    sizes = {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
    }
    check_settings(folder, settings, {**FIXED_SETTINGS, **sizes})
