"""Pictures to pixel values: resizing, and LLaVA-1.5's official processors, with Pillow and numpy only.

Three official ways to make a picture square exist. Each is offered as `image_aspect_ratio`:
  "pad"      the original LLaVA-1.5 (what the papers report): pad to a square with the mean colour, then resize
  "crop"     llava-hf's processor: resize the short side, then cut the centre out, so the ends of a wide picture are lost
  "squeeze"  a folder whose `size` gives height and width: resize both sides, so the shape is lost
"""

# Shapes: N pictures, S = image_size (pixels on a side)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.config import VisionConfig
from ..models.vlm import VisionInput
from .image_settings import (
    CLIP_IMAGE_MEAN,
    CLIP_IMAGE_STD,
    FIXED_SETTINGS,
    Channels,
    Settings,
    check_settings,
    check_statistics,
    read_image_settings,
    read_statistics,
    squeezes,
)
from .opening import ImageSource, check_pixel_count, image_size, open_image
from .video import SampledVideo

ASPECT_RATIOS = ("pad", "crop", "squeeze")
DEFAULT_ASPECT_RATIO = "pad"
LESS_EXTREME = "cut it into less extreme shapes, or raise PIL.Image.MAX_IMAGE_PIXELS"


@dataclass(frozen=True)
class PlannedMedium:
    """A picture or a video whose tokens are counted and whose pixels are not decoded yet.

    `grids` and `text` as in VisionInput. `read` decodes: it returns the VisionInput, whose grids have fewer frames only where a
    damaged video file announces more frames than decode. It raises ValueError for damaged data.
    """

    grids: tuple[tuple[int, int, int], ...]
    read: Callable[[], VisionInput]
    text: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(map(prod, self.grids))


def resize_bicubic(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to exactly `width` x `height` pixels by bicubic interpolation; raises as `resize_picture`."""
    return resize_picture(picture, width, height, Image.Resampling.BICUBIC)


def resize_picture(picture: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """Resize to exactly `width` x `height` pixels, with the same bytes under every version of Pillow.

    Raises ValueError where more than `pixel_limit` pixels would be needed between the passes.
    """
    # Pillow rounds to bytes between its two passes, so their order shows. Up to 12 the horizontal pass came first;
    # 13 picks the order by the shape. One call per pass keeps the order that the models were trained with.
    check_pixel_count("the picture would become", 1, width, picture.height, LESS_EXTREME)
    return picture.resize((width, picture.height), resample).resize((width, height), resample)


def pad_to_square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its long side (the original LLaVA's `expand2square`)."""
    side = max(picture.size)
    check_pixel_count("the picture would become", 1, side, side, LESS_EXTREME)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` pixels, then cut the central `size` x `size` square out."""
    short = min(picture.size)
    # Truncated, not rounded, as the official processor does; never less than `size`.
    width, height = (int(size * side / short) for side in picture.size)
    check_pixel_count("the picture would become", 1, width, height, LESS_EXTREME)
    left, top = (width - size) // 2, (height - size) // 2
    return resize_bicubic(picture, width, height).crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class ImageProcessor:
    """Turns pictures into the pixel values that a CLIP-like tower reads.

    `image_size` and `patch_size` are the sides of the tower's input and of a patch in pixels; `image_mean` and `image_std`
    are per RGB channel, on the 0..1 scale. Raises ValueError for values that no picture could be processed with.
    """

    image_size: int
    image_mean: Channels
    image_std: Channels
    image_aspect_ratio: str = DEFAULT_ASPECT_RATIO
    patch_size: int = VisionConfig.patch_size

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"image_size must be a positive number of pixels, got {self.image_size!r}")
        check_statistics(self.image_mean, self.image_std)
        _check_aspect_ratio(self.image_aspect_ratio)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        image_size: int,
        image_aspect_ratio: str = DEFAULT_ASPECT_RATIO,
        patch_size: int = VisionConfig.patch_size,
    ) -> "ImageProcessor":
        """Read mean and std from a checkpoint folder; CLIP's hold where it stores none, as the original LLaVA's.

        `image_size` is what the vision tower takes. A folder that crops, as llava-hf's, may be read with "pad" too, as the
        papers do. Raises ValueError where the folder's settings disagree with the arguments, or ask for something else than a
        bicubic resize and a normalisation, and FileNotFoundError for a missing folder.
        """
        _check_aspect_ratio(image_aspect_ratio)
        settings = read_image_settings(folder, "LlavaImageProcessor", "CLIPImageProcessor")
        check_settings(folder, settings, FIXED_SETTINGS)
        own = _own_aspect_ratio(folder, settings, image_size)
        if image_aspect_ratio != own and (own, image_aspect_ratio) != ("crop", "pad"):
            raise ValueError(
                f"{folder}: its image settings make pictures square by image_aspect_ratio {own!r}, not by "
                f"{image_aspect_ratio!r}; ask for {own!r}"
            )
        mean, std = read_statistics(settings, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD)
        return cls(image_size, mean, std, image_aspect_ratio, patch_size)

    def __call__(self, images: Sequence[ImageSource]) -> Tensor:
        """Process pictures to a float32 tensor (N, 3, S, S); raises what `open_image` raises."""
        pixel_values = torch.empty(len(images), 3, self.image_size, self.image_size)
        for row, image in zip(pixel_values, images, strict=True):
            row.copy_(normalise(self.to_square(open_image(image)), self.image_mean, self.image_std))
        return pixel_values

    def plan_image(self, picture: ImageSource, alone: bool = True) -> PlannedMedium:
        """The cost of one picture; `alone` changes nothing here. Raises what `open_image` raises for the header."""
        size, side = image_size(picture), self.image_size // self.patch_size
        grids = ((1, side, side),)
        return PlannedMedium(grids, lambda: VisionInput(self([picture]), grids, size))

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture; `alone` changes nothing here. Raises what `open_image` raises."""
        return self.plan_image(picture, alone).read()

    def plan_video(self, video: SampledVideo) -> PlannedMedium:
        """Raises ValueError: LLaVA-1.5 was trained on pictures alone."""
        raise ValueError("LLaVA-1.5 takes pictures only, not a video; give its frames as images")

    def video(self, frames: Sequence[ImageSource]) -> VisionInput:
        """Raises ValueError: LLaVA-1.5 was trained on pictures alone."""
        raise ValueError("LLaVA-1.5 takes pictures only, not a video; give its frames as images")

    def to_square(self, picture: Image.Image) -> Image.Image:
        """The square picture that the tower sees, `image_size` on a side."""
        if self.image_aspect_ratio == "crop":
            return resize_and_crop(picture, self.image_size)
        if self.image_aspect_ratio == "pad":
            red, green, blue = (int(value * 255) for value in self.image_mean)
            picture = pad_to_square(picture, (red, green, blue))
        return resize_bicubic(picture, self.image_size, self.image_size)


def _check_aspect_ratio(name: str) -> None:
    if name not in ASPECT_RATIOS:
        raise ValueError(f"unknown image_aspect_ratio {name!r}; choose one of: {', '.join(ASPECT_RATIOS)}")


def _own_aspect_ratio(folder: str | Path, settings: Settings, image_size: int) -> str:
    """How the transformers class makes a picture square with a folder's settings; raises ValueError where it does not."""
    squeezed = squeezes(folder, settings, image_size)
    # CLIP's class pads a batch at its end, where all pictures have one size already.
    if settings.get("do_pad") and settings["image_processor_type"] == "LlavaImageProcessor":
        return "pad"
    if not squeezed and not settings.get("do_center_crop", True):
        raise ValueError(f"{folder}: do_center_crop = False is not supported, pictures would not become square")
    return "squeeze" if squeezed else "crop"


def normalise(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB bytes to float32 (3, height, width): scaled to 0..1, less the mean, over the standard deviation, by channel."""
    # A division: times 1 / 255 half of the values would miss the official ones by the last bit.
    pixels = np.asarray(picture, dtype=np.float32) / 255  # (height, width, 3)
    return torch.from_numpy((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1)
