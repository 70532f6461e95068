"""What the image settings of a checkpoint folder mean, as transformers understands them.

A setting that would change pixels is obeyed, or refused by its name. What a file leaves out is the default of the transformers
class that it names, not the value that the model's official checkpoint happens to store. A null switches a step off.
Sources: transformers image_processing_utils.py, image_processing_backends.py, and the classes named in CLASS_DEFAULTS.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .preprocessor import read_settings, read_video_settings

Channels = tuple[float, float, float]
Settings = Mapping[str, Any]

CLIP_IMAGE_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
CLIP_IMAGE_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
# What this package does to every picture. A checkpoint whose settings say otherwise needs another processor.
FIXED_SETTINGS: Settings = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_CLIP: Settings = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": CLIP_IMAGE_MEAN,
    "image_std": CLIP_IMAGE_STD,
}
_QWEN2_VL: Settings = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": CLIP_IMAGE_MEAN,
    "image_std": CLIP_IMAGE_STD,
}
_SMOLVLM: Settings = {
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": int(Image.Resampling.LANCZOS),
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
CLASS_DEFAULTS: Mapping[str, Settings] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "LlavaNextImageProcessor": {
        **_CLIP,
        "image_grid_pinpoints": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    },
    "LlavaOnevisionImageProcessor": {
        "size": {"height": 384, "width": 384},
        "image_mean": CLIP_IMAGE_MEAN,
        "image_std": CLIP_IMAGE_STD,
        "image_grid_pinpoints": tuple((high, wide) for high in range(384, 2305, 384) for wide in range(384, 2305, 384)),
    },
    "Idefics3ImageProcessor": {**_SMOLVLM, "size": {"longest_edge": 4 * 364}},
    "SmolVLMImageProcessor": {**_SMOLVLM, "size": {"longest_edge": 4 * 364}},
    "SmolVLMVideoProcessor": _SMOLVLM,
    "Qwen2VLImageProcessor": {**_QWEN2_VL, "size": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}},
    "Qwen3VLVideoProcessor": {
        **_QWEN2_VL,
        "patch_size": 16,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    },
    "Qwen2VLVideoProcessor": {**_QWEN2_VL, "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}},
}


def read_image_settings(folder: str | Path, *classes: str) -> Settings:
    """The image settings that a folder stores, with the defaults of their class; empty where it stores none.

    `classes` are the transformers classes that this package equals for the model, its own first: that is the one of a file
    that names none. Raises FileNotFoundError for a missing folder, and ValueError for another class or a wrong type or size.
    """
    stored = read_settings(Path(folder))
    return _with_class_defaults(folder, stored, "image_processor_type", classes) if stored else {}


def read_frame_settings(folder: str | Path, class_name: str) -> Settings:
    """The settings for videos: the folder's own, or those of its pictures where it has none; empty without either.

    The defaults are those of the transformers class `class_name`. Raises as `read_image_settings`.
    """
    stored = read_video_settings(Path(folder)) or read_settings(Path(folder))
    return _with_class_defaults(folder, stored, "video_processor_type", (class_name,)) if stored else {}


def _with_class_defaults(folder: str | Path, stored: Settings, type_field: str, classes: tuple[str, ...]) -> Settings:
    older = stored.get("feature_extractor_type") if type_field == "image_processor_type" else None
    named = stored.get(type_field) or older or classes[0]
    # The names of older versions, and of the classes with and without torchvision.
    base = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if base not in classes:
        raise ValueError(f"{folder}: {type_field} {named!r} is not supported, only {' or '.join(classes)}")
    return {**CLASS_DEFAULTS[base], **stored, type_field: base}


def check_settings(folder: str | Path, settings: Settings, expected: Settings) -> None:
    """Raise ValueError where a folder's image settings say otherwise than `expected`; what they leave out is as expected."""
    for name, value in expected.items():
        given = settings.get(name, value)
        if given != value:
            raise ValueError(f"{folder}: {name} = {given!r} is not supported, only {value!r} is")


def read_statistics(settings: Settings, mean: Channels, std: Channels) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel, on the 0..1 scale; `mean` and `std` where the folder stores no settings."""
    return settings.get("image_mean", mean), settings.get("image_std", std)


def check_statistics(mean: Channels, std: Channels) -> None:
    """Raise ValueError for a mean or a standard deviation with which no picture could be normalised."""
    if len(mean) != 3 or not all(0 <= value <= 1 for value in mean):
        raise ValueError(f"image_mean must be three values in 0..1, one per RGB channel, got {mean!r}")
    if len(std) != 3 or not all(0 < value < math.inf for value in std):
        raise ValueError(f"image_std must be three positive and finite values, one per RGB channel, got {std!r}")


def squeezes(folder: str | Path, settings: Settings, image_size: int) -> bool:
    """Whether `size` gives both sides, so that a picture loses its shape; False where the short side alone is given.

    Raises ValueError for a size or a crop that is not the `image_size` of the vision tower.
    """
    size = _sides(folder, "size", settings, bool(settings.get("default_to_square")), image_size)
    if settings.get("do_center_crop"):
        _sides(folder, "crop_size", settings, True, image_size)
    if settings.get("do_pad") and settings.get("pad_size") is not None:
        raise ValueError(f"{folder}: pad_size = {settings['pad_size']!r} is not supported")
    return "height" in size


def _sides(folder: str | Path, name: str, settings: Settings, square: bool, image_size: int) -> Settings:
    """The sides that a size gives: a number, [height, width], {"shortest_edge"} or {"height", "width"}, all `image_size`."""
    value = settings.get(name, image_size)
    sides = {"height": value, "width": value} if square else {"shortest_edge": value}
    if isinstance(value, tuple):
        sides = dict(zip(("height", "width"), value, strict=True))
    elif isinstance(value, dict):
        sides = value
    if set(sides) not in ({"shortest_edge"}, {"height", "width"}) or (name == "crop_size" and "height" not in sides):
        raise ValueError(f"{folder}: {name} {value!r} is not supported; expected a number, or one per side")
    if set(sides.values()) != {image_size}:
        raise ValueError(f"{folder}: {name} is {value!r}, but the vision tower's image_size is {image_size}")
    return sides
