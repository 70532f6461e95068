"""config.json of the official checkpoints becomes the right sizes, and a setting that would change the numbers is refused."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm_v2drop.models.config import LlavaConfig, TextConfig, VisionConfig, VLMConfig

# llava-hf/llava-1.5-7b-hf, which leaves LLaMA's sizes and CLIP's activation out.
HUB: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
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
    "vision_feature_select_strategy": "default",
}
# liuhaotian/llava-v1.5-13b: flat, and the tower is only named.
ORIGINAL: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "image_aspect_ratio": "pad",
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava_llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def changed(path: str, value: object, base: dict[str, Any] = HUB) -> dict[str, Any]:
    """A config with one entry, given as "section.name" or "name", set to another value."""
    raw = copy.deepcopy(base)
    *sections, name = path.split(".")
    (raw[sections[0]] if sections else raw)[name] = value
    return raw


def test_the_hub_config_gives_the_7b_sizes_that_it_leaves_out() -> None:
    config = VLMConfig.from_official(HUB)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 32, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.rms_norm_eps) == (32064, 4096, 1e-5)
    assert (config.vision_config.num_patches, config.vision_layers_run) == (576, 23)
    assert config.vision_config.hidden_act == "quick_gelu"
    assert (config.image_token_id, config.eos_token_ids) == (32000, (2,))


@pytest.mark.parametrize(("section", "ours"), [("text_config", TextConfig), ("vision_config", VisionConfig)])
def test_every_default_equals_that_of_transformers(section: str, ours: type) -> None:
    transformers = pytest.importorskip("transformers")
    official = getattr(transformers.LlavaConfig(**copy.deepcopy(HUB)), section)
    config = getattr(VLMConfig.from_official(HUB), section)
    compared = [item.name for item in dataclasses.fields(ours) if hasattr(official, item.name)]
    assert len(compared) >= 9
    for name in compared:
        assert getattr(config, name) == getattr(official, name), name


def test_the_original_flat_config_gives_the_13b_sizes() -> None:
    config = VLMConfig.from_official(ORIGINAL)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim) == (5120, 13824, 40, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.rms_norm_eps) == (32000, 4096, 1e-5)
    assert config.vision_config == VisionConfig()
    assert VLMConfig.from_official(changed("mm_vision_select_layer", -3, ORIGINAL)).vision_layers_run == 22


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ],
    ids=str,
)
def test_every_spelling_of_the_rotary_base_is_read(spelling: dict[str, Any]) -> None:
    raw = changed("text_config", {**HUB["text_config"], **spelling})
    assert VLMConfig.from_official(raw).text_config.rope_theta == 5e5


@pytest.mark.parametrize("spelling", [("rope_scaling", "type"), ("rope_parameters", "rope_type")])
def test_multimodal_rotary_sections_are_read_and_qwen2_has_biases(spelling: tuple[str, str]) -> None:
    field, kind = spelling
    qwen2 = {"model_type": "qwen2_vl_text", field: {kind: "mrope", "mrope_section": [16, 24, 24]}}
    text = VLMConfig.from_official(changed("text_config", qwen2)).text_config
    assert text.mrope_section == (16, 24, 24)
    assert text.qkv_bias
    assert not VLMConfig.from_official(HUB).text_config.qkv_bias


UNSUPPORTED: list[tuple[str, object, str]] = [
    ("model_type", "llava_next_video", r"model_type = 'llava_next_video' .*expected one of 'llava', 'llava_llama'"),
    ("text_config.hidden_act", "gelu", r"text_config\.hidden_act = 'gelu' is not supported; expected 'silu'"),
    ("text_config.attention_bias", True, r"text_config\.attention_bias = True"),
    ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, r"text_config\.rope_scaling\.type = 'linear'"),
    ("text_config.rope_parameters", {"rope_type": "llama3"}, r"text_config\.rope_parameters\.rope_type = 'llama3' .*'mrope'"),
    ("vision_config.model_type", "siglip_vision_model", r"vision_config\.model_type = 'siglip_vision_model'"),
    ("projector_hidden_act", "relu", r"projector_hidden_act = 'relu' is not supported; expected 'gelu'"),
    ("multimodal_projector_bias", False, r"multimodal_projector_bias = False"),
    ("mm_projector_type", "linear", r"mm_projector_type = 'linear'"),
    ("vision_feature_select_strategy", "full", r"vision_feature_select_strategy = 'full' .* expected 'default'"),
]


@pytest.mark.parametrize(("path", "value", "message"), UNSUPPORTED, ids=[path for path, _, _ in UNSUPPORTED])
def test_a_setting_that_would_change_the_numbers_is_refused_by_name(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official(changed(path, value))


BAD_SIZES: list[tuple[str, object, str]] = [
    ("text_config.hidden_size", 4100, r"hidden_size 4100 must be a positive multiple of num_attention_heads 32"),
    ("text_config.num_attention_heads", 0, r"text_config\.num_attention_heads = 0 .*expected a whole number"),
    ("text_config.num_key_value_heads", 5, r"num_attention_heads 32 must be .* num_key_value_heads 5"),
    ("text_config.rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 16]}, r"mrope_section \(16, 24, 16\) .* 128"),
    ("vision_config.num_attention_heads", 15, r"hidden_size 1024 must be .* num_attention_heads 15"),
    ("vision_config.image_size", 340, r"image_size 340 must be .* patch_size 14"),
    ("vision_feature_layer", 25, r"vision_feature_layer 25 is outside a tower of 24 layers"),
    ("vision_feature_layer", -26, r"vision_feature_layer -26 is outside a tower of 24 layers"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_SIZES, ids=[f"{path}={value}" for path, value, _ in BAD_SIZES])
def test_sizes_that_do_not_fit_together_are_refused_with_both_numbers(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official(changed(path, value))


def test_a_head_size_may_differ_from_width_over_heads() -> None:
    config = TextConfig(hidden_size=100, num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    assert (config.head_dim, config.num_key_value_heads) == (16, 2)


@settings(deadline=None)
@given(depth=st.integers(1, 40), data=st.data())
def test_the_feature_layer_counts_hidden_states_as_transformers_does(depth: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(-depth - 1, depth))
    config = LlavaConfig(vision_config=VisionConfig(num_hidden_layers=depth), vision_feature_layer=layer)
    blocks_behind = list(range(depth + 1))  # hidden_states[i] has gone through i blocks
    assert config.vision_layers_run == blocks_behind[layer]


@pytest.mark.parametrize(
    ("generation", "expected"), [(None, (7,)), ({"eos_token_id": 5}, (5,)), ({"eos_token_id": [5, 9]}, (5, 9)), ({}, (7,))]
)
def test_the_end_of_sequence_comes_from_the_generation_config_where_that_names_it(
    generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed("text_config.eos_token_id", 7)))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert VLMConfig.from_folder(tmp_path).eos_token_ids == expected


def test_null_is_what_is_left_out_only_where_transformers_takes_it_so() -> None:
    for name in ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "sliding_window", "eos_token_id"):
        assert VLMConfig.from_official(changed(f"text_config.{name}", None)) == VLMConfig.from_official(HUB), name
    for name in ("rms_norm_eps", "rope_theta", "hidden_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act"):
        with pytest.raises(ValueError, match=rf"text_config\.{name} = None is not supported; expected"):
            VLMConfig.from_official(changed(f"text_config.{name}", None))


def test_a_flat_config_is_read_whatever_its_model_type_is_called() -> None:
    raw = {"model_type": "llava", "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    assert VLMConfig.from_official(raw).text_config.hidden_size == 48


def test_an_end_of_sequence_token_of_null_falls_back_to_llamas() -> None:
    assert VLMConfig.from_official({"model_type": "llava", "text_config": {"eos_token_id": None}}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer = \[-2, -5\] is not supported; expected a whole number"),
        ({"text_config": {"model_type": "granite"}}, "text_config.model_type = 'granite' is not supported"),
        ({"text_config": {"mlp_bias": True}}, "text_config.mlp_bias = True is not supported"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature = 'cls_patch' is not supported"),
    ],
)
def test_less_common_settings_that_would_change_the_numbers_are_refused_too(raw: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official({"model_type": "llava", **raw})
