"""Pictures and video frames to patches, exactly as Qwen2-VL's official processors make them, with Pillow and numpy only.

A picture keeps its shape: it is resized to the nearest multiples of 28 pixels whose product lies between `min_pixels` and
`max_pixels`, and cut into patches of 14 x 14 pixels. A patch spans two frames; a picture counts as two equal ones.
Source: transformers models/qwen2_vl/image_processing_pil_qwen2_vl.py, video_processing_qwen2_vl.py.
"""

# Shapes: F frames, H and W pixels; t, h, w frames (groups of temporal_patch_size), rows and columns of patches

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..models.config import QwenVisionConfig
from ..models.vlm import VisionInput
from .image_settings import (
    CLASS_DEFAULTS,
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    FIXED_SETTINGS,
    Channels,
    Settings,
    check_settings,
    check_statistics,
    read_frame_settings,
    read_image_settings,
    read_statistics,
)
from .images import PlannedMedium, resize_bicubic
from .opening import ImageSource, check_pixel_count, image_size, open_image
from .video import FpsSampling, SampledVideo, take_all

FACTOR = QwenVisionConfig.patch_size * QwenVisionConfig.spatial_merge_size
# The defaults of transformers' classes: 4 to 1280 vision tokens a picture, 128 to 768 of its pixels' worth a frame of a video.
# Every official checkpoint stores its own: 4 to 16384.
MIN_PIXELS, MAX_PIXELS = CLASS_DEFAULTS["Qwen2VLImageProcessor"]["size"].values()
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = CLASS_DEFAULTS["Qwen2VLVideoProcessor"]["size"].values()
# The share of the context that the frames of one video may fill, and the context that the official code reckons with.
MAX_VIDEO_TOKENS = 128_000
VIDEO_SHARE = 0.9
FRAME_FLOOR = 1.05  # times the smallest number of pixels: a frame of a long video never falls below it
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
            f"the picture is {width}x{height} pixels: Qwen-VL takes an aspect ratio of {MAX_ASPECT_RATIO} at most; "
            "cut it into less extreme shapes"
        )
    # Python's round: a half goes to the even multiple. A side under half a factor becomes 0, and the product too small.
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
        return height, width
    if prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        height, width = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return height, width
    return rounded


@dataclass(frozen=True)
class Qwen2VLImageProcessor:
    """Turns pictures and videos into the patches that Qwen2-VL's tower reads.

    Sides in pixels, of a patch and counted in patches: `patch_size`, `merge_size` (patches that become one vision token),
    `temporal_patch_size` (frames). `min_pixels` and `max_pixels` bound a picture after resizing, `video_min_pixels` and
    `video_max_pixels` one frame of a video. `max_video_tokens` bounds a whole video as in qwen_vl_utils (`total_pixels`): its
    frames share the pixels of 90 % of these tokens; None lifts the bound. `image_mean` and `image_std` are per RGB channel, on
    the 0..1 scale.
    Raises ValueError for values that no picture could be processed with.
    """

    patch_size: int = QwenVisionConfig.patch_size
    temporal_patch_size: int = QwenVisionConfig.temporal_patch_size
    merge_size: int = QwenVisionConfig.spatial_merge_size
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    video_min_pixels: int = VIDEO_MIN_PIXELS
    video_max_pixels: int = VIDEO_MAX_PIXELS
    image_mean: Channels = CLIP_IMAGE_MEAN
    image_std: Channels = CLIP_IMAGE_STD
    max_video_tokens: int | None = MAX_VIDEO_TOKENS

    def __post_init__(self) -> None:
        for prefix in ("", "video_"):
            low, high = getattr(self, f"{prefix}min_pixels"), getattr(self, f"{prefix}max_pixels")
            if not (type(low) is int and type(high) is int and 0 < low <= high and self.factor**2 <= high):
                raise ValueError(
                    f"{prefix}min_pixels {low!r} and {prefix}max_pixels {high!r} must be whole numbers, positive and in this "
                    f"order, and leave room for one vision token of {self.factor}x{self.factor} = {self.factor**2} pixels"
                )
        if self.max_video_tokens is not None and (type(self.max_video_tokens) is not int or self.max_video_tokens < 1):
            raise ValueError(f"max_video_tokens must be a positive whole number or None, got {self.max_video_tokens!r}")
        check_statistics(self.image_mean, self.image_std)

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: QwenVisionConfig, max_pixels: int | None = None
    ) -> "Qwen2VLImageProcessor":
        """Read the settings of a checkpoint folder; what it does not store is as in transformers' classes.

        `max_pixels` replaces the folder's bound for a picture and for a frame, and lowers the minimum to itself where that is
        higher. Frames go by the folder's own video settings, or by those of its pictures where it has none. Raises
        FileNotFoundError for a missing folder, and ValueError where the settings disagree with the tower's `config`, or ask
        for something else than a bicubic resize and a normalisation.
        """
        settings = read_image_settings(folder, "Qwen2VLImageProcessor")
        video_settings = read_frame_settings(folder, "Qwen2VLVideoProcessor")
        statistics = shared_statistics(folder, settings, video_settings, (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD))
        check_patch_settings(folder, settings, config)
        check_patch_settings(folder, video_settings, config)
        capped = video_settings.get("cap_pixels_per_frame") is not False
        return cls(
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
            *read_bounds(folder, settings, max_pixels, (MIN_PIXELS, MAX_PIXELS)),
            *read_bounds(folder, video_settings, max_pixels, (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS)),
            *statistics,
            video_settings.get("max_video_tokens", MAX_VIDEO_TOKENS) if capped else None,
        )

    @property
    def factor(self) -> int:
        """Pixels along one side of a vision token."""
        return self.patch_size * self.merge_size

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """The cost of one picture; `alone` changes nothing here.

        Raises what `open_image` raises for the header, what `smart_resize` raises, and ValueError for a picture that would
        have more than `pixel_limit` pixels.
        """
        size = image_size(picture)
        height, width = smart_resize(*size, self.factor, self.min_pixels, self.max_pixels)
        check_pixel_count("the picture would become", 1, width, height, "lower max_pixels (--max-pixels)")
        resize = partial(resize_bicubic, width=width, height=height)
        return PlannedMedium(
            self._grids(1, height, width), lambda: self._medium([resize(open_image(picture))], size, is_video=False)
        )

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture; `alone` changes nothing here. Raises what `open_image` and `smart_resize` raise."""
        return self.plan_image(picture, alone).read()

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The cost of a video; raises what `smart_resize` raises, and ValueError for more than `pixel_limit` pixels in all."""
        size = video.height, video.width
        max_pixels = self._frame_max_pixels(video.num_frames)
        height, width = smart_resize(*size, self.factor, self.video_min_pixels, max_pixels)
        advice = "take fewer frames (--frames), or lower max_pixels (--max-pixels)"
        # The bound of a whole video, where it is met, may lie 1 % above the limit of this package.
        if not video.num_frames * height * width <= self._pixels_of_all_frames() < math.inf:
            check_pixel_count("the video would become", video.num_frames, width, height, advice)
        resize = partial(resize_bicubic, width=width, height=height)
        grids = self._grids(video.num_frames, height, width)
        seconds = self._seconds_per_grid(video)
        return PlannedMedium(grids, lambda: self._medium(video.read(resize), size, is_video=True, seconds_per_grid=seconds))

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """The frames of one video, all of one size; the last is repeated until they fill whole patches.

        The official processor resizes frames with torchvision, this one with Pillow: values differ by 2 levels of 255 at most.
        Raises ValueError for no frames or frames of several sizes, and what `open_image` and `smart_resize` raise.
        """
        return self.plan_video(take_all(frames)).read()

    def _seconds_per_grid(self, video: SampledVideo) -> float:
        """The time from one group of frames to the next. At an unknown rate, the frames count as two a second.

        Qwen's own code and transformers up to 4.57 count so; transformers 5 takes 24 a second then.
        """
        seconds = video.num_frames / FpsSampling.fps if video.seconds is None else video.seconds
        return self.temporal_patch_size * seconds / video.num_frames

    def _frame_max_pixels(self, num_frames: int) -> int:
        """The most pixels of one frame: its bound, or its share of the whole video's where that is smaller.

        As `fetch_video` of qwen_vl_utils 0.0.14, and `cap_pixels_per_frame` of transformers.
        """
        share = max(self._pixels_of_all_frames() / num_frames, int(self.video_min_pixels * FRAME_FLOOR))
        return int(min(self.video_max_pixels, share))

    def _pixels_of_all_frames(self) -> float:
        """The most pixels of a whole video; infinite where it is not bounded."""
        tokens = math.inf if self.max_video_tokens is None else self.max_video_tokens * VIDEO_SHARE
        return tokens * self.factor**2 * self.temporal_patch_size

    def _grids(self, num_frames: int, height: int, width: int) -> tuple[tuple[int, int, int]]:
        """Vision tokens in time, height and width of frames of a resized picture or video."""
        return ((-(-num_frames // self.temporal_patch_size), height // self.factor, width // self.factor),)

    def _medium(
        self, frames: Sequence[Image.Image], size: tuple[int, int], is_video: bool, seconds_per_grid: float = 0.0
    ) -> VisionInput:
        """Resized frames to their patches; `size` is height and width before resizing."""
        group = self.temporal_patch_size
        grids = self._grids(len(frames), frames[0].height, frames[0].width)
        columns = len(frames[0].getbands()) * group * self.patch_size**2
        pixel_values = torch.empty(grids[0][0], prod(grids[0][1:]) * self.merge_size**2, columns)
        for number, patches in enumerate(pixel_values):
            patches.copy_(self._patches(frames[number * group : (number + 1) * group]))
        return VisionInput(pixel_values.flatten(0, 1), grids, size, is_video, seconds_per_grid=seconds_per_grid)

    def _patches(self, frames: Sequence[Image.Image]) -> Tensor:
        """Frames of one patch in time to (h * w, 3 * temporal_patch_size * patch_size ** 2), patches in merge order."""
        repeated = [*frames, *[frames[-1]] * (self.temporal_patch_size - len(frames))]
        channels = self._normalise(np.stack([np.asarray(frame) for frame in repeated]))  # (C, F, H, W)
        square = (-1, self.merge_size, self.patch_size)  # along one side of the picture
        cut = channels.unflatten(3, square).unflatten(2, square)
        # (C, frame, h / merge, row, y, w / merge, column, x): the squares of patches that merge become neighbours.
        return cut.permute(2, 5, 3, 6, 0, 1, 4, 7).flatten(4).flatten(0, 3)

    def _normalise(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(F, H, W, 3) -> (3, F, H, W) float32, equal to the official values to the last bit."""
        # A byte has 256 levels, so a table holds all values: the pixels themselves are never wider than the result.
        levels = np.arange(256, dtype=np.float32) / 255
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        tables = ((levels[:, None] - mean) / std).T
        return torch.from_numpy(np.stack([table[pixels[..., channel]] for channel, table in enumerate(tables)]))


def read_bounds(folder: str | Path, settings: Settings, max_pixels: int | None, defaults: tuple[int, int]) -> tuple[int, int]:
    """The smallest and largest number of pixels, in either spelling: min_pixels and max_pixels, or inside `size`."""
    size = settings.get("size")
    size = dict(zip(("shortest_edge", "longest_edge"), defaults, strict=True)) if size is None else size
    given = {name: settings[name] for name in ("min_pixels", "max_pixels") if settings.get(name) is not None}
    merged = {**size, **given} if isinstance(size, dict) else {}
    low, high = (
        next((merged[name] for name in names if name in merged), None)
        for names in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    )
    if low is None or high is None or merged.keys() - {"min_pixels", "shortest_edge", "max_pixels", "longest_edge"}:
        raise ValueError(f"{folder}: size {size!r} is not supported; expected shortest_edge and longest_edge, in pixels in all")
    return (low, high) if max_pixels is None else (min(low, max_pixels), max_pixels)


def shared_statistics(
    folder: str | Path, settings: Settings, video_settings: Settings, defaults: tuple[Channels, Channels]
) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pictures and videos; raises ValueError where they differ."""
    statistics = read_statistics(settings, *defaults)
    if read_statistics(video_settings, *statistics) != statistics:
        raise ValueError(f"{folder}: videos have another image_mean or image_std than pictures; give both the same")
    return statistics


def check_patch_settings(folder: str | Path, settings: Settings, config: QwenVisionConfig) -> None:
    """Refuse settings that would give the tower other patches than it was trained on."""
    sizes = {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
    }
    check_settings(folder, settings, {**FIXED_SETTINGS, **sizes})
