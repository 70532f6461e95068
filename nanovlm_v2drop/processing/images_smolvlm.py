"""Pictures and videos exactly as SmolVLM's official processors make them: tiles, and words between them.

A picture grows or shrinks until its long side has `longest_edge` pixels. It is then stretched to whole tiles and cut into them,
row by row. Behind the tiles stands the whole picture in one tile. A video's frames are one tile each, with their time before
each of them.

Shapes: S = image_size (pixels along a side of a tile); sizes are (height, width).
Sources: transformers models/smolvlm/image_processing_pil_smolvlm.py, video_processing_smolvlm.py and processing_smolvlm.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.config import SmolVLMConfig
from ..models.vlm import VisionInput
from .image_settings import (
    CLASS_DEFAULTS,
    FIXED_SETTINGS,
    Channels,
    Settings,
    check_settings,
    check_statistics,
    read_frame_settings,
    read_image_settings,
    read_statistics,
)
from .images import PlannedMedium, normalise, resize_picture
from .opening import ImageSource, check_pixel_count, image_size, open_image
from .video import SampledVideo, SmolVLMSampling, take_all

IMAGE_CLASSES = ("SmolVLMImageProcessor", "Idefics3ImageProcessor")
VIDEO_CLASS = "SmolVLMVideoProcessor"
IMAGE_MEAN, IMAGE_STD = (CLASS_DEFAULTS[IMAGE_CLASSES[0]][name] for name in ("image_mean", "image_std"))
LANCZOS = Image.Resampling.LANCZOS
MAX_SIDE = 4096  # pixels that a picture's first resize never exceeds
UNKNOWN_RATE = 24.0  # frames per second of a video that is a list of pictures
AROUND, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class SmolVLMImageProcessor:
    """Turns pictures and videos into what SmolVLM's tower reads, with the words that stand between the tiles.

    `image_size` is a tile's side in pixels, `token_grid` its side in vision tokens. `longest_edge` and `video_longest_edge` are
    the long sides, in pixels, of a picture and of a frame behind their first resize. Without `do_image_splitting`, a picture is
    one tile. Mean and standard deviation are per RGB channel, on the 0..1 scale.
    Raises ValueError for values that no picture could be processed with.
    """

    image_size: int
    token_grid: int
    longest_edge: int
    video_longest_edge: int
    do_image_splitting: bool = True
    image_mean: Channels = IMAGE_MEAN
    image_std: Channels = IMAGE_STD

    def __post_init__(self) -> None:
        for name in ("image_size", "token_grid", "longest_edge", "video_longest_edge"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive whole number, got {getattr(self, name)!r}")
        check_statistics(self.image_mean, self.image_std)

    @classmethod
    def from_folder(cls, folder: str | Path, config: SmolVLMConfig) -> "SmolVLMImageProcessor":
        """Read the settings of a checkpoint folder; what it leaves out is as in transformers' classes.

        Raises FileNotFoundError for a missing folder, and ValueError where the folder stores no image settings, or where they
        disagree with the model's `config` or ask for something else than a LANCZOS resize and a normalisation.
        """
        settings, frames = read_image_settings(folder, *IMAGE_CLASSES), read_frame_settings(folder, VIDEO_CLASS)
        if not settings:
            raise ValueError(f"{folder} stores no image settings; copy preprocessor_config.json from the model's repository")
        side = config.vision_config.image_size
        for each in (settings, frames):
            check_settings(folder, each, {**FIXED_SETTINGS, "resample": int(LANCZOS)})
            if (tile := _longest_edge(folder, "max_image_size", each["max_image_size"])) != side:
                raise ValueError(f"{folder}: max_image_size is {tile}, but the vision tower's image_size is {side}")
        statistics = read_statistics(settings, IMAGE_MEAN, IMAGE_STD)
        if read_statistics(frames, *statistics) != statistics:
            raise ValueError(f"{folder}: videos have another image_mean or image_std than pictures; give both the same")
        video_size = frames.get("size") or video_sampling(frames).get("video_size") or settings["size"]
        return cls(
            side,
            config.token_grid,
            _longest_edge(folder, "size", settings["size"]),
            _longest_edge(folder, "size of a video", video_size),
            bool(settings["do_image_splitting"]),
            *statistics,
        )

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """The cost of one picture: (tiles + 1, 3, S, S) with the whole picture last, or (1, 3, S, S) for a single tile.

        `alone` changes nothing here. Raises what `open_image` raises for the header, and ValueError for a picture that would
        have more than `pixel_limit` pixels.
        """
        size = image_size(picture)
        rows, columns = self.tile_grid(*size)
        check_pixel_count("the picture would become", rows * columns + 1, self.image_size, self.image_size, "shrink it first")
        tiles = rows * columns + 1 if rows * columns > 1 else 1
        grids, text = ((1, self.token_grid, self.token_grid),) * tiles, tiles_text(rows, columns)
        read = lambda: VisionInput(self._tiles(picture), grids, size, text=text, overview=tiles - 1)  # noqa: E731
        return PlannedMedium(grids, read, text)

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture, as `plan_image` says; raises what `open_image` raises."""
        return self.plan_image(picture, alone).read()

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """The cost of a video, each frame squeezed into one tile: (F, 3, S, S).

        Raises ValueError for frames that would have more than `pixel_limit` pixels in all.
        """
        side = self.image_size
        check_pixel_count("the video would become", video.num_frames, side, side, "take fewer frames (--frames)")
        grids = ((video.num_frames, self.token_grid, self.token_grid),)
        return PlannedMedium(grids, lambda: self._read_video(video), video_text(video, video.num_frames))

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """The frames of one video, each squeezed into one tile; raises what `open_image` raises, and ValueError for none."""
        return self.plan_video(take_all(frames)).read()

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tiles that a picture of this size in pixels is cut into."""
        if not self.do_image_splitting:
            return 1, 1
        height, width = whole_tiles(*first_size(height, width, self.longest_edge), self.image_size)
        return height // self.image_size, width // self.image_size

    def _tiles(self, source: ImageSource) -> Tensor:
        picture, side = open_image(source), self.image_size
        rows, columns = self.tile_grid(picture.height, picture.width)
        picture = _resize(picture, *first_size(picture.height, picture.width, self.longest_edge))
        picture = _resize(picture, rows * side, columns * side)
        corners = [(left, top) for top in range(0, picture.height, side) for left in range(0, picture.width, side)]
        tiles = [picture.crop((left, top, left + side, top + side)) for left, top in corners]
        return self._normalise([*tiles, _resize(picture, side, side)] if len(tiles) > 1 else tiles)

    def _read_video(self, video: SampledVideo) -> VisionInput:
        frames = video.read(self._squeeze)
        grids, text = ((len(frames), self.token_grid, self.token_grid),), video_text(video, len(frames))
        return VisionInput(self._normalise(frames), grids, (video.height, video.width), is_video=True, text=text)

    def _squeeze(self, frame: Image.Image) -> Image.Image:
        frame = _resize(frame, *rescaled(frame.height, frame.width, min(self.video_longest_edge, MAX_SIDE)))
        return _resize(frame, self.image_size, self.image_size)

    def _normalise(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixel_values = torch.empty(len(pictures), 3, self.image_size, self.image_size)
        for row, picture in zip(pixel_values, pictures, strict=True):
            row.copy_(normalise(picture, self.image_mean, self.image_std))
        return pixel_values


def first_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """The size of a picture behind its first resize: as `rescaled`, but never with a side of more than 4096 pixels."""
    height, width = rescaled(height, width, longest_edge)
    ratio = width / height
    if max(height, width) <= MAX_SIDE:
        return height, width
    return (max(int(MAX_SIDE / ratio), 1), MAX_SIDE) if width >= height else (MAX_SIDE, max(int(MAX_SIDE * ratio), 1))


def rescaled(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """The size with a long side of `longest_edge` pixels; the short side is even, or 1."""
    ratio = width / height
    if width >= height:
        short = int(longest_edge / ratio)
        return max(short + short % 2, 1), longest_edge
    short = int(longest_edge * ratio)
    return longest_edge, max(short + short % 2, 1)


def whole_tiles(height: int, width: int, side: int) -> tuple[int, int]:
    """The size in whole tiles: the long side rounded up, then the short side, of the shape that is left, rounded up."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        return math.ceil(int(width / ratio) / side) * side, width
    height = math.ceil(height / side) * side
    return height, math.ceil(int(height * ratio) / side) * side


def tiles_text(rows: int, columns: int) -> str:
    """How a picture of so many tiles is written, each tile with one image token."""
    if rows * columns == 1:
        return f"{AROUND}{GLOBAL}{IMAGE}{AROUND}"
    lines = (
        "".join(f"{AROUND}<row_{row}_col_{column}>{IMAGE}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return f"{''.join(lines)}\n{AROUND}{GLOBAL}{IMAGE}{AROUND}"


def video_text(video: SampledVideo, num_frames: int) -> str:
    """How a video is written, each of its frames with one image token behind the second in which it is shown.

    `num_frames` is the number of frames that were read: fewer than were chosen where a file is damaged.
    """
    rate = video.fps or UNKNOWN_RATE
    times = [index / rate for index in video.indices[:num_frames]]
    length = timedelta(seconds=int(times[-1] if video.seconds is None else video.seconds))
    begin = f"You are provided the following series of {number_words(num_frames)} frames from a {length} [H:MM:SS] video.\n"
    frames = (f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{tiles_text(1, 1)}" for time in times)
    return f"{begin}{''.join(frames)}\n\n"


def number_words(number: int) -> str:
    """A whole number below ten thousand in English words, as the package num2words writes it."""
    if number < 20:
        return UNITS[number]
    if number < 100:
        tens, rest = divmod(number, 10)
        return f"{TENS[tens]}-{UNITS[rest]}" if rest else TENS[tens]
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, size)
    begin = f"{UNITS[count]} {name}"
    return begin + (f" and {number_words(rest)}" if 0 < rest < 100 else f", {number_words(rest)}" if rest else "")


def read_sampling(folder: str | Path) -> SmolVLMSampling:
    """Which frames of a video the model of a folder sees; raises as `from_folder`."""
    given = video_sampling(read_frame_settings(folder, VIDEO_CLASS))
    return SmolVLMSampling(**{name: given[name] for name in ("fps", "max_frames") if name in given})


def video_sampling(settings: Settings) -> dict[str, Any]:
    return settings.get("video_sampling") or {}


def _resize(picture: Image.Image, height: int, width: int) -> Image.Image:
    return resize_picture(picture, width, height, LANCZOS)


def _longest_edge(folder: str | Path, name: str, size: Any) -> int:
    if not isinstance(size, dict) or size.keys() != {"longest_edge"} or size["longest_edge"] is None:
        raise ValueError(f"{folder}: {name} {size!r} is not supported; expected longest_edge, in pixels")
    return size["longest_edge"]
