"""Image settings: what a folder's preprocessor_config.json may say, beside transformers' own processors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import resizing_horizontally_first

from nanovlm_v2drop.models.config import LlavaNextConfig, LlavaOnevisionConfig, SiglipVisionConfig, TextConfig
from nanovlm_v2drop.processing.image_settings import CLASS_DEFAULTS
from nanovlm_v2drop.processing.images import ImageProcessor
from nanovlm_v2drop.processing.images_onevision import NextImageProcessor, OnevisionImageProcessor

transformers = pytest.importorskip("transformers")
SIDE = 24
SIZE, CROP = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
LLAVA = {"image_processor_type": "LlavaImageProcessor", "size": SIZE, "crop_size": CROP}
CLIP = LLAVA | {"image_processor_type": "CLIPImageProcessor"}


def write(folder: Path, settings: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return folder


def noise(width: int = 50, height: int = 37) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def official(folder: Path) -> torch.Tensor:
    """(3, S, S): what transformers' processor of this folder makes of the same picture."""
    module = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with resizing_horizontally_first():
        return module(noise(), return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize(
    ("settings", "image_aspect_ratio"),
    [
        (LLAVA, "crop"),
        (CLIP, "crop"),
        (CLIP | {"image_processor_type": "CLIPImageProcessorFast"}, "crop"),
        (CLIP | {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, "crop"),
        ({"size": SIDE, "crop_size": SIDE}, "crop"),
        (LLAVA | {"do_pad": False}, "crop"),
        (CLIP | {"do_pad": True}, "crop"),
        (LLAVA | {"do_convert_rgb": False}, "crop"),
        (LLAVA | {"default_to_square": True}, "crop"),
        (LLAVA | {"do_pad": None, "pad_size": None, "default_to_square": None, "do_convert_rgb": None}, "crop"),
        (LLAVA | {"image_mean": [0.4, 0.5, 0.6], "image_std": [1, 0.25, 2.0]}, "crop"),
        (LLAVA | {"do_pad": True}, "pad"),
        (LLAVA | {"do_pad": True, "size": CROP}, "pad"),
        (LLAVA | {"do_pad": True, "do_center_crop": False}, "pad"),
        (LLAVA | {"do_pad": True, "image_mean": [0.4, 0.5, 0.6]}, "pad"),
        (LLAVA | {"size": CROP}, "squeeze"),
        (LLAVA | {"size": [SIDE, SIDE]}, "squeeze"),
        (LLAVA | {"size": SIDE, "default_to_square": True}, "squeeze"),
        (CLIP | {"size": CROP, "do_center_crop": False}, "squeeze"),
        (CLIP | {"size": CROP, "do_center_crop": None, "crop_size": None}, "squeeze"),
        (CLIP | {"size": CROP, "do_center_crop": False, "crop_size": 5}, "squeeze"),
        (CLIP | {"size": CROP, "do_pad": True}, "squeeze"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_llava_equals_the_processor_that_transformers_builds_from_the_folder(tmp_path, settings, image_aspect_ratio, nested):
    if nested:
        write(tmp_path, {"processor_class": "LlavaProcessor", "image_processor": settings}, "processor_config.json")
    else:
        write(tmp_path, settings)
    made = ImageProcessor.from_folder(tmp_path, SIDE, image_aspect_ratio)
    assert torch.equal(made([noise()])[0], official(tmp_path))
    others = {"pad", "crop", "squeeze"} - {image_aspect_ratio} - ({"pad"} if image_aspect_ratio == "crop" else set())
    for other in others:
        with pytest.raises(ValueError, match=f"by image_aspect_ratio '{image_aspect_ratio}', not by '{other}'; ask for"):
            ImageProcessor.from_folder(tmp_path, SIDE, other)


@pytest.mark.parametrize("name", ["size", "crop_size"])
@pytest.mark.parametrize("settings", [CLIP, LLAVA])
def test_a_size_that_is_left_out_is_that_of_the_class_and_not_that_of_the_tower(tmp_path, name, settings):
    write(tmp_path, {key: value for key, value in settings.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} is .*224.*, but the vision tower's image_size is 24"):
        ImageProcessor.from_folder(tmp_path, SIDE, "crop")
    write(tmp_path, {"image_processor_type": "CLIPImageProcessor"})
    assert ImageProcessor.from_folder(tmp_path, 224, "crop").image_size == 224


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_the_defaults_are_those_of_the_classes(name):
    module = {
        "CLIPImageProcessor": "clip.image_processing_pil_clip",
        "LlavaImageProcessor": "llava.image_processing_pil_llava",
        "LlavaNextImageProcessor": "llava_next.image_processing_pil_llava_next",
        "LlavaOnevisionImageProcessor": "llava_onevision.image_processing_pil_llava_onevision",
        "Qwen2VLImageProcessor": "qwen2_vl.image_processing_pil_qwen2_vl",
    }
    if name not in module:
        pytest.skip("transformers needs torchvision for it")
    official_class = getattr(pytest.importorskip(f"transformers.models.{module[name]}"), f"{name}Pil")
    for setting, value in CLASS_DEFAULTS[name].items():
        found = getattr(official_class, setting)
        assert json.loads(json.dumps(found)) == json.loads(json.dumps(value))


def onevision(folder: Path) -> OnevisionImageProcessor:
    tower = SiglipVisionConfig(image_size=384, patch_size=14)
    pinpoints = tuple((high, wide) for high in range(384, 2305, 384) for wide in range(384, 2305, 384))
    config = LlavaOnevisionConfig(TextConfig(), vision_config=tower, image_grid_pinpoints=pinpoints)
    return OnevisionImageProcessor.from_folder(folder, config)


def test_onevision_settings_that_store_no_mean_have_clips_as_in_transformers(tmp_path):
    write(tmp_path, {"image_processor_type": "LlavaOnevisionImageProcessor"})
    module = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    with resizing_horizontally_first():
        expected = module.LlavaOnevisionImageProcessorPil.from_pretrained(tmp_path)(noise(), return_tensors="pt")
    assert torch.equal(onevision(tmp_path).image(noise()).pixel_values, expected["pixel_values"][0])


def llava_next(folder: Path, pinpoints: tuple[tuple[int, int], ...]) -> NextImageProcessor:
    settings = {"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
    write(folder, settings)
    return NextImageProcessor.from_folder(folder, LlavaNextConfig(TextConfig(), image_grid_pinpoints=pinpoints))


LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def test_pinpoints_that_are_left_out_are_those_of_the_class(tmp_path):
    assert llava_next(tmp_path, LLAVA_NEXT_PINPOINTS).image_grid_pinpoints == LLAVA_NEXT_PINPOINTS
    with pytest.raises(ValueError, match=r"image_grid_pinpoints are not those of the model"):
        llava_next(tmp_path, ((336, 336),))


def test_settings_of_another_family_are_refused_by_name(tmp_path):
    write(tmp_path, LLAVA)
    with pytest.raises(ValueError, match="image_processor_type 'LlavaImageProcessor' is not supported, only LlavaOnevision"):
        onevision(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [1]}))
    with pytest.raises(
        ValueError, match=r"processor_config\.json: image_processor = .* is not supported; expected a JSON object"
    ):
        onevision(tmp_path)
