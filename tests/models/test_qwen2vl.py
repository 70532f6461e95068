"""Qwen2-VL as a whole equals transformers' on tiny random models: configuration, names, prompts, features, positions, logits.

Positions behind a long video are those of training and of transformers up to 4.57; see `positions_by_the_rule`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen2vl import (
    clip,
    hub_tensors,
    official_dropping,
    official_embeds,
    official_greedy,
    official_inputs,
    picture,
    positions_by_the_rule,
    qwen2vl_reference,
    qwen2vl_tokenizer,
    write_qwen2vl_folder,
)
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_v2drop.dropping import DropSchedule, V2Drop
from nanovlm_v2drop.inference import decode_one_token, decode_tokens, generate, prefill
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.config import Qwen2VLConfig, Qwen2VLVisionConfig, TextConfig, VLMConfig
from nanovlm_v2drop.models.vlm import PackedInputs
from nanovlm_v2drop.processing.prompts import Request, build_prompt

# Qwen/Qwen2-VL-7B-Instruct and -2B-Instruct: flat; the rest of the tower is left to the defaults.
HUB_7B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 3584, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
SIZES_2B = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
HUB_2B = {
    **HUB_7B,
    **SIZES_2B,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "vision_config": {**HUB_7B["vision_config"], "hidden_size": 1536},
}
LONG = Request("Tell the <video> digits", video=clip(5, 56, 56))  # 3 pairs of frames, more than its 2 rows and columns
REQUESTS = {
    "wide": Request("What colour is the digit?", images=[picture(140, 56)]),
    "tall": Request("What is it?", images=[picture(60, 170)]),
    "tiny": Request("yes or no", images=[picture(9, 11)]),
    "thin": Request("no?", images=[picture(300, 20)]),
    "two": Request("Which is the digit?", images=[picture(84, 56), picture(60, 120)]),
    "between": Request("Look at <image> and say what it is.", images=[picture(100, 75)]),
    "side by side": Request("A <image><image> B", images=[picture(56, 84), picture(112, 56)]),
    "clip": Request("What digit?", video=clip(4, 84, 56)),
    "odd clip": Request("What digit?", video=clip(5, 84, 90)),
    "clip and picture": Request("In <video> or <image> yes?", images=[picture(84, 56)], video=clip(4, 56, 84)),
    "pictures, clip": Request("digit", images=[picture(84, 56), picture(56, 56)], video=clip(2, 90, 56)),
    "two clips": Request("digit", video=[clip(4, 84, 56), clip(2, 56, 84)]),
    "placed clips": Request("Is <video> the <video> digit?", video=[clip(2, 56, 84), clip(5, 84, 56)]),
    "text": Request("What colour?"),
    "long clip": LONG,
}
MIXED = ["two", "text", "long clip", "wide", "clip and picture"]
every_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def official() -> Any:
    """transformers' Qwen2VLForConditionalGeneration with the weights of `folder`."""
    return qwen2vl_reference(qwen2vl_tokenizer())


@pytest.fixture(scope="module")
def folder(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL in the layout of Qwen's repositories. Read only."""
    return write_qwen2vl_folder(tmp_path_factory.mktemp("tiny-qwen2vl"), official, qwen2vl_tokenizer())


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    """Makes a copy of `folder` with other weights."""

    def with_tensors(tensors: dict[str, Tensor]) -> Path:
        for file in folder.glob("*.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return with_tensors


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=3e-5 * float(theirs.abs().max()), rtol=0)


def greedy(vlm: VisionLanguageModel, packed: PackedInputs, count: int = 6) -> tuple[list[list[int]], Tensor]:
    """`count` steps of cached decoding: token ids of each step (B), and the logits they come from (count, B, V)."""
    decoder = vlm.model.language_model
    prefilled = prefill(decoder, packed, max_new_tokens=count)
    steps, logits = [], [prefilled.logits]
    for _ in range(count):
        steps.append(logits[-1].argmax(-1).tolist())
        logits.append(decode_one_token(decoder, torch.tensor(steps[-1]), prefilled.cache))
    return steps, torch.stack(logits[:-1])


# Configuration


def official_config(raw: dict[str, Any]) -> Any:
    return pytest.importorskip("transformers").Qwen2VLConfig(**json.loads(json.dumps(raw)))


def compared(ours: Any, theirs: Any, kind: type) -> Iterator[tuple[str, object, object]]:
    """Name and both values of every field of `kind` that transformers' config has too."""
    for item in dataclasses.fields(kind):
        if hasattr(theirs, item.name):
            yield item.name, getattr(ours, item.name), getattr(theirs, item.name)


def assert_equals_transformers(config: VLMConfig, theirs: Any) -> None:
    assert isinstance(config, Qwen2VLConfig)
    text = list(compared(config.text_config, theirs.text_config, TextConfig))
    tower = list(compared(config.vision_config, theirs.vision_config, Qwen2VLVisionConfig))
    assert (len(text) >= 8, len(tower)) == (True, 10)
    for name, ours, official in text + tower:
        assert ours == official, name
    rope = theirs.text_config.rope_parameters
    assert config.text_config.rope_theta == rope["rope_theta"]
    assert config.text_config.mrope_section == tuple(rope["mrope_section"])
    assert config.text_config.tie_word_embeddings == theirs.tie_word_embeddings
    assert (config.image_token_id, config.video_token_id) == (theirs.image_token_id, theirs.video_token_id)
    assert config.text_config.qkv_bias


@pytest.mark.parametrize("raw", [HUB_7B, HUB_2B], ids=["7b", "2b"])
def test_the_hubs_flat_config_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    assert_equals_transformers(VLMConfig.from_official(raw), official_config(raw))


def test_the_hub_config_gives_the_7b_sizes_that_it_leaves_out() -> None:
    config = VLMConfig.from_official(HUB_7B, [151645, 151643])
    assert isinstance(config, Qwen2VLConfig)
    tower = config.vision_config
    assert (tower.depth, tower.embed_dim, tower.num_heads, tower.mlp_ratio, tower.hidden_act) == (32, 1280, 16, 4, "quick_gelu")
    assert (tower.in_channels, tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size) == (3, 14, 2, 2)
    assert (config.text_config.head_dim, config.text_config.num_key_value_heads) == (128, 4)
    assert config.vision_tokens == {"<|image_pad|>": 151655, "<|video_pad|>": 151656}
    assert config.eos_token_ids == (151645, 151643)


@pytest.mark.parametrize("raw", [HUB_7B, HUB_2B], ids=["7b", "2b"])
def test_a_config_that_transformers_saved_again_says_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    official_config(raw).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert VLMConfig.from_folder(tmp_path) == VLMConfig.from_official(raw)


def nested(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.57 nests the decoder: rope_scaling stays, and the tying stands in the text part only."""
    outer = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id")
    text = {name: value for name, value in raw.items() if name not in outer}
    rope = {"rope_scaling": {**raw["rope_scaling"], "type": "default", "rope_type": "default"}}
    return {**{name: raw[name] for name in outer}, "text_config": {**text, **rope, "model_type": "qwen2_vl_text"}}


@pytest.mark.parametrize("raw", [HUB_7B, HUB_2B], ids=["7b", "2b"])
def test_every_form_of_the_config_says_the_same(raw: dict[str, Any]) -> None:
    section = {"mrope_section": [16, 24, 24]}
    written_out = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14}
    rope_parameters = {**section, "rope_type": "default", "rope_theta": 1e6}
    forms = [
        {**raw, "rope_scaling": {**section, "type": "default", "rope_type": "default"}},
        {**raw, "rope_scaling": None, "rope_theta": None, "rope_parameters": rope_parameters},
        {**raw, "vision_config": {**raw["vision_config"], **written_out, "model_type": "qwen2_vl_vision"}},
        nested(raw),
    ]
    for form in forms:
        assert VLMConfig.from_official(form) == VLMConfig.from_official(raw)
        assert_equals_transformers(VLMConfig.from_official(form), official_config(form))


def test_every_default_equals_that_of_transformers() -> None:
    bare = {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    raw = {**bare, "vision_config": {"hidden_size": 8192}}  # the defaults of the two parts do not fit together
    assert_equals_transformers(VLMConfig.from_official(raw), official_config(raw))
    text = {"text_config": {"model_type": "qwen2_vl_text", "rope_scaling": bare["rope_scaling"]}}
    assert VLMConfig.from_official({**raw, **text}) == VLMConfig.from_official(raw)


WINDOWED = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (WINDOWED, r"^use_sliding_window with a sliding_window of 4096 tokens.* max_position_embeddings 32768"),
        ({"model_type": "qwen2_5_omni"}, r"model_type = 'qwen2_5_omni' is not supported; expected one of .*'qwen2_vl'"),
        ({"vision_config": {"model_type": "qwen2_5_vl"}}, r"vision_config\.model_type = 'qwen2_5_vl' is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, r"rope_scaling\.type = 'longrope' .*'default', 'mrope'"),
        ({"rope_scaling": None}, r"rope_scaling must have an mrope_section"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 16]}}, r"mrope_section \(16, 24, 16\) .* head_dim 128"),
        ({"hidden_size": 7168, "num_attention_heads": 56}, r"vision_config\.hidden_size 3584 must be .* hidden_size 7168"),
        ({"text_config": {**nested(HUB_7B)["text_config"], **WINDOWED}}, r"text_config\.use_sliding_window with"),
        ({"text_config": {**nested(HUB_7B)["text_config"], "model_type": "gemma3"}}, r"text_config\.model_type = 'gemma3'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_would_change_the_numbers_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official({**HUB_7B, **changes})


# Checkpoint


def test_the_folder_is_one_that_transformers_loads(official: Any, folder: Path) -> None:
    loaded, report = type(official).from_pretrained(folder, output_loading_info=True)
    assert {name for name, found in report.items() if found} == set()
    for name, tensor in official.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def renamed(tensors: dict[str, Tensor], *prefixes: tuple[str, str]) -> dict[str, Tensor]:
    for old, new in prefixes:
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("dialect", ["hub", "new"])
def test_every_set_of_names_gives_the_same_model(
    dialect: str, official: Any, copy: Callable[[dict[str, Tensor]], Path]
) -> None:
    tensors = {"hub": hub_tensors(official), "new": official.state_dict()}[dialect]
    assert any(name.startswith({"hub": "visual.blocks.0.", "new": "model.visual.blocks.0."}[dialect]) for name in tensors)
    state = load(copy(tensors)).model.state_dict()
    expected = renamed(hub_tensors(official), ("model.", "language_model."), ("lm_head.", "language_model.lm_head."))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_again_gives_the_same_model(
    original_format: bool, official: Any, vlm: VisionLanguageModel, folder: Path, tmp_path: Path
) -> None:
    official.save_pretrained(tmp_path, save_original_format=original_format)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state, expected = load(tmp_path).model.state_dict(), vlm.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_tied_head_is_the_embeddings_and_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    official = qwen2vl_reference(qwen2vl_tokenizer(), tie_word_embeddings=True)
    assert "lm_head.weight" not in hub_tensors(official)
    tied = load(write_qwen2vl_folder(tmp_path, official, qwen2vl_tokenizer()))
    decoder = tied.model.language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    inputs, packed = official_inputs(tied, REQUESTS["two"]), tied.prepare([REQUESTS["two"]])
    assert_close(prefill(decoder, packed).logits[0], official(**inputs).logits[0, -1])


@pytest.mark.parametrize(
    "name", ["visual.merger.ln_q.bias", "visual.blocks.2.attn.qkv.bias", "model.layers.5.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(name: str, official: Any, copy: Callable[[dict[str, Tensor]], Path]) -> None:
    tensors = hub_tensors(official)
    del tensors[name]
    ours = renamed({name: torch.empty(0)}, ("model.", "language_model."), ("lm_head.", "language_model.lm_head."))
    with pytest.raises(CheckpointError, match=f"lacks tensors of the model: {next(iter(ours))}; is the download complete"):
        load(copy(tensors))


def test_a_tower_that_is_missing_altogether_is_named(official: Any, copy: Callable[[dict[str, Tensor]], Path]) -> None:
    tensors = {name: tensor for name, tensor in hub_tensors(official).items() if not name.startswith("visual.")}
    with pytest.raises(CheckpointError, match=r"lacks tensors of the model: visual\.patch_embed\.proj\.weight"):
        load(copy(tensors))


# Prompts

PICTURE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("request_", "user"),
    [
        (Request("Hi?"), "Hi?"),
        (Request("Hi?", images=["a"]), f"{PICTURE}Hi?"),
        (Request("See <image>, and?", images=["a"]), f"See {PICTURE}, and?"),
        (Request("Hi?", images=["a", "b"]), f"{PICTURE}{PICTURE}Hi?"),
        (Request("One <image> two <image>?", images=["a", "b"]), f"One {PICTURE} two {PICTURE}?"),
        (Request("Hi?", video="c"), f"{VIDEO}Hi?"),
        (Request("Hi <video>", video="c"), f"Hi {VIDEO}"),
        (Request("Hi?", images=["a"], video="c"), f"{PICTURE}{VIDEO}Hi?"),
        (Request("<video>Hi <image>", images=["a"], video="c"), f"{VIDEO}Hi {PICTURE}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_prompt_is_the_official_templates_to_the_letter(request_: Request, user: str) -> None:
    assert build_prompt(request_, "qwen2_vl") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_folders_model_is_asked_in_this_template(vlm: VisionLanguageModel) -> None:
    assert vlm.template == "qwen2_vl"


@every_request
def test_token_ids_are_the_tokenizers_own_of_the_expanded_prompt(name: str, vlm: VisionLanguageModel) -> None:
    request = REQUESTS[name]
    prompt = build_prompt(request, vlm.template)
    token_ids, media = vlm.tokens_and_media(request)
    for medium in media:  # what is expanded already is no longer a single token between its two ends
        pad = "<|video_pad|>" if medium.is_video else "<|image_pad|>"
        single, repeated = (f"<|vision_start|>{pad * count}<|vision_end|>" for count in (1, medium.num_tokens))
        assert single in prompt
        prompt = prompt.replace(single, repeated, 1)
    assert token_ids == qwen2vl_tokenizer().encode(prompt).ids
    kinds = re.findall(r"<\|vision_start\|><\|(image|video)_pad", prompt)
    assert [medium.is_video for medium in media] == [kind == "video" for kind in kinds]


def test_a_picture_without_a_place_of_its_own_is_refused(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=r"the prompt has 2 image or video tokens .* but 1 pictures"):
        vlm.prepare([Request("What is <|image_pad|>?", images=[picture(56, 56)])])


# The whole


@every_request
def test_features_and_embeddings_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    inputs, packed = official_inputs(vlm, REQUESTS[name]), vlm.prepare([REQUESTS[name]])
    assert_close(packed.inputs_embeds, official_embeds(official, inputs))
    assert packed.vision_mask.tolist() == inputs["mm_token_type_ids"][0].bool().tolist()
    for kind, pixels, grids, features_of in (
        (1, "pixel_values", "image_grid_thw", official.get_image_features),
        (2, "pixel_values_videos", "video_grid_thw", official.get_video_features),
    ):
        if pixels in inputs:
            features = torch.cat(list(features_of(inputs[pixels], inputs[grids]).pooler_output))
            assert_close(packed.inputs_embeds[inputs["mm_token_type_ids"][0] == kind], features)


@every_request
def test_positions_follow_the_rule_of_training(name: str, vlm: VisionLanguageModel) -> None:
    packed, (token_ids, media) = vlm.prepare([REQUESTS[name]]), vlm.tokens_and_media(REQUESTS[name])
    grids = [grid for medium in media for grid in medium.grids]
    assert packed.position_ids.shape == (3, len(token_ids))
    expected = positions_by_the_rule(token_ids, grids, vlm.config.vision_tokens.values())
    assert torch.equal(packed.position_ids, expected)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "long clip"])
def test_positions_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    inputs = official_inputs(vlm, REQUESTS[name])
    theirs, _ = official.model.get_rope_index(**{name: value for name, value in inputs.items() if "pixel" not in name})
    assert torch.equal(vlm.prepare([REQUESTS[name]]).position_ids, theirs[:, 0])


def test_text_behind_a_long_video_stands_where_training_put_it(vlm: VisionLanguageModel, official: Any) -> None:
    """transformers 5 continues after the larger side of a frame, with positions that the video has already."""
    packed, inputs = vlm.prepare([LONG]), official_inputs(vlm, LONG)
    (((frames, rows, columns),),) = packed.vision_grids
    assert frames > max(rows, columns)
    last_vision = int(packed.position_ids[:, packed.vision_mask].max())
    first_behind = int(packed.vision_mask.nonzero()[-1]) + 1
    assert packed.position_ids[:, first_behind].tolist() == [last_vision + 1] * 3
    theirs, _ = official.model.get_rope_index(**{name: value for name, value in inputs.items() if "pixel" not in name})
    assert theirs[0, 0, first_behind] <= last_vision


@every_request
def test_logits_and_six_tokens_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    packed = vlm.prepare([REQUESTS[name]])
    embeds = official_embeds(official, official_inputs(vlm, REQUESTS[name]))
    theirs, their_logits = official_greedy(official, embeds, packed.position_ids, 6)
    steps, logits = greedy(vlm, packed)
    assert_close(logits[:, 0], their_logits)
    assert [token for (token,) in steps] == theirs


@pytest.mark.parametrize("name", ["wide", "two", "between", "odd clip", "clip and picture", "pictures, clip", "text"])
def test_generation_equals_that_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    """Both number such a video equally, without positions given to transformers."""
    transformers = pytest.importorskip("transformers")
    inputs = official_inputs(vlm, REQUESTS[name])
    never = vlm.config.text_config.vocab_size  # None would select the model's own end of sequence
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=never, pad_token_id=0)
    theirs = official.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    assert len(theirs) == 6
    decoder = vlm.model.language_model
    ours = islice(decode_tokens(decoder, prefill(decoder, vlm.prepare([REQUESTS[name]]))), 6)
    assert [token for (token,) in ours] == theirs.tolist()


def test_answers_differ_by_what_is_shown(vlm: VisionLanguageModel) -> None:
    """A check that the equal logits above depend on the pictures."""
    first, other = (vlm.prepare([Request("yes?", images=[picture(84, 56, seed)])]) for seed in (1, 2))
    logits = [prefill(vlm.model.language_model, packed).logits for packed in (first, other)]
    assert (logits[0] - logits[1]).abs().max() > 0.1 * logits[0].abs().max()


# Batches, decoding


def test_a_packed_batch_equals_its_requests_one_by_one(vlm: VisionLanguageModel) -> None:
    together = vlm.prepare([REQUESTS[name] for name in MIXED])
    alone = [vlm.prepare([REQUESTS[name]]) for name in MIXED]
    assert torch.equal(together.position_ids, torch.cat([packed.position_ids for packed in alone], dim=1))
    assert_close(together.inputs_embeds, torch.cat([packed.inputs_embeds for packed in alone]))
    assert together.vision_grids == tuple(grids for packed in alone for grids in packed.vision_grids)
    assert together.seeds == tuple(seed for packed in alone for seed in packed.seeds)
    steps, logits = greedy(vlm, together)
    for index, packed in enumerate(alone):
        own_steps, own_logits = greedy(vlm, packed)
        assert_close(logits[:, index], own_logits[:, 0])
        assert [step[index] for step in steps] == [token for (token,) in own_steps]


def test_answers_are_those_of_the_greedy_steps(vlm: VisionLanguageModel) -> None:
    answers = generate(vlm, [REQUESTS[name] for name in MIXED], max_new_tokens=6)
    for name, answer in zip(MIXED, answers, strict=True):
        steps, _ = greedy(vlm, vlm.prepare([REQUESTS[name]]))
        assert answer.token_ids == [token for (token,) in steps][: len(answer.token_ids)]
        assert len(answer.token_ids) == 6 or answer.token_ids[-1] in vlm.config.eos_token_ids


@pytest.mark.parametrize("name", ["wide", "long clip", "text"])
def test_cached_decoding_equals_a_full_forward_at_the_largest_position_plus_one(name: str, vlm: VisionLanguageModel) -> None:
    decoder, packed = vlm.model.language_model, vlm.prepare([REQUESTS[name]])
    steps, logits = greedy(vlm, packed)
    largest = max(max(axis) for axis in packed.position_ids.tolist())
    new = torch.arange(largest + 1, largest + 6).expand(3, -1)
    longer = PackedInputs(
        torch.cat([packed.inputs_embeds, decoder.embed_tokens(torch.tensor(steps[:5]).flatten())]),
        torch.cat([packed.position_ids, new], dim=1),
        torch.cat([packed.vision_mask, torch.zeros(5, dtype=torch.bool)]),
        [len(packed.inputs_embeds) + 5],
    )
    assert_close(logits[5], prefill(decoder, longer).logits)


# Traces for methods that choose tokens before the decoder


@pytest.mark.parametrize("names", [["two"], ["clip and picture"], MIXED], ids=str)
def test_the_traces_are_the_vision_rows_of_the_embeddings(names: list[str], vlm: VisionLanguageModel) -> None:
    packed = vlm.prepare([REQUESTS[name] for name in names])
    grids = [grid for request in packed.vision_grids for grid in request]
    assert [len(trace.hidden_states) for trace in packed.vision] == list(map(prod, grids))
    features = torch.cat([trace.project(trace.hidden_states) for trace in packed.vision])
    assert torch.equal(features, packed.inputs_embeds[packed.vision_mask])
    assert {trace.num_class_tokens for trace in packed.vision} == {0}


def test_traces_hold_the_attention_and_keys_of_the_patches_that_were_merged(vlm: VisionLanguageModel) -> None:
    together = vlm.prepare([REQUESTS[name] for name in MIXED])
    alone = [trace for name in MIXED for trace in vlm.prepare([REQUESTS[name]]).vision]
    grids = [grid for request in together.vision_grids for grid in request]
    for trace, own, (frames, rows, columns) in zip(together.vision, alone, grids, strict=True):
        attention, keys = trace.received_attention(), trace.keys()
        assert keys.shape == (4, frames * rows * columns, 8)
        # The attention of a frame's patches sums to one; a token has four patches.
        per_frame = 4 * attention.unflatten(1, (frames, rows * columns)).sum(-1)
        torch.testing.assert_close(per_frame, torch.ones(4, frames))
        assert_close(attention, own.received_attention())
        assert_close(keys, own.keys())
        assert attention.std() > 0


# Dropping

RATIOS = {1: 0.6, 3: 0.5}


@pytest.mark.parametrize("name", ["two", "between", "long clip", "clip and picture"])
def test_after_dropping_rows_keep_their_three_positions_and_decoding_goes_on_behind_the_whole_prompt(
    name: str, vlm: VisionLanguageModel, official: Any
) -> None:
    """The oracle, for the prompt and every decoded token, is transformers' own layers with rows removed by hand."""
    packed, decoder = vlm.prepare([REQUESTS[name]]), vlm.model.language_model
    out = prefill(decoder, packed, V2Drop(DropSchedule(RATIOS)))
    behind = int(packed.position_ids.max()) + 1
    assert out.cache.position_ids.tolist() == [[behind]] * decoder.config.num_hidden_layers
    embeds, positions, logits = packed.inputs_embeds, packed.position_ids, out.logits[0]
    vision = packed.vision_mask.nonzero().flatten()
    for step in range(4):
        is_vision = torch.cat([packed.vision_mask, torch.zeros(step, dtype=torch.bool)])
        theirs, left = official_dropping(official, embeds, positions, is_vision, RATIOS)
        assert_close(logits, theirs)
        for layer_idx, (indices,) in out.kept:
            assert vision[indices].tolist() == [row for row in left[layer_idx] if is_vision[row]]
        token = logits.argmax().view(1)
        embeds = torch.cat([embeds, decoder.embed_tokens(token)])
        positions = torch.cat([positions, torch.full((3, 1), behind + step)], dim=1)
        logits = decode_one_token(decoder, token, out.cache)[0]


def test_a_batch_drops_what_each_request_drops_alone(vlm: VisionLanguageModel) -> None:
    dropper, decoder = V2Drop(DropSchedule(RATIOS)), vlm.model.language_model
    together = prefill(decoder, vlm.prepare([REQUESTS[name] for name in MIXED if name != "text"]), dropper)
    for index, name in enumerate(name for name in MIXED if name != "text"):
        alone = prefill(decoder, vlm.prepare([REQUESTS[name]]), dropper)
        assert_close(together.logits[index], alone.logits[0])
        for (layer_idx, stages), (own_layer, (own,)) in zip(together.kept, alone.kept, strict=True):
            assert layer_idx == own_layer
            assert torch.equal(stages[index], own)
