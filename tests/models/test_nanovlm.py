"""nanoVLM equals a plain restatement of its code: pixels, ids, features, logits, answers, also beyond its context."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nanovlm import (
    CONFIG,
    EXTRA,
    TILE,
    Restated,
    config,
    image_string,
    pixels,
    random_tensors,
    write_nanovlm_folder,
)
from PIL import Image
from smolvlm import picture, smollm2_tokenizer
from tiny import resizing_horizontally_first
from torch import Tensor

from nanovlm_v2drop import Decoder, DropSchedule, Request, V2Drop, decode_one_token, generate, load, prefill, save_quantised
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import LengthScaling, NanoVLMConfig, VLMConfig
from nanovlm_v2drop.models.linear_int8 import int8_obstacle

NEW_TOKENS = [7, 20, 3]
LENGTH = 16  # vision tokens a tile
PICTURES = {
    "tiles": [picture(70, 50)],
    "one tile": [picture(20, 31)],
    "tall": [picture(30, 200)],
    "several": [picture(70, 33), picture(32, 32), picture(21, 90)],
    "none": [],
}
every_case = pytest.mark.parametrize("name", PICTURES)


def plain_tokenizer():
    return smollm2_tokenizer(())


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return config(plain_tokenizer())


@pytest.fixture(scope="module")
def tensors(settings: dict[str, Any]) -> dict[str, Tensor]:
    return random_tensors(settings)


@pytest.fixture(scope="module")
def vlm(settings: dict[str, Any], tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load(write_nanovlm_folder(tmp_path_factory.mktemp("nanovlm"), settings, tensors, plain_tokenizer()))


def official_ids(name: str) -> list[int]:
    tokenizer = smollm2_tokenizer(tuple(EXTRA.values()))
    with resizing_horizontally_first():
        grids = [pixels(each)[1] for each in PICTURES[name]]
    content = image_string(grids, LENGTH) + "What is it?"
    return tokenizer.encode(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n").ids


def restated_logits(
    restated: Restated, vlm: VisionLanguageModel, token_ids: list[int], tiles: Tensor | None, new: int = 0
) -> Tensor:
    features = torch.empty(0, CONFIG["lm_hidden_dim"]) if tiles is None else restated.features(tiles).flatten(0, 1)
    return restated.logits(token_ids, features, vlm.config.image_token_id, new)


@every_case
def test_token_ids_and_pixels_are_those_of_the_restatement(name: str, vlm: VisionLanguageModel) -> None:
    token_ids, media = vlm.tokens_and_media(Request("What is it?", images=PICTURES[name]))
    assert token_ids == official_ids(name)
    with resizing_horizontally_first():
        for medium, image in zip(media, PICTURES[name], strict=True):
            torch.testing.assert_close(medium.pixel_values, pixels(image)[0], atol=1e-6, rtol=0)


@every_case
def test_features_and_logits_are_those_of_the_restatement(
    name: str, vlm: VisionLanguageModel, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    request = Request("What is it?", images=PICTURES[name])
    token_ids, media = vlm.tokens_and_media(request)
    restated, packed = Restated(settings, tensors), vlm.prepare([request])
    tiles = torch.cat([medium.pixel_values for medium in media]) if media else None
    if tiles is not None:
        features = restated.features(tiles).flatten(0, 1)
        torch.testing.assert_close(packed.inputs_embeds[packed.vision_mask], features, atol=1e-5, rtol=1e-5)
    expected = restated_logits(restated, vlm, token_ids, tiles)[-1]
    torch.testing.assert_close(prefill(vlm.model.language_model, packed).logits[0], expected, atol=1e-4, rtol=1e-4)


def test_the_whole_picture_comes_first_and_a_picture_of_one_tile_stands_alone(vlm: VisionLanguageModel) -> None:
    tiles, one = (vlm.image_processor.image(PICTURES[name][0]) for name in ("tiles", "one tile"))
    assert (len(tiles.grids), tiles.overview, len(one.grids)) == (3 * 3 + 1, 0, 1)
    torch.testing.assert_close(tiles.pixel_values[0].mean(), tiles.pixel_values[1:].mean(), atol=0.01, rtol=0)
    grown = replace(vlm.image_processor, resize_to_max_side=True).image(PICTURES["one tile"][0])
    assert len(grown.grids) == 3 * 4 + 1


@pytest.mark.parametrize("length", [8192, 100, 64])
def test_beyond_the_context_all_frequencies_are_divided_by_the_requests_own_length(
    length: int, settings: dict[str, Any], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {**settings, "lm_max_position_embeddings": length}
    vlm, restated = load(write_nanovlm_folder(tmp_path, short, tensors, plain_tokenizer())), Restated(short, tensors)
    requests = [Request("What is it?", images=PICTURES["tiles"]), Request("yes?")]
    prefilled = prefill(vlm.model.language_model, vlm.prepare(requests))
    found = [prefilled.logits]
    for token in NEW_TOKENS:
        found.append(decode_one_token(vlm.model.language_model, torch.tensor([token] * 2), prefilled.cache))
    for row, request in enumerate(requests):
        token_ids, media = vlm.tokens_and_media(request)
        assert (len(token_ids) > length) == (bool(media) and length < 8192)
        tiles, new = media[0].pixel_values if media else None, len(NEW_TOKENS)
        expected = restated_logits(restated, vlm, token_ids + NEW_TOKENS, tiles, new)[-new - 1 :]
        torch.testing.assert_close(torch.stack([logits[row] for logits in found]), expected, atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_the_restatement(
    vlm: VisionLanguageModel, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    request, restated = Request("What is it?", images=PICTURES["several"]), Restated(settings, tensors)
    (answer,) = generate(vlm, [request], None, max_new_tokens=5)
    token_ids, media = vlm.tokens_and_media(request)
    tiles, new = torch.cat([medium.pixel_values for medium in media]), []
    while len(new) < 5 and 2 not in new:
        new.append(int(restated_logits(restated, vlm, token_ids + new, tiles)[-1].argmax()))
    assert list(answer.token_ids) == [token for token in new if token != 2]


def test_dropping_in_a_long_prompt_keeps_its_frequencies(
    settings: dict[str, Any], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {**settings, "lm_max_position_embeddings": 64}
    vlm = load(write_nanovlm_folder(tmp_path, short, tensors, plain_tokenizer()))
    packed = vlm.prepare([Request("What is it?", images=PICTURES["tiles"])])
    decoder = vlm.model.language_model
    dropped = prefill(decoder, packed, V2Drop(DropSchedule({2: 0.3})))
    apart = replace(packed, position_ids=packed.position_ids / (len(packed.position_ids) / 64))
    unscaled = Decoder(replace(decoder.config, rotary_scaling=None)).eval()
    unscaled.load_state_dict(decoder.state_dict())
    expected = prefill(unscaled, apart, V2Drop(DropSchedule({2: 0.3})))
    torch.testing.assert_close(dropped.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert dropped.kept[0][1][0].tolist() == expected.kept[0][1][0].tolist()


# The first model


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[VisionLanguageModel, Restated]:
    settings = config(plain_tokenizer(), tiled=False)
    tensors = random_tensors(settings)
    folder = write_nanovlm_folder(tmp_path_factory.mktemp("nanovlm-222m"), settings, tensors, plain_tokenizer())
    return load(folder), Restated(settings, tensors)


def test_the_first_model_reads_one_squeezed_picture_before_a_plain_question(
    first: tuple[VisionLanguageModel, Restated],
) -> None:
    vlm, restated = first
    request = Request("What is it?", images=PICTURES["tiles"])
    token_ids, (medium,) = vlm.tokens_and_media(request)
    with resizing_horizontally_first():
        squeezed = PICTURES["tiles"][0].resize((TILE, TILE), Image.Resampling.BILINEAR)
    values = torch.tensor(list(squeezed.tobytes())).reshape(TILE, TILE, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(medium.pixel_values[0], values, atol=1e-6, rtol=0)
    text = plain_tokenizer().encode("Question: What is it? Answer:").ids
    assert token_ids == [vlm.config.image_token_id] * LENGTH + text
    assert vlm.config.image_token_id == vlm.config.text_config.vocab_size
    expected = restated_logits(restated, vlm, token_ids, medium.pixel_values)[-1]
    found = prefill(vlm.model.language_model, vlm.prepare([request])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_first_model_takes_one_picture(first: tuple[VisionLanguageModel, Restated]) -> None:
    with pytest.raises(ValueError, match="takes one picture a request; ask about each picture by itself"):
        first[0].prepare([Request("Which?", images=PICTURES["several"])])


def test_no_nanovlm_takes_a_video(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match="takes pictures only, not a video; give its frames as images"):
        vlm.prepare([Request("What?", video=[picture(32, 32)])])


# The files


def test_either_name_of_the_tied_embeddings_is_enough(
    settings: dict[str, Any], tensors: dict[str, Tensor], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    head = tensors["decoder.head.weight"]
    others = {name: tensor for name, tensor in tensors.items() if name != "decoder.head.weight"}
    for names in (["decoder.token_embedding.weight"], ["decoder.token_embedding.weight", "decoder.head.weight"]):
        stored = others | {name: head.clone() for name in names}
        other = load(write_nanovlm_folder(tmp_path / str(len(names)), settings, stored, plain_tokenizer()))
        assert torch.equal(other.model.language_model.embed_tokens.weight, head)
        assert other.model.language_model.lm_head.weight is other.model.language_model.embed_tokens.weight


def test_a_missing_tensor_is_refused_by_our_name(settings: dict[str, Any], tensors: dict[str, Tensor], tmp_path: Path) -> None:
    lacking = {name: tensor for name, tensor in tensors.items() if name != "vision_encoder.blocks.1.attn.qkv_proj.bias"}
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.self_attn\.q_proj\.bias"):
        load(write_nanovlm_folder(tmp_path, settings, lacking, plain_tokenizer()))


def test_a_tokenizer_may_lie_below_the_name_of_its_repository(
    settings: dict[str, Any], tensors: dict[str, Tensor], vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    folder = write_nanovlm_folder(tmp_path / "model", settings, tensors, None)
    inner = folder / CONFIG["lm_tokenizer"]
    inner.mkdir(parents=True)
    plain_tokenizer().save(str(inner / "tokenizer.json"))
    assert load(folder).token_ids(Request("What?")) == vlm.token_ids(Request("What?"))
    if int8_obstacle(torch.device("cpu")) is None:  # a quantised copy has it too
        save_quantised(load(folder, dtype="int8"), tmp_path / "copy")
        assert load(tmp_path / "copy").token_ids(Request("What?")) == vlm.token_ids(Request("What?"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_cls_flag": True}, "vit_cls_flag = True is not supported; expected False"),
        ({"lm_attn_scaling": 2.0}, "lm_attn_scaling = 2.0 is not supported"),
        ({"lm_n_blocks": "6"}, "lm_n_blocks = '6' is not supported; expected a whole number"),
        ({"mp_image_token_length": 15}, "mp_image_token_length = 15 is not supported; expected 16"),
        ({"max_img_size": 100}, "max_img_size 100 must be a multiple of vit_img_size 32, at most 256"),
        ({"max_img_size": 288}, "max_img_size 288 must be a multiple of vit_img_size 32, at most 256"),
        ({"lm_tokenizer": "../outside"}, "lm_tokenizer = '../outside' is not supported; expected the name of a repository"),
        ({"vlm_extra_tokens": {"r1c1": "<row_1_col_1>"}, "max_img_size": 32}, r"vlm_extra_tokens must begin with <\|image\|>"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(changes: dict[str, Any], message: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official({**settings, **changes})


def test_a_config_without_a_size_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nanoVLM's config\.json lacks vit_inter_dim"):
        VLMConfig.from_official({name: value for name, value in settings.items() if name != "vit_inter_dim"})


def test_the_added_tokens_have_the_released_ids() -> None:
    released = {
        **CONFIG,
        **{"vit_hidden_dim": 768, "vit_inter_dim": 3072, "vit_patch_size": 16, "vit_img_size": 512, "vit_n_heads": 12},
        **{"lm_base_vocab_size": 49152, "lm_vocab_size": 49218, "mp_pixel_shuffle_factor": 4, "mp_image_token_length": 64},
        **{"max_img_size": 2048, "resize_to_max_side_len": True, "vlm_extra_tokens": EXTRA},
    }
    parsed = VLMConfig.from_official(json.loads(json.dumps(released)))
    assert isinstance(parsed, NanoVLMConfig)
    ids = {"<|image|>": 49152, "<|global_image|>": 49153, "<row_1_col_1>": 49154, "<row_8_col_8>": 49217}
    assert {name: parsed.added_tokens[name] for name in ids} == ids
    assert parsed.eos_token_ids == (2,)  # <|im_end|>
    plain = {name: value for name, value in released.items() if name != "vlm_extra_tokens"}
    assert VLMConfig.from_official({**plain, "lm_vocab_size": 49152}).eos_token_ids == (0,)  # <|endoftext|>
    assert (parsed.token_grid, parsed.max_side, parsed.text_config.rotary_scaling) == (8, 2048, LengthScaling(beyond=8192))
