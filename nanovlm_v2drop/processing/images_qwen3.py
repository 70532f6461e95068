"""Pictures and videos to patches and words, as Qwen3-VL's official processors make them.

Pictures are processed as Qwen2-VL's, with patches of 16 x 16 pixels. All frames of a video share one number of pixels. In the
prompt, each pair of frames stands behind its time in words.
Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py and processing_qwen3_vl.py. Around a video, prompts are those
of version 4.57, with which the models came; see `Qwen3VLConfig.marks`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

from ..models.config import QwenVisionConfig
from ..models.vlm import VisionInput
from .image_settings import CLASS_DEFAULTS, Channels, read_frame_settings, read_image_settings
from .images import PlannedMedium, resize_bicubic
from .images_qwen2 import MAX_ASPECT_RATIO, Qwen2VLImageProcessor, check_patch_settings, read_bounds, shared_statistics
from .opening import check_pixel_count
from .video import FpsSampling, SampledVideo

VIDEO_CLASS = "Qwen3VLVideoProcessor"
PATCH_SIZE = CLASS_DEFAULTS[VIDEO_CLASS]["patch_size"]
MEAN, STD = (CLASS_DEFAULTS[VIDEO_CLASS][name] for name in ("image_mean", "image_std"))
# Every official checkpoint stores its own bounds: 64 to 16,384 vision tokens a picture, up to 12,288 a video.
MIN_PIXELS, MAX_PIXELS = CLASS_DEFAULTS["Qwen2VLImageProcessor"]["size"].values()
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = CLASS_DEFAULTS[VIDEO_CLASS]["size"].values()
FRAME_TOKENS = 768
FLOOR = 1.05  # times the smallest number of pixels of a video: a capped frame never falls below it
FRAME = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class Qwen3VLImageProcessor(Qwen2VLImageProcessor):
    """Turns pictures and videos into the patches that Qwen3-VL's tower reads, and writes the times between frames.

    Fields are as in Qwen2VLImageProcessor, except for videos: `video_min_pixels` and `video_max_pixels` bound all frames of a
    video together. `frame_max_pixels` bounds each of them besides. `max_video_tokens` is the bound of a frame in vision tokens
    that `cap_pixels_per_frame` of transformers sets; None is no such bound.
    Raises ValueError for values that no picture could be processed with.
    """

    patch_size: int = PATCH_SIZE
    video_min_pixels: int = VIDEO_MIN_PIXELS
    video_max_pixels: int = VIDEO_MAX_PIXELS
    image_mean: Channels = MEAN
    image_std: Channels = STD
    max_video_tokens: int | None = None
    frame_max_pixels: int | None = None

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: QwenVisionConfig, max_pixels: int | None = None
    ) -> "Qwen3VLImageProcessor":
        """Read the settings of a checkpoint folder; what its files leave out is as in transformers' classes.

        `max_pixels` replaces the folder's bound for a picture, and bounds each frame. Raises as Qwen2VLImageProcessor, and
        ValueError for a folder without image settings.
        """
        settings, frames = read_image_settings(folder, "Qwen2VLImageProcessor"), read_frame_settings(folder, VIDEO_CLASS)
        if not settings:
            raise ValueError(f"{folder} stores no image settings; copy preprocessor_config.json from the model's repository")
        for each in (settings, frames):
            check_patch_settings(folder, each, config)
        return cls(
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
            *read_bounds(folder, settings, max_pixels, (MIN_PIXELS, MAX_PIXELS)),
            *read_bounds(folder, frames, None, (VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS)),
            *shared_statistics(folder, settings, frames, (MEAN, STD)),
            frames.get("max_video_tokens", FRAME_TOKENS) if frames.get("cap_pixels_per_frame") else None,
            max_pixels,
        )

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The cost of a video; raises ValueError for extreme shapes, and for more pixels in all than `pixel_limit`."""
        height, width = self.frame_size(video.num_frames, video.height, video.width)
        advice = "take fewer frames (--frames), or lower max_pixels (--max-pixels)"
        check_pixel_count("the video would become", video.num_frames, width, height, advice)
        resize = partial(resize_bicubic, width=width, height=height)

        def read() -> VisionInput:
            frames = video.read(resize)
            medium = self._medium(frames, (video.height, video.width), is_video=True)
            return replace(medium, text=self.video_text(video, len(frames)))

        return PlannedMedium(
            self._grids(video.num_frames, height, width), read, self.video_text(video, video.num_frames)
        )

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that the frames are resized to: multiples of `factor`, near their shape.

        The product of both and the number of frames is brought between the bounds of a video. A single frame counts as two.
        Raises ValueError for frames without pixels, or more than MAX_ASPECT_RATIO times as long as they are wide.
        """
        factor, group = self.factor, self.temporal_patch_size
        num_frames = max(num_frames, group)
        if 0 < min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if not 0 < max(height, width) <= MAX_ASPECT_RATIO * min(height, width):
            raise ValueError(
                f"the frames are {width}x{height} pixels: Qwen-VL takes an aspect ratio of {MAX_ASPECT_RATIO} at most; "
                "cut them into less extreme shapes"
            )
        low, high = self.video_bounds(num_frames)
        # Python's round: with an odd number of frames, the official code compares another number than it shrinks by.
        rounded = round(height / factor) * factor, round(width / factor) * factor
        pixels = round(num_frames / group) * group * prod(rounded)
        if pixels > high:
            shrink = math.sqrt(num_frames * height * width / high)
            height, width = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
            return height, width
        if pixels < low:
            grow = math.sqrt(low / (num_frames * height * width))
            height, width = (math.ceil(side * grow / factor) * factor for side in (height, width))
            return height, width
        return rounded

    def video_bounds(self, num_frames: int) -> tuple[int, int]:
        """The smallest and largest number of pixels of a video with so many frames."""
        low, high = self.video_min_pixels, self.video_max_pixels
        if self.max_video_tokens is not None:
            cap = min(self.max_video_tokens * self.factor**2, high // num_frames)
            high = max(cap, int(low * FLOOR)) * num_frames
        if self.frame_max_pixels is not None:
            high = min(high, self.frame_max_pixels * num_frames)
        return min(low, high), high

    def video_text(self, video: SampledVideo, num_frames: int) -> str:
        """How a video is written, each group of frames with one video token behind its time.

        `num_frames` is the number of frames that were read: fewer than were chosen where a file is damaged. At an unknown rate,
        the frames count as two a second, as in Qwen's own code; transformers takes 24 a second then.
        """
        times = group_times(video.indices[:num_frames], video.fps or FpsSampling.fps, self.temporal_patch_size)
        return "".join(f"<{time:.1f} seconds>{FRAME}" for time in times)


def group_times(indices: Sequence[int], fps: float, group: int) -> list[float]:
    """The time of each group of frames in seconds, halfway between its first and last frame; the last frame is repeated."""
    times = [index / fps for index in indices]
    times += [times[-1]] * (-len(times) % group)
    return [(first + last) / 2 for first, last in zip(times[::group], times[group - 1 :: group], strict=True)]
