"""config.json of the official checkpoints becomes the right sizes, and a setting that would change the numbers is refused."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm_v2drop.models.config import LlavaConfig, SiglipVisionConfig, TextConfig, VisionConfig, VLMConfig

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
    raw = {"model_type": "qwen2_vl", "text_config": qwen2, "vision_config": {"hidden_size": 8192}}
    text = VLMConfig.from_official(raw).text_config
    assert text.mrope_section == (16, 24, 24)
    assert text.qkv_bias
    assert not VLMConfig.from_official(HUB).text_config.qkv_bias
    with pytest.raises(ValueError, match=r"text_config\.mrope_section \(16, 24, 24\) is not supported; positions"):
        VLMConfig.from_official(changed("text_config.rope_scaling", qwen2[field]))


UNSUPPORTED: list[tuple[str, object, str]] = [
    ("model_type", "llava_next_video", r"model_type = 'llava_next_video' .*expected one of 'llava', 'llava_llama'"),
    ("text_config.hidden_act", "gelu", r"text_config\.hidden_act = 'gelu' is not supported; expected 'silu'"),
    ("text_config.attention_bias", True, r"text_config\.attention_bias = True"),
    ("text_config.rope_scaling", {"type": "su", "factor": 2.0}, r"text_config\.rope_scaling\.type = 'su'"),
    ("text_config.rope_parameters", {"rope_type": "longrope"}, r"text_config\.rope_parameters\.rope_type = 'longrope'"),
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


# What a file leaves out, or says twice: as transformers reads it, or refused.

TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaConfig", HUB["vision_config"]),
    "llava_next": ("LlavaNextConfig", HUB["vision_config"]),
    "llava_onevision": (
        "LlavaOnevisionConfig",
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 26,
            "patch_size": 14,
        },
    ),
}
OPTIONAL = tuple(TOWERS["llava_onevision"][1])
TEXTS: dict[str, dict[str, Any]] = {**{name: {"model_type": name} for name in ("llama", "qwen2", "qwen3")}, "none": {}}


def official_config(raw: dict[str, Any]) -> Any:
    """transformers' config of the same file; ValueError where it refuses one."""
    transformers = pytest.importorskip("transformers")
    from huggingface_hub.errors import StrictDataclassError

    names = {name: kind for name, (kind, _) in TOWERS.items()} | {"qwen2_vl": "Qwen2VLConfig"}
    try:
        return getattr(transformers, names[raw["model_type"]])(**copy.deepcopy(raw))
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def read_or_refused(read: Any, raw: dict[str, Any]) -> Any:
    """What `read` makes of a config, or None where it refuses it."""
    try:
        return read(raw)
    except ValueError:
        return None


def assert_same(ours: object, official: Any, kind: type) -> None:
    compared = [item.name for item in dataclasses.fields(kind) if getattr(official, item.name, None) is not None]
    assert len(compared) >= 8
    for name in compared:
        assert getattr(ours, name) == getattr(official, name), name


@settings(deadline=None, max_examples=60)
@given(family=st.sampled_from(sorted(TOWERS)), left_out=st.sets(st.sampled_from(OPTIONAL)))
def test_whatever_a_vision_config_leaves_out_is_what_transformers_takes(family: str, left_out: set[str]) -> None:
    vision = {name: value for name, value in TOWERS[family][1].items() if name not in left_out}
    raw = {"model_type": family, "vision_config": vision}
    config, official = read_or_refused(VLMConfig.from_official, raw), read_or_refused(official_config, raw)
    if official is None:
        assert config is None
    elif config is not None:  # pinpoints that do not fit the tiles, and a layer that is not there, are refused by us alone
        assert_same(config.vision_config, official.vision_config, VisionConfig)
    else:
        assert official.vision_config.image_size % official.vision_config.patch_size or family != "llava"


def test_without_a_vision_config_the_tower_is_that_of_the_released_models() -> None:
    for family, (kind, _) in TOWERS.items():
        config, official = VLMConfig.from_official({"model_type": family}), official_config({"model_type": family})
        assert_same(config.vision_config, official.vision_config, VisionConfig)
        assert isinstance(config.vision_config, SiglipVisionConfig) == (kind == "LlavaOnevisionConfig")


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_config_has_the_defaults_of_its_own_model_type(family: str, text: dict[str, Any]) -> None:
    raw = {"model_type": family, "text_config": text}
    config, official = VLMConfig.from_official(raw).text_config, official_config(raw).text_config
    assert_same(config, official, TextConfig)
    assert config.rope_theta == official.rope_parameters["rope_theta"]
    assert config.qkv_bias == (official.model_type == "qwen2")
    assert config.qk_norm == (official.model_type == "qwen3")


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("outer", [None, True, False])
@pytest.mark.parametrize("inner", [None, True, False])
def test_embeddings_are_tied_where_transformers_ties_them(family: str, outer: bool | None, inner: bool | None) -> None:
    given = [{} if tied is None else {"tie_word_embeddings": tied} for tied in (outer, inner)]
    rope = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_scaling": MROPE}
    text = {**given[1], **(rope if family == "qwen2_vl" else {})}
    raw = {"model_type": family, **given[0], "text_config": text, "vision_config": TOWERS.get(family, ("", {}))[1]}
    assert VLMConfig.from_official(raw).text_config.tie_word_embeddings == official_config(raw).tie_word_embeddings


MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}


@settings(deadline=None, max_examples=60)
@given(
    window=st.fixed_dictionaries(
        {},
        optional={
            "use_sliding_window": st.booleans(),
            "sliding_window": st.sampled_from([None, 64, 4096, 2**17]),
            "max_window_layers": st.sampled_from([0, 1, 27, 28, 80]),
            "num_hidden_layers": st.sampled_from([4, 28, 29]),
            "layer_types": st.sampled_from([None, ["full_attention"] * 4, ["full_attention", "sliding_attention"]]),
        },
    )
)
def test_a_sliding_window_is_refused_exactly_where_a_layer_would_use_it(window: dict[str, Any]) -> None:
    if window.get("layer_types"):
        window = {**window, "num_hidden_layers": len(window["layer_types"])}
    raw = {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **window}}
    text = official_config(raw).text_config
    size = window.get("sliding_window", 4096)
    slides = "sliding_attention" in text.layer_types and (size is None or size < text.max_position_embeddings)
    assert (read_or_refused(VLMConfig.from_official, raw) is None) == slides


@pytest.mark.parametrize("ratio", [4.0, 2.5])
def test_a_fraction_as_mlp_ratio_is_refused_as_by_transformers(ratio: float) -> None:
    raw = {"model_type": "qwen2_vl", "rope_scaling": MROPE, "vision_config": {"hidden_size": 8192, "mlp_ratio": ratio}}
    assert read_or_refused(official_config, raw) is None
    with pytest.raises(ValueError, match=rf"vision_config\.mlp_ratio = {ratio} is not supported; expected a whole number"):
        VLMConfig.from_official(raw)


def test_the_end_tokens_of_a_folder_are_checked_against_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(changed("text_config.eos_token_id", 32064)))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id 32064 is outside the vocabulary: vocab_size is 32064"):
        VLMConfig.from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert VLMConfig.from_folder(tmp_path).eos_token_ids == (2,)  # the generation config goes first
