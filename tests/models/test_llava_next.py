"""LLaVA-1.6 as a whole beside transformers: pixels, features, logits and generated ids of pictures in tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, PATCH_SIZE, official_names, tiny_tokenizer, write_processing_files
from PIL import Image
from safetensors.torch import save_file
from tiny import resizing_horizontally_first

from nanovlm_v2drop import Request, V2Drop, generate, load, prefill
from nanovlm_v2drop.dropping import DropSchedule
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import LlavaNextConfig, VLMConfig
from nanovlm_v2drop.processing.images import CLIP_IMAGE_MEAN
from nanovlm_v2drop.processing.images_onevision import NextImageProcessor

transformers = pytest.importorskip("transformers")
PINPOINTS = [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]]
SIZES = [(60, 60), (100, 40), (40, 100), (200, 30), (7, 9), (90, 61)]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def official() -> Any:
    """transformers' LlavaNextForConditionalGeneration, weights so large that every layer matters."""
    tokenizer = tiny_tokenizer()
    blocks = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=32, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **blocks),
        text_config=transformers.LlamaConfig(
            vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,
            hidden_size=48,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            **blocks,
        ),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


@pytest.fixture(scope="module")
def vlm(official: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder: Path = tmp_path_factory.mktemp("tiny-next")
    official.config.save_pretrained(folder)
    write_processing_files(folder, tiny_tokenizer())
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_grid_pinpoints=PINPOINTS
    )
    processor.save_pretrained(folder)
    state = official.state_dict()
    newline = state.pop("model.image_newline")
    save_file({**official_names(state), "image_newline": newline}, folder / "model.safetensors")
    return load(folder)


def official_logits(official: Any, vlm: VisionLanguageModel, request: Request) -> torch.Tensor:
    token_ids, media = vlm.tokens_and_media(request)
    tiles = max(len(medium.pixel_values) for medium in media)
    padded = [torch.cat([m.pixel_values, m.pixel_values.new_zeros(tiles - len(m.pixel_values), 3, 42, 42)]) for m in media]
    sizes = torch.tensor([medium.size for medium in media])
    return official(input_ids=torch.tensor([token_ids]), pixel_values=torch.stack(padded), image_sizes=sizes).logits[0, -1]


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
    official = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, image_grid_pinpoints=PINPOINTS
    )
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
