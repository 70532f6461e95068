"""The settings that a checkpoint folder stores for its pictures and videos: which files hold them, their types and bounds."""

from pathlib import Path
from typing import Any

from ..models.config.llava_next import PINPOINTS
from ..models.config.settings import (
    FLAG,
    JSON_OBJECT,
    Either,
    Kind,
    ListOf,
    Real,
    Text,
    Whole,
    checked,
    or_null,
    prefixed,
    read_json_object,
)

MAX_PIXELS = Whole(1, 2**31)
MIN_PIXELS = Whole(1, 2**24)  # every smaller picture grows to as many
SIZE = or_null(Either(MIN_PIXELS, ListOf(MIN_PIXELS, 2, 2), JSON_OBJECT))
PATCHES = Whole(1, 2**14)
SETTINGS: dict[str, Kind] = {
    "image_processor_type": or_null(Text()),
    "feature_extractor_type": or_null(Text()),
    "video_processor_type": or_null(Text()),
    "size": SIZE,
    "crop_size": SIZE,
    "pad_size": SIZE,
    "max_image_size": SIZE,
    "do_image_splitting": or_null(FLAG),
    "video_sampling": or_null(JSON_OBJECT),
    "default_to_square": or_null(FLAG),
    "min_pixels": or_null(MIN_PIXELS),
    "max_pixels": or_null(MAX_PIXELS),
    "max_video_tokens": or_null(MAX_PIXELS),
    "cap_pixels_per_frame": or_null(FLAG),
    "patch_size": PATCHES,
    "temporal_patch_size": PATCHES,
    "merge_size": PATCHES,
    "image_grid_pinpoints": or_null(PINPOINTS),
    "image_mean": ListOf(Real(0, 1), 3, 3),
    "image_std": ListOf(Real(1e-3, 1e3), 3, 3),
    "resample": Whole(0, 5),
    "rescale_factor": Real(1e-9, 1),
    "do_resize": FLAG,
    "do_rescale": FLAG,
    "do_normalize": FLAG,
    "do_center_crop": or_null(FLAG),
    "do_pad": or_null(FLAG),
    "do_convert_rgb": or_null(FLAG),
}
# Inside of a size: pixels along one side; for Qwen2-VL, shortest and longest are pixels in all.
SIDES: dict[str, Kind] = {
    "height": or_null(MIN_PIXELS),
    "width": or_null(MIN_PIXELS),
    "shortest_edge": or_null(MIN_PIXELS),
    "longest_edge": or_null(MAX_PIXELS),
    "min_pixels": or_null(MIN_PIXELS),
    "max_pixels": or_null(MAX_PIXELS),
}

# Which frames of a video SmolVLM2 sees, and how large.
VIDEO_SAMPLING: dict[str, Kind] = {"fps": Real(1e-3, 1e3), "max_frames": Whole(1, 4096), "video_size": or_null(JSON_OBJECT)}


def read_settings(folder: Path) -> dict[str, Any]:
    """The image settings of a folder: nested as newer versions save them, or its preprocessor_config.json, or none.

    Raises FileNotFoundError for a missing folder, and ValueError, with file and setting, for one of a wrong type or size.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {str(folder)!r}")
    file = folder / "preprocessor_config.json"
    return read_nested(folder, "image_processor") or (read_file(file) if file.is_file() else {})


def read_video_settings(folder: Path) -> dict[str, Any]:
    """The video settings of a folder: nested as newer versions save them, or in a file of their own, or none."""
    file = folder / "video_preprocessor_config.json"
    return read_nested(folder, "video_processor") or (read_file(file) if file.is_file() else {})


def read_file(file: Path) -> dict[str, Any]:
    """The known settings of one file, checked."""
    raw = read_json_object(file)
    with prefixed(f"{file}: "):
        return checked_settings(raw)


def read_nested(folder: Path, section: str) -> dict[str, Any]:
    """The known settings of one section of processor_config.json, checked; none without the file or the section."""
    file = folder / "processor_config.json"
    if not file.is_file():
        return {}
    raw = read_json_object(file)
    with prefixed(f"{file}: "):
        nested = checked(raw, {section: or_null(JSON_OBJECT)}).get(section) or {}
        return checked_settings(nested, f"{section}.")


def checked_settings(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The known settings, checked, also those inside of the sizes."""
    settings = checked(raw, SETTINGS, prefix)
    for name in ("size", "crop_size", "pad_size", "max_image_size"):
        if isinstance(settings.get(name), dict):
            checked(settings[name], SIDES, f"{prefix}{name}.")
    sampling = checked(settings.get("video_sampling") or {}, VIDEO_SAMPLING, f"{prefix}video_sampling.")
    checked(sampling.get("video_size") or {}, SIDES, f"{prefix}video_sampling.video_size.")
    return settings
