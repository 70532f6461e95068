"""Pictures to pixel values: opening, resizing, and LLaVA-1.5's official processors, with Pillow and numpy only.

Two official ways to make a picture square exist, and both are offered as `image_aspect_ratio`:
  "pad"   the original LLaVA-1.5 (what the papers report): pad to a square with the mean colour, then resize
  "crop"  llava-hf's processor: resize the short side, then cut the centre out, so the ends of a wide picture are lost
"""

# Shapes: N pictures, S = image_size (pixels on a side)

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..models.config import VisionConfig
from ..models.vlm import VisionInput
from .preprocessor import read_settings

ImageSource = str | Path | bytes | Image.Image

CLIP_IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT_RATIOS = ("pad", "crop")
DEFAULT_ASPECT_RATIO = "pad"
# What this file does to every picture. A checkpoint whose settings say otherwise needs another processor.
FIXED_SETTINGS = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def open_image(source: ImageSource) -> Image.Image:
    """Open one picture as 8-bit RGB.

    A file is turned upright by its EXIF tag; a PIL picture is taken as it stands. Transparency is dropped, not blended
    over a background, as the original LLaVA's `convert("RGB")` does; of an animation the first frame is taken.

    Raises FileNotFoundError for a missing file, and ValueError for a file that does not decode, a picture with no
    pixels, one too large to decode safely, more than 8 bits per channel, or a source that is no picture.
    """
    match source:
        case Image.Image():
            return _to_rgb(source)
        case str() | Path():
            return _decode_file(Path(source))
        case bytes():
            return _decode(io.BytesIO(source), f"the {len(source)} bytes of the picture")
        case _:
            kind = type(source).__name__
            raise ValueError(f"a picture must be a path or a PIL picture, got {kind}; PIL.Image.fromarray takes arrays")


def _decode_file(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"no picture file at {str(path)!r}")
    return _decode(path, str(path))


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as picture:
            return _to_rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    # Decoders meet damaged bytes with SyntaxError, struct.error, IndexError and more: to the reader all mean the same.
    except Exception as error:
        raise ValueError(f"cannot read {name} as a picture: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if 0 in picture.size:
        raise ValueError(f"the picture is {picture.width}x{picture.height}: it needs at least one pixel")
    # Pillow would clip these modes at 255, which turns most such pictures white.
    if picture.mode == "F" or picture.mode.startswith("I"):
        raise ValueError(f"picture mode {picture.mode!r} has more than 8 bits per channel; scale it to 0..255 first")
    # By way of RGBA the palette's colours are the same, and Pillow has no warning to give about transparent ones.
    return (picture.convert("RGBA") if picture.mode == "P" else picture).convert("RGB")


def resize_bicubic(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Resize to exactly `width` x `height` pixels, with the same bytes under every version of Pillow."""
    # Pillow rounds to bytes between its two passes, so their order shows. Up to 12 the horizontal pass came first;
    # 13 picks the order by the shape. One call per pass keeps the order that the models were trained with.
    horizontal = picture.resize((width, picture.height), Image.Resampling.BICUBIC)
    return horizontal.resize((width, height), Image.Resampling.BICUBIC)


def pad_to_square(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centre the picture on a square of its long side (the original LLaVA's `expand2square`)."""
    side = max(picture.size)
    _check_pixel_count(side, side)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size` pixels, then cut the central `size` x `size` square out."""
    short = min(picture.size)
    # Truncated, not rounded, as the official processor does; never less than `size`.
    width, height = (int(size * side / short) for side in picture.size)
    _check_pixel_count(width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return resize_bicubic(picture, width, height).crop((left, top, left + size, top + size))


def _check_pixel_count(width: int, height: int) -> None:
    """Refuse a thin picture that would grow out of memory, at the count where Pillow refuses to open a file."""
    limit = None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"the picture would become {width}x{height} = {width * height} pixels on the way, more than the limit of "
            f"{limit}; cut it into less extreme shapes, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )


@dataclass(frozen=True)
class ImageProcessor:
    """Turns pictures into the pixel values that a CLIP-like tower reads.

    `image_size` and `patch_size` are the sides of the tower's input and of a patch in pixels; `image_mean` and `image_std`
    are per RGB channel, on the 0..1 scale. Raises ValueError for values that no picture could be processed with.
    """

    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    image_aspect_ratio: str = DEFAULT_ASPECT_RATIO
    patch_size: int = VisionConfig.patch_size

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"image_size must be a positive number of pixels, got {self.image_size!r}")
        if len(self.image_mean) != 3 or not all(0 <= value <= 1 for value in self.image_mean):
            raise ValueError(f"image_mean must be three values in 0..1, one per RGB channel, got {self.image_mean!r}")
        if len(self.image_std) != 3 or not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be three positive values, one per RGB channel, got {self.image_std!r}")
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise ValueError(f"unknown image_aspect_ratio {self.image_aspect_ratio!r}; choose one of: {known}")

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        image_size: int,
        image_aspect_ratio: str = DEFAULT_ASPECT_RATIO,
        patch_size: int = VisionConfig.patch_size,
    ) -> "ImageProcessor":
        """Read mean and std from a checkpoint folder; CLIP's hold where it stores none, as the original LLaVA's.

        `image_size` is what the vision tower takes. Raises ValueError where the folder's settings disagree with it, or
        ask for something else than a bicubic resize and a normalisation, and FileNotFoundError for a missing folder.
        """
        settings = read_settings(Path(folder))
        for name in ("size", "crop_size"):
            check_size(name, settings.get(name), image_size)
        check_settings(folder, settings, FIXED_SETTINGS)
        mean = tuple(settings.get("image_mean", CLIP_IMAGE_MEAN))
        std = tuple(settings.get("image_std", CLIP_IMAGE_STD))
        return cls(image_size, mean, std, image_aspect_ratio, patch_size)

    def __call__(self, images: Sequence[ImageSource]) -> Tensor:
        """Process pictures (PIL, or paths) to a float32 tensor (N, 3, S, S); raises what `open_image` raises."""
        pixel_values = torch.empty(len(images), 3, self.image_size, self.image_size)
        for row, image in zip(pixel_values, images, strict=True):
            row.copy_(normalise(self.to_square(open_image(image)), self.image_mean, self.image_std))
        return pixel_values

    def image(self, picture: ImageSource, alone: bool = True) -> VisionInput:
        """One picture; whether it is alone in its request changes nothing here. Raises what `open_image` raises."""
        opened, grid = open_image(picture), self.image_size // self.patch_size
        return VisionInput(self([opened]), ((1, grid, grid),), (opened.height, opened.width))

    def video(self, frames: Sequence[Image.Image]) -> VisionInput:
        """Raises ValueError: LLaVA-1.5 was trained on pictures alone."""
        raise ValueError("LLaVA-1.5 takes pictures only, not a video; give its frames as images")

    def to_square(self, picture: Image.Image) -> Image.Image:
        """The square picture that the tower sees: padded or cropped, `image_size` on a side."""
        if self.image_aspect_ratio == "crop":
            return resize_and_crop(picture, self.image_size)
        red, green, blue = (int(value * 255) for value in self.image_mean)
        return resize_bicubic(pad_to_square(picture, (red, green, blue)), self.image_size, self.image_size)


def normalise(picture: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB bytes to float32 (3, height, width): scaled to 0..1, less the mean, over the standard deviation, by channel."""
    # A division: times 1 / 255 half of the values would miss the official ones by the last bit.
    pixels = np.asarray(picture, dtype=np.float32) / 255  # (height, width, 3)
    return torch.from_numpy((pixels - np.array(mean, np.float32)) / np.array(std, np.float32)).permute(2, 0, 1)


def check_settings(folder: str | Path, settings: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError where a folder's image settings say otherwise than `expected`; what they leave out is as expected."""
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{folder}: {name} = {settings[name]!r} is not supported, only {value!r} is")


def check_size(name: str, value: Any, image_size: int) -> None:
    """Accept every spelling of one side: 336, {"shortest_edge": 336}, {"height": 336, "width": 336}, or none at all."""
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    if value is not None and set(sides) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"the image settings' {name} {value!r} is not supported; expected a number, or one per side")
    if value is not None and set(sides.values()) != {image_size}:
        raise ValueError(f"the image settings' {name} is {value!r}, but the vision tower's image_size is {image_size}")
