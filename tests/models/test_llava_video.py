"""LLaVA-Video: LLaVA-OneVision whose frames are halved by averages, with a newline token behind every row of a frame.

transformers has no such model, so its tower, projector and decoder are put together here, and the frames between them token
by token. Source of the rule: github.com/LLaVA-VL/LLaVA-NeXT, llava/model/llava_arch.py, get_2dPool and add_token_per_grid.
"""

import json
from typing import Any

import pytest
import torch
from onevision import (
    PINPOINTS,
    TEXT,
    VISION,
    frames,
    onevision_names,
    onevision_reference,
    onevision_tokenizer,
    picture,
    vocab_size,
    write_onevision_files,
)
from safetensors.torch import save_file
from test_onevision import ORIGINAL, original_names
from torch import Tensor

from nanovlm_v2drop.dropping import DROPPERS, DropSchedule, V2Drop
from nanovlm_v2drop.inference import generate, prefill
from nanovlm_v2drop.loading.zoo import MODELS, VisionLanguageModel, load
from nanovlm_v2drop.models.config import LlavaOnevisionConfig, VLMConfig
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.report.gallery import INK, PIXELS, board_of

LLAVA_VIDEO = {"mm_newline_position": "grid", "mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2}
VIDEO = Request("What happens?", video=frames(4))


@pytest.fixture(scope="module")
def reference() -> Any:
    return onevision_reference(onevision_tokenizer())


@pytest.fixture(scope="module")
def vlm(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """In lmms-lab's layout and names, with a tower that a real config.json would not have to name."""
    folder, tokenizer = tmp_path_factory.mktemp("llava-video"), onevision_tokenizer()
    write_onevision_files(folder, tokenizer)
    ids = {"image_token_index": tokenizer.token_to_id("<image>"), "video_token_index": tokenizer.token_to_id("<video>")}
    flat = {**ORIGINAL, **LLAVA_VIDEO, **TEXT, **ids, "vocab_size": vocab_size(tokenizer), "image_grid_pinpoints": PINPOINTS}
    (folder / "config.json").write_text(json.dumps({**flat, "vision_config": VISION}))
    save_file(original_names(onevision_names(reference.state_dict())), folder / "model.safetensors")
    return load(folder)


def arranged_by_hand(frames: Tensor, newline: Tensor) -> Tensor:
    """(F, 27 * 27, D) -> (F * 13 * 14, D); the last row and column of patches are in no average."""
    tokens: list[Tensor] = []
    for frame in frames.unflatten(1, (27, 27)):
        for top in range(0, 26, 2):
            tokens += [frame[top : top + 2, left : left + 2].mean((0, 1)) for left in range(0, 26, 2)]
            tokens.append(newline)
    return torch.stack(tokens)


def official_inputs_embeds(reference: Any, vlm: VisionLanguageModel, request: Request) -> Tensor:
    """(1, T, D)"""
    token_ids, (medium,) = vlm.tokens_and_media(request)
    seen = reference.model.vision_tower(medium.pixel_values, output_hidden_states=True).hidden_states[-1]
    features = arranged_by_hand(reference.model.multi_modal_projector(seen), reference.model.image_newline)
    ids = torch.tensor(token_ids)
    embeds = reference.get_input_embeddings()(ids)
    embeds[ids == vlm.config.video_token_id] = features
    return embeds[None]


def test_the_logits_of_a_video_equal_those_of_transformers_parts(reference: Any, vlm: VisionLanguageModel) -> None:
    embeds = official_inputs_embeds(reference, vlm, VIDEO)
    packed = vlm.prepare([VIDEO])
    torch.testing.assert_close(packed.inputs_embeds, embeds[0], atol=1e-5, rtol=0)
    logits = reference.lm_head(reference.model.language_model(inputs_embeds=embeds).last_hidden_state[0, -1])
    prefilled = prefill(vlm.model.language_model, packed)
    torch.testing.assert_close(prefilled.logits[0], logits, atol=1e-4, rtol=0)


def test_a_picture_is_arranged_as_llava_onevision_arranges_it(reference: Any, vlm: VisionLanguageModel) -> None:
    request = Request("What is it?", images=[picture(500, 300)])
    (medium,) = vlm.tokens_and_media(request)[1]
    sizes = torch.tensor([medium.size])
    features = reference.get_image_features(medium.pixel_values[None], sizes, vision_feature_layer=-1).pooler_output[0]
    torch.testing.assert_close(vlm.model.encode([medium])[0].features, features, atol=1e-5, rtol=0)


def test_newlines_are_vision_tokens_of_the_frames_and_can_be_dropped(vlm: VisionLanguageModel) -> None:
    packed = vlm.prepare([VIDEO])
    assert packed.vision_grids == (((4, 13, 14),),)
    (answer,) = generate(vlm, [VIDEO], V2Drop(DropSchedule({2: 0.25})), max_new_tokens=2)
    assert [len(kept) for _, kept in answer.kept] == [4 * 13 * 14 // 4]
    dycoke = prefill(vlm.model.language_model, packed, DROPPERS["dycoke"](DropSchedule({0: 0.5})))
    assert len(dycoke.kept[0][1][0]) == 4 * 13 * 14 // 2
    assert set(range(13 * 14)) <= set(dycoke.kept[0][1][0].tolist())  # the first of four frames stays whole


def test_frames_are_drawn_without_their_newlines(vlm: VisionLanguageModel) -> None:
    board = board_of(vlm, VIDEO)
    assert board.grid == (13, 4 * 13)
    assert list(board.cells[:28]) == [*range(13), -1, *range(52, 65), -1]
    assert sorted(cell for cell in board.cells if cell >= 0) == list(range(4 * 13 * 13))
    width, height = board.picture.size
    assert (width, height) == (4 * 13 * PIXELS, 13 * PIXELS)
    ends = board.picture.crop((13 * PIXELS - 1, 0, 13 * PIXELS, height))
    assert ends.getcolors() == [(height, INK)]  # a line between the frames


def test_the_released_model_is_asked_about_64_frames_and_its_config_names_the_layout() -> None:
    config = VLMConfig.from_official({**ORIGINAL, **LLAVA_VIDEO, "add_time_instruction": True, "force_sample": True})
    assert isinstance(config, LlavaOnevisionConfig)
    assert (config.mm_spatial_pool_mode, config.mm_newline_position) == ("average", "grid")
    for size in ("7b", "72b"):
        assert MODELS[f"llava-video-{size}-qwen2"].frames == 64
