"""LLaVA-OneVision as a whole equals transformers', from config.json and tensor names to generated tokens.

transformers reads the pixel values that our processor makes; that these are the official ones, tests/test_images_onevision.py
shows.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import with_prefixes
from onevision import (
    PINPOINTS,
    TEXT,
    VISION,
    frames,
    onevision_names,
    onevision_reference,
    onevision_tokenizer,
    picture,
    write_onevision_files,
    write_onevision_folder,
)
from safetensors.torch import save_file
from tiny import logits_of, pack_together
from torch import Tensor

from nanovlm_v2drop.dropping import DropSchedule, V2Drop
from nanovlm_v2drop.inference import decode_one_token, generate, prefill
from nanovlm_v2drop.loading.checkpoint import load_model
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.precision import named_precision
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.config import LlavaOnevisionConfig, SiglipVisionConfig, TextConfig, VLMConfig
from nanovlm_v2drop.models.vlm import LlavaOnevisionModel, PackedInputs, VisionInput
from nanovlm_v2drop.processing.prompts import Request, build_prompt
from nanovlm_v2drop.processing.tokenizer import load_tokenizer

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")

# llava-hf/llava-onevision-qwen2-7b-ov-hf, which leaves out what Qwen2 and SigLIP have by default.
HUB_7B: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "image_grid_pinpoints": PINPOINTS,
    "image_token_index": 151646,
    "model_type": "llava_onevision",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "Qwen/Qwen2-7B-Instruct",
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 152128,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_image_newline_parameter": True,
    "video_token_index": 151647,
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
SMALL_TEXT = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
HUB_05B: dict[str, Any] = {**HUB_7B, "text_config": {**HUB_7B["text_config"], **SMALL_TEXT}}
# lmms-lab/llava-onevision-qwen2-7b-ov: flat, and the tower, of which one block was cut off, is only named.
ORIGINAL: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": PINPOINTS,
    "image_token_index": 151646,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_type": "llava_qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
REQUESTS: dict[str, Request] = {
    "square": Request("What is it?", images=[picture(400, 400)]),
    "wide": Request("What is it?", images=[picture(900, 250)]),
    "tall": Request("What is it?", images=[picture(200, 700)]),
    "over the cap": Request("What is it?", images=[picture(1600, 1100)]),
    "tiny": Request("What is it?", images=[picture(33, 20)]),
    "two pictures": Request("Is <image> like\n<image>?", images=[picture(300, 500), picture(60, 40)]),
    "video": Request("What happens?", video=frames(5)),
    "two videos": Request("Which is longer?", video=[frames(2), frames(4)[2:]]),
    "picture and video": Request("<video>\nIs this\n<image> in it?", images=[picture(500, 300)], video=frames(3)),
    "text": Request("What is two and two?"),
}


# Configuration


def official_config(raw: dict[str, Any]) -> Any:
    return pytest.importorskip("transformers").LlavaOnevisionConfig(**copy.deepcopy(raw))


def assert_same_fields(ours: TextConfig | SiglipVisionConfig, official: Any) -> None:
    compared = [field.name for field in dataclasses.fields(ours) if hasattr(official, field.name)]
    assert len(compared) >= 8
    for name in compared:
        assert getattr(ours, name) == getattr(official, name), name


def changed(base: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A config with one entry, given as "section.name" or "name", set to another value."""
    raw = copy.deepcopy(base)
    *sections, name = path.split(".")
    (raw[sections[0]] if sections else raw)[name] = value
    return raw


BARE: dict[str, Any] = {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}
CONFIGS = {
    "hub 7b": HUB_7B,
    "hub 0.5b": HUB_05B,
    "bare": BARE,
    "bare tower": {**BARE, "vision_config": {"model_type": "siglip_vision_model"}, "image_grid_pinpoints": [[224, 448]]},
    "32 key heads": changed(BARE, "text_config.num_attention_heads", 64),
    "key heads of null": changed(BARE, "text_config.num_key_value_heads", None),
}


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_what_a_file_leaves_out_is_what_transformers_takes_it_to_be(raw: dict[str, Any]) -> None:
    config, official = VLMConfig.from_official(raw), official_config(raw)
    assert isinstance(config, LlavaOnevisionConfig)
    assert_same_fields(config.text_config, official.text_config)
    assert config.text_config.rope_theta == official.text_config.rope_parameters["rope_theta"]
    assert config.text_config.tie_word_embeddings == official.tie_word_embeddings
    assert_same_fields(config.vision_config, official.vision_config)
    assert config.image_grid_pinpoints == tuple(map(tuple, official.image_grid_pinpoints))
    for name in ("image_token_id", "video_token_id", "vision_feature_layer", "vision_aspect_ratio"):
        assert getattr(config, name) == getattr(official, name), name


def test_the_released_sizes_are_read() -> None:
    large, small = VLMConfig.from_official(HUB_7B), VLMConfig.from_official(HUB_05B)
    assert (large.text_config.head_dim, large.text_config.max_position_embeddings) == (128, 32768)
    assert (small.text_config.hidden_size, small.text_config.tie_word_embeddings) == (896, True)
    for config in (large, small):
        assert config.text_config.qkv_bias
        assert (config.vision_config.grid_size, config.vision_layers_run, config.max_tiles) == (27, 26, 9)
        assert (config.vision_tokens, config.eos_token_ids) == ({"<image>": 151646, "<video>": 151647}, (151645,))


@pytest.mark.parametrize("pinpoints", [PINPOINTS, "(1x1),...,(6x6)"], ids=["list", "string"])
def test_the_original_flat_config_is_that_of_the_hub(pinpoints: Any) -> None:
    config = VLMConfig.from_official(changed(ORIGINAL, "image_grid_pinpoints", pinpoints))
    text = dataclasses.replace(config.text_config, vocab_size=152128)  # the hub's has rows for the two vision tokens
    assert dataclasses.replace(config, text_config=text) == VLMConfig.from_official(HUB_7B)


@pytest.mark.parametrize("raw", [HUB_7B, HUB_05B], ids=["7b", "0.5b"])
def test_what_transformers_saves_of_a_config_is_read_to_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    official_config(raw).save_pretrained(tmp_path)
    assert VLMConfig.from_folder(tmp_path) == VLMConfig.from_official(raw)


def test_the_generation_config_names_the_ends_of_an_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB_7B))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    assert VLMConfig.from_folder(tmp_path).eos_token_ids == (151645, 151643)
    raw = copy.deepcopy(HUB_7B)
    del raw["text_config"]["eos_token_id"]
    assert VLMConfig.from_official(raw).eos_token_ids == (151645, 151643)


UNSUPPORTED: list[tuple[dict[str, Any], str, object, str]] = [
    (HUB_7B, "vision_config.model_type", "clip_vision_model", "vision_config.model_type = 'clip_vision_model'"),
    (HUB_7B, "vision_feature_select_strategy", "default", "vision_feature_select_strategy = 'default' .*; expected 'full'"),
    (HUB_7B, "vision_feature_layer", [-1, -2], r"vision_feature_layer = \[-1, -2\] is not supported; expected a whole number"),
    (HUB_7B, "vision_feature_layer", -28, "vision_feature_layer -28 is outside a tower of 26 layers"),
    (HUB_7B, "projector_hidden_act", "relu", "projector_hidden_act = 'relu'"),
    (HUB_7B, "multimodal_projector_bias", False, "multimodal_projector_bias = False"),
    (HUB_7B, "vision_aspect_ratio", "anyres", "vision_aspect_ratio = 'anyres' .*expected a text like 'anyres_max_9'"),
    (HUB_7B, "image_grid_pinpoints", [[384, 400]], "image_grid_pinpoints 400 must be a positive multiple of image_size 384"),
    (HUB_7B, "text_config.hidden_act", "gelu", "text_config.hidden_act = 'gelu'"),
    (HUB_7B, "text_config.layer_types", ["sliding_attention"] * 28, "text_config.use_sliding_window with a sliding_window of"),
    (HUB_7B, "text_config.rope_scaling", {"type": "su", "factor": 4.0}, "text_config.rope_scaling.type = 'su'"),
    (ORIGINAL, "image_aspect_ratio", "pad", "image_aspect_ratio = 'pad' is not supported"),
    (ORIGINAL, "image_grid_pinpoints", "(1x1),(2x2)", r"image_grid_pinpoints = '\(1x1\),\(2x2\)' is not supported"),
    (ORIGINAL, "mm_newline_position", "frame", "mm_newline_position = 'frame' .*expected one of 'one_token', 'grid'"),
    (ORIGINAL, "mm_patch_merge_type", "flat", "mm_patch_merge_type = 'flat'"),
    (ORIGINAL, "mm_projector_type", "linear", "mm_projector_type = 'linear'"),
    (ORIGINAL, "mm_spatial_pool_mode", "max", "mm_spatial_pool_mode = 'max' .*expected one of 'bilinear', 'average'"),
    (ORIGINAL, "mm_spatial_pool_stride", 4, "mm_spatial_pool_stride = 4"),
    (ORIGINAL, "add_faster_video", True, "add_faster_video = True"),
]


@pytest.mark.parametrize(("base", "path", "value", "message"), UNSUPPORTED, ids=[f"{row[1]}={row[2]}" for row in UNSUPPORTED])
def test_a_setting_that_would_change_the_numbers_is_refused_by_name(
    base: dict[str, Any], path: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official(changed(base, path, value))


# Checkpoints


@pytest.fixture(scope="module")
def reference() -> Any:
    return onevision_reference(onevision_tokenizer())


@pytest.fixture(scope="module")
def tensors(reference: Any) -> Tensors:
    """The weights under the hub's names."""
    return onevision_names(reference.state_dict())


@pytest.fixture(scope="module")
def folder(reference: Any, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onevision_folder(tmp_path_factory.mktemp("onevision"), reference, tensors, onevision_tokenizer())


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder)


@pytest.fixture
def stored(folder: Path, tmp_path: Path) -> Callable[[Tensors], LlavaOnevisionModel]:
    """Saves other tensors beside the same config.json, and loads them."""

    def save_and_load(changed_tensors: Tensors) -> LlavaOnevisionModel:
        save_file(changed_tensors, tmp_path / "model.safetensors")
        model = load_model(tmp_path, VLMConfig.from_folder(folder), device=CPU, precision=named_precision("float32", CPU))
        assert isinstance(model, LlavaOnevisionModel)
        return model

    return save_and_load


def assert_same_weights(model: LlavaOnevisionModel, expected: LlavaOnevisionModel) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def transformers_5_names(tensors: Tensors) -> Tensors:
    return {name.replace(".vision_model.", "."): tensor for name, tensor in tensors.items()}


def new_names(tensors: Tensors) -> Tensors:
    prefixes = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    }
    return with_prefixes(transformers_5_names(tensors), prefixes)


def original_names(tensors: Tensors) -> Tensors:
    prefixes = {
        "language_model.": "",
        "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "image_newline": "model.image_newline",
    }
    return with_prefixes(tensors, prefixes)


def with_head(tensors: Tensors) -> Tensors:
    """SigLIP's pooling, which is in checkpoints made with `vision_use_head`."""
    head = "vision_tower.vision_model.head."
    unused = {f"{head}probe": torch.ones(1, 1, 32), f"{head}attention.in_proj_weight": torch.ones(96, 32)}
    return tensors | unused | {f"{head}mlp.fc1.weight": torch.ones(64, 32), f"{head}layernorm.bias": torch.ones(32)}


def without_post_layernorm(tensors: Tensors) -> Tensors:
    kept = {name: tensor for name, tensor in tensors.items() if "post_layernorm" not in name}
    assert len(kept) == len(tensors) - 2
    return kept


DIALECTS: dict[str, Callable[[Tensors], Tensors]] = {
    "hub": dict,
    "transformers 5": transformers_5_names,
    "new": new_names,
    "original": original_names,
}


@pytest.mark.parametrize("extra", [dict, with_head, without_post_layernorm])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_weights_and_no_head_or_last_norm_is_needed(
    dialect: str,
    extra: Callable[[Tensors], Tensors],
    stored: Callable[[Tensors], LlavaOnevisionModel],
    tensors: Tensors,
    vlm: VisionLanguageModel,
) -> None:
    assert_same_weights(stored(DIALECTS[dialect](extra(tensors))), vlm.model)


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_itself_loads(
    original_format: bool, reference: Any, vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path, save_original_format=original_format)
    write_onevision_files(tmp_path, onevision_tokenizer())
    assert_same_weights(load(tmp_path).model, vlm.model)


def test_the_hubs_spelling_of_the_config_is_that_which_transformers_saves(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    config = vlm.config
    text = {"model_type": "qwen2", "vocab_size": config.text_config.vocab_size, **TEXT}
    hub = {
        **{name: value for name, value in HUB_7B.items() if not name.endswith("_config")},
        "image_token_index": config.image_token_id,
        "video_token_index": config.video_token_id,
        "text_config": {name: value for name, value in text.items() if name != "rms_norm_eps"},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    }
    (tmp_path / "config.json").write_text(json.dumps(hub))
    write_onevision_files(tmp_path, onevision_tokenizer())
    assert VLMConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tied_embeddings_need_no_stored_head(dialect: str, tmp_path: Path) -> None:
    reference = onevision_reference(onevision_tokenizer(), tie_word_embeddings=True)
    tensors = onevision_names(reference.state_dict())
    del tensors["language_model.lm_head.weight"]
    model = load(write_onevision_folder(tmp_path, reference, DIALECTS[dialect](tensors), onevision_tokenizer())).model
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight
    assert torch.equal(model.language_model.lm_head.weight, reference.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_newline", "lacks tensors of the model: image_newline"),
        ("language_model.model.layers.4.self_attn.k_proj.bias", r"lacks .*language_model\.layers\.4\.self_attn\.k_proj\.bias"),
        ("vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias", r"lacks .*encoder\.layers\.2\.mlp\.fc2\.bias"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(
    name: str, message: str, stored: Callable[[Tensors], LlavaOnevisionModel], tensors: Tensors
) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored({other: tensor for other, tensor in tensors.items() if other != name})


# Prompts

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PROMPTS: list[tuple[Request, str]] = [
    (Request("Hi"), "Hi"),
    (Request("What?", images=[picture(8, 8)]), "<image>\nWhat?"),
    (Request("What?", images=[picture(8, 8), picture(9, 9)]), "<image>\n<image>\nWhat?"),
    (Request("What?", video=frames(2)), "<video>\nWhat?"),
    (Request("What?", images=[picture(8, 8)], video=frames(2)), "<image>\n<video>\nWhat?"),
    (Request("Is <image> in\n<video>?", images=[picture(8, 8)], video=frames(2)), "Is <image> in\n<video>?"),
]


@pytest.mark.parametrize(("request_", "said"), PROMPTS, ids=[said for _, said in PROMPTS])
def test_the_templates_are_the_official_ones_to_the_letter(request_: Request, said: str) -> None:
    turn = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    assert build_prompt(request_, "qwen_1_5") == SYSTEM + turn
    assert build_prompt(request_, "qwen_hub") == turn


@pytest.mark.parametrize("name", REQUESTS)
def test_token_ids_are_the_tokenizers_own_of_the_prompt_with_repeated_vision_tokens(
    name: str, vlm: VisionLanguageModel
) -> None:
    token_ids, media = vlm.tokens_and_media(REQUESTS[name])
    pieces = build_prompt(REQUESTS[name], "qwen_1_5")
    for token, is_video in (("<image>", False), ("<video>", True)):
        first, *rest = pieces.split(token)
        counts = [medium.num_tokens for medium in media if medium.is_video is is_video]
        pieces = first + "".join(token * count + text for count, text in zip(counts, rest, strict=True))
    assert token_ids == vlm.tokenizer.encode(pieces)
    assert vlm.token_ids(REQUESTS[name]) == token_ids


@pytest.mark.parametrize("name", REQUESTS)
def test_pictures_have_as_many_tiles_as_the_official_processor_makes_of_them(name: str, vlm: VisionLanguageModel) -> None:
    module = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    request = REQUESTS[name]
    official = module.LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = official([request.images])["pixel_values"] if request.images else []
    given = [medium.pixel_values for medium in vlm.tokens_and_media(request)[1] if not medium.is_video]
    assert [len(tiles) for tiles in given] == [len(tiles) for tiles in expected]


def test_a_tokenizer_without_vision_tokens_gets_them_behind_its_own(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    raw = json.loads(onevision_tokenizer().to_str())  # as lmms-lab's, which is Qwen2's own
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in vlm.config.vision_tokens]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path, vlm.config.vision_tokens)
    prompt = build_prompt(REQUESTS["picture and video"], "qwen_1_5")
    assert tokenizer.encode(prompt) == vlm.tokenizer.encode(prompt)


# The whole


@dataclass(frozen=True)
class Official:
    """The results of transformers for a request: (T, D), (T,), (T, vocab_size), and six new tokens."""

    inputs_embeds: Tensor
    position_ids: Tensor
    logits: Tensor
    features: Tensor  # (n, D): the pictures', then the video's
    new_tokens: list[int]


@dataclass(frozen=True)
class Case:
    request: Request
    media: list[VisionInput]
    packed: PackedInputs
    official: Official


@contextmanager
def recorded(module: Any, record: Callable[..., None]) -> Iterator[None]:
    """Calls `record` with the arguments of each call of `module`."""
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: record(*args, **kwargs), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def official_inputs(token_ids: list[int], media: list[VisionInput]) -> dict[str, Any]:
    """The arguments of transformers' model: pictures and videos are separate, in any order of the prompt."""
    images = [medium for medium in media if not medium.is_video]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([token_ids])}
    if images:
        inputs["pixel_values"] = torch.stack([medium.pixel_values for medium in images])
        inputs["image_sizes"] = torch.tensor([medium.size for medium in images])
        inputs["batch_num_images"] = torch.tensor([len(images)])
    if videos := [medium.pixel_values for medium in media if medium.is_video]:
        inputs["pixel_values_videos"] = torch.stack(videos)
    return inputs


def official_results(reference: Any, inputs: dict[str, Any], eos_token_ids: tuple[int, ...]) -> Official:
    seen: dict[str, Tensor] = {}
    decoder = reference.model.language_model
    with (
        recorded(decoder, lambda inputs_embeds, **_: seen.update(inputs_embeds=inputs_embeds[0])),
        recorded(decoder.rotary_emb, lambda _, position_ids: seen.update(position_ids=position_ids[0])),
    ):
        output = reference(**inputs)
    states = (output.image_hidden_states, output.video_hidden_states)
    features = [features.flatten(0, -2) for features in states if features is not None]
    ends: dict[str, Any] = {"eos_token_id": list(eos_token_ids), "pad_token_id": 0}
    mask = torch.ones_like(inputs["input_ids"])
    generated = reference.generate(**inputs, attention_mask=mask, do_sample=False, max_new_tokens=6, **ends)
    new_tokens = generated[0, inputs["input_ids"].shape[1] :].tolist()
    return Official(logits=output.logits[0], features=stacked(features), new_tokens=new_tokens, **seen)


def stacked(features: list[Tensor]) -> Tensor:
    """(n, D) of none, one or several pictures."""
    return torch.cat([torch.empty(0, TEXT["hidden_size"]), *features])


@pytest.fixture(scope="module", params=REQUESTS)
def case(request: pytest.FixtureRequest, reference: Any, vlm: VisionLanguageModel) -> Case:
    asked = REQUESTS[request.param]
    token_ids, media = vlm.tokens_and_media(asked)
    official = official_results(reference, official_inputs(token_ids, media), vlm.config.eos_token_ids)
    return Case(asked, media, vlm.prepare([asked]), official)


def test_the_decoder_is_given_what_transformers_gives_it(case: Case, vlm: VisionLanguageModel) -> None:
    torch.testing.assert_close(case.packed.inputs_embeds, case.official.inputs_embeds, atol=1e-5, rtol=0)
    assert torch.equal(case.packed.position_ids, case.official.position_ids)
    in_order = sorted(case.media, key=lambda medium: medium.is_video)
    encoded = vlm.model.encode(in_order) if in_order else []
    features = stacked([each.features for each in encoded])
    torch.testing.assert_close(features, case.official.features, atol=1e-5, rtol=0)


def test_the_logits_of_every_position_equal_those_of_transformers(case: Case, vlm: VisionLanguageModel) -> None:
    logits = logits_of(vlm.model, case.packed)
    assert (logits - case.official.logits).abs().max() < 1e-4
    prefilled = prefill(vlm.model.language_model, case.packed)
    torch.testing.assert_close(prefilled.logits[0], case.official.logits[-1], atol=1e-4, rtol=0)


def test_the_same_tokens_are_generated(case: Case, vlm: VisionLanguageModel) -> None:
    (answer,) = generate(vlm, [case.request], max_new_tokens=6)
    assert answer.token_ids == case.official.new_tokens


def test_cached_decoding_equals_a_full_forward_of_the_longer_prompt(case: Case, vlm: VisionLanguageModel) -> None:
    token_ids, media = vlm.tokens_and_media(case.request)
    new_tokens = [5, 17, 200]
    cache = prefill(vlm.model.language_model, case.packed).cache
    decoded = torch.cat([decode_one_token(vlm.model.language_model, torch.tensor([token]), cache) for token in new_tokens])
    full = logits_of(vlm.model, vlm.model.pack([token_ids + new_tokens], [media], (0,)))[-len(new_tokens) :]
    torch.testing.assert_close(decoded, full, atol=1e-4, rtol=0)


MIXED = ("tall", "text", "two pictures", "picture and video", "video", "tiny")


def test_a_packed_batch_is_its_requests_one_by_one(vlm: VisionLanguageModel) -> None:
    requests = [REQUESTS[name] for name in MIXED]
    together, parts = vlm.prepare(requests), [vlm.prepare([request]) for request in requests]
    alone = pack_together(parts)
    torch.testing.assert_close(together.inputs_embeds, alone.inputs_embeds, atol=1e-5, rtol=0)
    for name in ("position_ids", "vision_mask"):
        assert torch.equal(getattr(together, name), getattr(alone, name)), name
    for name in ("seqlens", "vision_counts", "vision_grids", "seeds"):
        assert getattr(together, name) == getattr(alone, name), name
    assert len(together.vision) == len(alone.vision)
    for one, other in zip(together.vision, alone.vision, strict=True):
        torch.testing.assert_close(one.hidden_states, other.hidden_states, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.received_attention(), other.received_attention(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropper", [None, V2Drop(DropSchedule({2: 0.5, 4: 0.1}))], ids=["dense", "v2drop"])
def test_answers_in_a_packed_batch_are_those_one_by_one(dropper: V2Drop | None, vlm: VisionLanguageModel) -> None:
    requests, decoder = [REQUESTS[name] for name in MIXED], vlm.model.language_model
    together = prefill(decoder, vlm.prepare(requests), dropper)
    alone = [prefill(decoder, vlm.prepare([request]), dropper) for request in requests]
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]), atol=1e-4, rtol=0)
    for index, one in enumerate(alone):
        for (layer, kept), (other_layer, (other_kept,)) in zip(together.kept, one.kept, strict=True):
            assert layer == other_layer
            assert torch.equal(kept[index], other_kept)


# Traces for methods that choose tokens before the decoder


def official_arrangement(reference: Any, medium: VisionInput, values: Tensor) -> Tensor:
    """Values (tiles, P, C) arranged by transformers, with zeros for newlines: (n, C)."""
    nothing = torch.zeros(values.shape[-1])
    if medium.is_video:
        return torch.cat([reference.model.apply_pooling(values).flatten(0, 1), nothing[None]])
    return reference.model.pack_image_features([values], [medium.size], nothing)[0][0]


def official_queries_and_keys(reference: Any, medium: VisionInput) -> tuple[Tensor, Tensor]:
    """(tiles, P, V) each, of the tower's last block."""
    seen: dict[str, Tensor] = {}
    attention = reference.model.vision_tower.encoder.layers[-1].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
        for name in ("q_proj", "k_proj")
    ]
    reference.model.vision_tower(medium.pixel_values)
    for hook in hooks:
        hook.remove()
    return seen["q_proj"], seen["k_proj"]


def by_heads(projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (2, -1)).transpose(1, 2)  # (tiles, heads, P, head_dim)


def test_there_is_a_trace_for_each_grid_and_its_features_are_the_rows_of_the_embeddings(case: Case) -> None:
    ((grids,), packed) = case.packed.vision_grids, case.packed
    assert [len(trace.hidden_states) for trace in packed.vision] == [one * two * three for one, two, three in grids]
    features = [trace.project(trace.hidden_states[trace.num_class_tokens :]) for trace in packed.vision]
    assert torch.equal(stacked(features), packed.inputs_embeds[packed.vision_mask])


@pytest.mark.parametrize("name", ["wide", "over the cap", "two pictures", "video", "picture and video"])
def test_received_attention_and_keys_are_arranged_as_the_features_are(
    name: str, vlm: VisionLanguageModel, reference: Any
) -> None:
    traces = iter(vlm.prepare([REQUESTS[name]]).vision)
    for medium in vlm.tokens_and_media(REQUESTS[name])[1]:
        parts = [next(traces) for _ in medium.grids]
        queries, keys = official_queries_and_keys(reference, medium)
        weights = (by_heads(queries) @ by_heads(keys).transpose(-1, -2) / 4).softmax(-1)  # head_dim 16
        attention = official_arrangement(reference, medium, weights.mean(-2).transpose(1, 2))  # (n, heads)
        arranged_keys = official_arrangement(reference, medium, keys).unflatten(-1, (2, -1)).transpose(0, 1)
        given_attention = torch.cat([part.received_attention() for part in parts], dim=-1)
        torch.testing.assert_close(given_attention, attention.T, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(torch.cat([part.keys() for part in parts], dim=1), arranged_keys, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["received_attention", "keys"])
def test_what_the_tower_gives_a_trace_is_computed_once_a_picture_and_only_when_asked(
    name: str, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, computed = vlm.model.vision_tower, []
    compute = getattr(tower, name)
    monkeypatch.setattr(tower, name, lambda block_input: computed.append(compute(block_input)) or computed[-1])
    packed = vlm.prepare([REQUESTS["two pictures"]])
    assert len(packed.vision) == 4
    assert computed == []
    parts = [getattr(trace, name)() for trace in packed.vision]
    assert len(computed) == 2
    assert all(torch.equal(getattr(trace, name)(), part) for trace, part in zip(packed.vision, parts, strict=True))
    assert len(computed) == 2


@pytest.mark.parametrize(("name", "columns"), [("wide", 82), ("two pictures", 1), ("video", 1)])
def test_newline_rows_receive_no_attention_and_have_no_keys(name: str, columns: int, vlm: VisionLanguageModel) -> None:
    packed = vlm.prepare([REQUESTS[name]])
    trace, grid = packed.vision[1], packed.vision_grids[0][1]
    assert grid[2] == columns
    attention = trace.received_attention().unflatten(-1, grid[1:])  # (heads, rows, columns)
    keys = trace.keys().unflatten(1, grid[1:])
    assert not attention[..., -1].any()
    assert not keys[:, :, -1].any()
    assert (attention[..., :-1] > 0).all()
