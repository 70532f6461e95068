"""LLaVA-1.6 as a whole beside transformers: pixels, features, logits and generated ids of pictures in tiles."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE
from llava_next import PINPOINTS, llava_next_reference, next_processor, official_inputs, picture, write_llava_next_folder
from tiny import resizing_horizontally_first

from nanovlm_v2drop import Request, V2Drop, generate, load, prefill
from nanovlm_v2drop.dropping import DropSchedule
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import LlavaNextConfig, VLMConfig
from nanovlm_v2drop.processing.images import CLIP_IMAGE_MEAN
from nanovlm_v2drop.processing.images_onevision import NextImageProcessor

SIZES = [(60, 60), (100, 40), (40, 100), (200, 30), (7, 9), (90, 61)]


@pytest.fixture(scope="module")
def official() -> Any:
    return llava_next_reference()


@pytest.fixture(scope="module")
def vlm(official: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load(write_llava_next_folder(tmp_path_factory.mktemp("tiny-next"), official))


def official_logits(official: Any, vlm: VisionLanguageModel, request: Request) -> torch.Tensor:
    return official(**official_inputs(vlm, request)).logits[0, -1]


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_a_picture_of_any_shape_equal_those_of_transformers(size, official, vlm):
    request = Request(text="What is shown?", images=[picture(*size)])
    ours = prefill(vlm.model.language_model, vlm.prepare([request])).logits[0]
    torch.testing.assert_close(ours, official_logits(official, vlm, request), atol=1e-4, rtol=1e-4)


def test_several_pictures_are_all_cut_into_tiles(official, vlm):
    request = Request(text="Which is <image> and which <image>?", images=[picture(100, 40), picture(90, 61)])
    packed = vlm.prepare([request])
    assert [grid[1:] for grid in packed.vision_grids[0]][::2] == [(6, 6), (6, 6)]
    assert len(packed.vision) == len(packed.vision_grids[0]) == 4
    ours = prefill(vlm.model.language_model, packed).logits[0]
    torch.testing.assert_close(ours, official_logits(official, vlm, request), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_official_processors(size):
    official = next_processor()
    with resizing_horizontally_first():
        wanted = torch.as_tensor(np.asarray(official(picture(*size), return_tensors="np")["pixel_values"][0]))
    pinpoints = tuple((height, width) for height, width in PINPOINTS)
    found = NextImageProcessor(IMAGE_SIZE, pinpoints, PATCH_SIZE, 9).image(picture(*size)).pixel_values
    assert torch.equal(found, wanted)


def test_dropping_and_decoding_work_on_tiles(vlm):
    request = Request(text="What is shown?", images=[picture(100, 40)])
    (answer,) = generate(vlm, [request], V2Drop(DropSchedule({1: 0.5, 2: 0.2})), max_new_tokens=4)
    total = vlm.prepare([request]).vision_counts[0]
    assert [len(kept) for _, kept in answer.kept] == [total // 2, total // 2 // 5]


def test_a_video_is_refused(vlm):
    with pytest.raises(ValueError, match="takes pictures only, not a video; give its frames as images"):
        vlm.prepare([Request(text="What?", video=[picture(42, 42)])])


def test_the_hubs_config_gives_the_released_settings():
    raw = {
        "model_type": "llava_next",
        "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064},
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
    }
    config = VLMConfig.from_official(raw)
    assert isinstance(config, LlavaNextConfig)
    assert config == LlavaNextConfig(config.text_config)
    assert (config.vision_layers_run, config.max_tiles, config.eos_token_ids) == (23, 4, (2,))
    assert NextImageProcessor.image_mean == CLIP_IMAGE_MEAN


def test_the_original_files_of_llava_1_6_are_not_taken_for_llava_1_5():
    with pytest.raises(ValueError, match="mm_patch_merge_type = 'spatial_unpad' is not supported; expected 'flat'"):
        VLMConfig.from_official({"model_type": "llava_llama", "mm_patch_merge_type": "spatial_unpad"})
