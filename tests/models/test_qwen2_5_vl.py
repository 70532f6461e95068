"""Qwen2.5-VL as a whole equals transformers' on tiny random models: configuration, names, features, positions, logits.

Positions behind a long video are those of training and of transformers up to 4.57; see `positions_by_the_rule`.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numbered_clips import write_numbered
from qwen2_5_vl import TOKENS_PER_SECOND, official_inputs, qwen2_5_vl_reference, write_qwen2_5_vl_folder
from qwen2vl import (
    clip,
    hub_tensors,
    official_dropping,
    official_embeds,
    official_greedy,
    picture,
    positions_by_the_rule,
    qwen2vl_tokenizer,
)
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_v2drop import cli
from nanovlm_v2drop.dropping import DropSchedule, V2Drop
from nanovlm_v2drop.inference import decode_one_token, decode_tokens, prefill
from nanovlm_v2drop.loading.checkpoint import CheckpointError
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.config import Qwen2_5_VLConfig, Qwen2_5_VLVisionConfig, TextConfig, VLMConfig
from nanovlm_v2drop.models.vlm import PackedInputs, VisionInput
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.processing.video import FpsSampling

# Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct.
TOWER_3B: dict[str, Any] = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
HUB_3B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": TOWER_3B,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
HUB_7B = {
    **HUB_3B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": {**TOWER_3B, "out_hidden_size": 3584},
    "vocab_size": 152064,
}
LONG = Request("Tell the <video> digits", video=clip(7, 140, 84))  # 4 pairs of frames, 2 positions apart: more than 5 columns
REQUESTS = {
    "odd": Request("What colour is the digit?", images=[picture(196, 140)]),
    "divided": Request("What is it?", images=[picture(112, 168)]),
    "tiny": Request("yes or no", images=[picture(9, 11)]),
    "thin": Request("no?", images=[picture(300, 20)]),
    "several": Request("Which is the digit?", images=[picture(84, 140), picture(60, 120), picture(140, 196)]),
    "between": Request("Look at <image> and say what it is.", images=[picture(100, 75)]),
    "clip": Request("What digit?", video=clip(4, 140, 84)),
    "odd clip": Request("What digit?", video=clip(5, 140, 90)),
    "clip and picture": Request("In <video> or <image> yes?", images=[picture(84, 56)], video=clip(4, 84, 140)),
    "text": Request("What colour?"),
    "long clip": LONG,
}
MIXED = ["several", "text", "long clip", "odd", "clip and picture"]
SECONDS = 1.0  # from one pair of frames to the next, at two frames a second
every_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def official() -> Any:
    """transformers' Qwen2_5_VLForConditionalGeneration with the weights of `folder`."""
    return qwen2_5_vl_reference(qwen2vl_tokenizer())


@pytest.fixture(scope="module")
def folder(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-VL in the layout of Qwen's repositories. Read only."""
    return write_qwen2_5_vl_folder(tmp_path_factory.mktemp("tiny-qwen2.5-vl"), official, qwen2vl_tokenizer())


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


def official_positions(official: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(3, T)"""
    theirs, _ = official.model.get_rope_index(**{name: value for name, value in inputs.items() if "pixel" not in name})
    return theirs[:, 0]


# Configuration


def official_config(raw: dict[str, Any]) -> Any:
    return pytest.importorskip("transformers").Qwen2_5_VLConfig(**json.loads(json.dumps(raw)))


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def assert_equals_transformers(config: VLMConfig, theirs: Any) -> None:
    assert isinstance(config, Qwen2_5_VLConfig)
    tower = [item.name for item in dataclasses.fields(Qwen2_5_VLVisionConfig)]
    for name in tower:
        assert getattr(config.vision_config, name) == as_tuple(getattr(theirs.vision_config, name)), name
    text = [item.name for item in dataclasses.fields(TextConfig) if hasattr(theirs.text_config, item.name)]
    assert len(text) >= 8
    for name in text:
        assert getattr(config.text_config, name) == getattr(theirs.text_config, name), name
    rope = theirs.text_config.rope_parameters
    assert config.text_config.rope_theta == rope["rope_theta"]
    assert config.text_config.mrope_section == tuple(rope["mrope_section"])
    assert config.text_config.tie_word_embeddings == theirs.tie_word_embeddings
    assert (config.image_token_id, config.video_token_id) == (theirs.image_token_id, theirs.video_token_id)
    assert config.text_config.qkv_bias


@pytest.mark.parametrize("raw", [HUB_3B, HUB_7B], ids=["3b", "7b"])
def test_the_hubs_flat_config_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    assert_equals_transformers(VLMConfig.from_official(raw), official_config(raw))


@pytest.mark.parametrize("raw", [HUB_3B, HUB_7B], ids=["3b", "7b"])
def test_a_config_that_transformers_saved_again_says_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    official_config(raw).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    assert VLMConfig.from_folder(tmp_path) == VLMConfig.from_official(raw)


def nested(raw: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4.5x nests the decoder: rope_scaling stays, and the tying stands in the text part only."""
    outer = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id")
    text = {name: value for name, value in raw.items() if name not in outer}
    rope = {"rope_scaling": {**raw["rope_scaling"], "type": "default", "rope_type": "default"}}
    text |= {**rope, "model_type": "qwen2_5_vl_text", "image_token_id": None, "video_token_id": None}
    return {**{name: raw[name] for name in outer}, "text_config": text}


@pytest.mark.parametrize("raw", [HUB_3B, HUB_7B], ids=["3b", "7b"])
def test_every_form_of_the_config_says_the_same(raw: dict[str, Any]) -> None:
    section = {"mrope_section": [16, 24, 24]}
    forms = [
        {**raw, "rope_scaling": {**section, "type": "default", "rope_type": "default"}},
        {**raw, "rope_scaling": None, "rope_parameters": {**section, "rope_type": "default", "rope_theta": 1e6}},
        {**raw, "vision_config": {**raw["vision_config"], "in_channels": 3, "model_type": "qwen2_5_vl"}},
        nested(raw),
    ]
    for form in forms:
        assert VLMConfig.from_official(form) == VLMConfig.from_official(raw)
        assert_equals_transformers(VLMConfig.from_official(form), official_config(form))


def test_every_default_equals_that_of_transformers() -> None:
    bare = {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    raw = {**bare, "vision_config": {"out_hidden_size": 8192}}  # the defaults of the two parts do not fit together
    assert_equals_transformers(VLMConfig.from_official(raw), official_config(raw))
    text = {"text_config": {"model_type": "qwen2_5_vl_text", "rope_scaling": bare["rope_scaling"]}}
    assert VLMConfig.from_official({**raw, **text}) == VLMConfig.from_official(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {**TOWER_3B, "model_type": "qwen2_vl"}}, r"vision_config\.model_type = 'qwen2_vl' is not supported"),
        ({"vision_config": {**TOWER_3B, "hidden_act": "gelu"}}, r"vision_config\.hidden_act = 'gelu' is not supported"),
        ({"vision_config": {**TOWER_3B, "window_size": 20}}, r"vision_config\.window_size 20 must be at least the 28 pixels"),
        ({"vision_config": {**TOWER_3B, "tokens_per_second": 0}}, r"vision_config\.tokens_per_second = 0 is not supported"),
        ({"vision_config": {**TOWER_3B, "fullatt_block_indexes": [-1]}}, r"vision_config\.fullatt_block_indexes = .*-1"),
        (
            {"hidden_size": 4096, "num_attention_heads": 32},
            r"vision_config\.out_hidden_size 2048 must be the decoder's hidden_size 4096",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, r"rope_scaling\.type = 'longrope' .*'default', 'mrope'"),
        ({"rope_scaling": None}, r"rope_scaling must have an mrope_section"),
    ],
    ids=str,
)
def test_a_setting_that_would_change_the_numbers_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official({**HUB_3B, "mrope_section": None, **changes})


# Checkpoint


def test_the_folder_is_one_that_transformers_loads(official: Any, folder: Path) -> None:
    loaded, report = type(official).from_pretrained(folder, output_loading_info=True)
    assert {name for name, found in report.items() if found} == set()
    for name, tensor in official.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for item in dataclasses.fields(Qwen2_5_VLVisionConfig):
        stored, made = (getattr(each.config.vision_config, item.name) for each in (loaded, official))
        assert stored == made, item.name


@pytest.mark.parametrize("dialect", ["hub", "new"])
def test_every_set_of_names_gives_the_same_model(
    dialect: str, official: Any, vlm: VisionLanguageModel, copy: Callable[[dict[str, Tensor]], Path]
) -> None:
    tensors = {"hub": hub_tensors(official), "new": official.state_dict()}[dialect]
    assert any(name.startswith({"hub": "visual.blocks.0.", "new": "model.visual.blocks.0."}[dialect]) for name in tensors)
    state, expected = load(copy(tensors)).model.state_dict(), vlm.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_again_gives_the_same_model(
    original_format: bool, official: Any, vlm: VisionLanguageModel, folder: Path, tmp_path: Path
) -> None:
    official.save_pretrained(tmp_path, save_original_format=original_format)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    again = load(tmp_path)
    state, expected = again.model.state_dict(), vlm.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert again.config == dataclasses.replace(vlm.config, eos_token_ids=again.config.eos_token_ids)


def test_a_tied_head_is_the_embeddings_and_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    official = qwen2_5_vl_reference(qwen2vl_tokenizer(), tie_word_embeddings=True)
    assert "lm_head.weight" not in hub_tensors(official)
    tied = load(write_qwen2_5_vl_folder(tmp_path, official, qwen2vl_tokenizer()))
    decoder = tied.model.language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    inputs, packed = official_inputs(tied, REQUESTS["several"], SECONDS), tied.prepare([REQUESTS["several"]])
    assert_close(prefill(decoder, packed).logits[0], official(**inputs).logits[0, -1])


@pytest.mark.parametrize("name", ["visual.merger.ln_q.weight", "visual.blocks.2.mlp.gate_proj.bias", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, official: Any, copy: Callable[[dict[str, Tensor]], Path]) -> None:
    tensors = hub_tensors(official)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"lacks tensors of the model: .*{name}; is the download complete"):
        load(copy(tensors))


def test_a_tower_of_fewer_blocks_than_config_json_says_is_named(
    official: Any, copy: Callable[[dict[str, Tensor]], Path]
) -> None:
    tensors = {name: tensor for name, tensor in hub_tensors(official).items() if not name.startswith("visual.blocks.3.")}
    with pytest.raises(CheckpointError, match=r"vision_config\.depth 4, but the weights hold 3 vision layers"):
        load(copy(tensors))


def test_a_model_in_memory_answers_as_its_folder(official: Any, vlm: VisionLanguageModel, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    images = SimpleNamespace(to_dict=lambda: pictures)
    processor = SimpleNamespace(tokenizer=transformers.AutoTokenizer.from_pretrained(folder), image_processor=images)
    shared = load(official, processor=processor)
    prompt = Request(prompt="<|vision_start|><|image_pad|><|vision_end|>?", images=[picture(140, 84)])
    ours, theirs = (prefill(each.model.language_model, each.prepare([prompt])).logits for each in (shared, vlm))
    assert_close(ours, theirs)


# Pictures, prompts and seconds


def test_pixels_and_token_ids_are_those_of_qwen2_vls_processor(vlm: VisionLanguageModel, folder: Path) -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    theirs = module.Qwen2VLImageProcessorPil.from_pretrained(folder)(list(REQUESTS["several"].images), return_tensors="pt")
    token_ids, media = vlm.tokens_and_media(REQUESTS["several"])
    assert torch.equal(torch.cat([medium.pixel_values for medium in media]), theirs["pixel_values"])
    grids = [(frames, 2 * rows, 2 * columns) for medium in media for frames, rows, columns in medium.grids]
    assert grids == [tuple(grid) for grid in theirs["image_grid_thw"].tolist()]
    pads = ("<|vision_start|>" + "<|image_pad|>" * medium.num_tokens + "<|vision_end|>" for medium in media)
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{''.join(pads)}{REQUESTS['several'].text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert token_ids == qwen2vl_tokenizer().encode(prompt).ids


@pytest.mark.parametrize(
    ("num_frames", "rate", "fps"), [(59, 29.97, 2.0), (48, 24, 2.0), (40, 10, 1.7), (30, 25, 4.0), (3, 25, 2.0)]
)
def test_the_seconds_between_pairs_of_frames_of_a_file_are_those_of_transformers(
    num_frames: int, rate: float, fps: float, folder: Path, tmp_path: Path
) -> None:
    metadata_of = pytest.importorskip("transformers.video_utils").VideoMetadata
    path = write_numbered(tmp_path / "clip.mp4", num_frames, fps=Fraction(rate).limit_denominator(1001))
    sampling = FpsSampling(fps=fps)
    _, (medium,) = load(folder, sampling=sampling).tokens_and_media(Request("digit", video=path))
    metadata = metadata_of(num_frames, fps=rate, frames_indices=sampling.indices(num_frames, rate))
    assert medium.seconds_per_grid == pytest.approx(2 / metadata.sampled_fps, rel=1e-6)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 4.0])
def test_a_list_of_frames_counts_as_one_of_the_rate_that_is_sampled(fps: float, folder: Path) -> None:
    sampled = load(folder, sampling=FpsSampling(fps=fps, max_frames=8))
    for count in (4, 5, 8):
        _, (medium,) = sampled.tokens_and_media(Request("digit", video=clip(count, 56, 56)))
        assert medium.seconds_per_grid == 2 / fps
    _, (medium,) = sampled.tokens_and_media(Request("digit", video=clip(16, 56, 56)))  # every second frame is taken
    assert medium.seconds_per_grid == 4 / fps


def test_a_list_of_frames_counts_as_two_a_second_as_in_qwens_own_code(vlm: VisionLanguageModel) -> None:
    """transformers 5 takes 24 frames a second, so all pairs of a short list would have one time."""
    _, (medium,) = vlm.tokens_and_media(REQUESTS["clip"])
    assert medium.seconds_per_grid == SECONDS
    assert vlm.image_processor.video(clip(6, 56, 56)).seconds_per_grid == SECONDS


# The whole


@every_request
def test_features_and_embeddings_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    inputs, packed = official_inputs(vlm, REQUESTS[name], SECONDS), vlm.prepare([REQUESTS[name]])
    assert_close(packed.inputs_embeds, official_embeds(official, inputs))
    assert packed.vision_mask.tolist() == inputs["mm_token_type_ids"][0].bool().tolist()


@every_request
def test_positions_follow_the_rule_of_training(name: str, vlm: VisionLanguageModel) -> None:
    packed, (token_ids, media) = vlm.prepare([REQUESTS[name]]), vlm.tokens_and_media(REQUESTS[name])
    grids = [grid for medium in media for grid in medium.grids]
    steps = [TOKENS_PER_SECOND * SECONDS if medium.is_video else 1 for medium in media]
    expected = positions_by_the_rule(token_ids, grids, vlm.config.vision_tokens.values(), steps)
    assert torch.equal(packed.position_ids, expected)


@pytest.mark.parametrize("name", [name for name in REQUESTS if name != "long clip"])
def test_positions_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    inputs = official_inputs(vlm, REQUESTS[name], SECONDS)
    assert torch.equal(vlm.prepare([REQUESTS[name]]).position_ids, official_positions(official, inputs))


@pytest.mark.parametrize("fps", [0.3, 1.0, 1.7, 2.0, 3.1, 4.0, 24.0])
def test_times_inside_a_video_are_those_of_transformers_at_every_rate(fps: float, folder: Path, official: Any) -> None:
    request = Request("Tell the <video> digits", video=clip(9, 140, 84))
    sampled = load(folder, sampling=FpsSampling(fps=fps))
    ours, theirs = sampled.prepare([request]), official_positions(official, official_inputs(sampled, request, 2 / fps))
    vision = ours.vision_mask
    assert torch.equal(ours.position_ids[:, vision], theirs[:, vision])
    first = int(vision.nonzero()[0])
    times = sorted({int(time) - first for time in ours.position_ids[0, vision]})
    assert times == sorted({int(frame * 4 / fps) for frame in range(5)})
    if fps == 1.7:
        assert times == [0, 2, 4, 7, 9]


def test_text_behind_a_long_video_stands_where_training_put_it(vlm: VisionLanguageModel, official: Any) -> None:
    """transformers 5 goes on behind the larger side of a frame, over times that the video has taken already."""
    packed, inputs = vlm.prepare([LONG]), official_inputs(vlm, LONG, SECONDS)
    (((frames, rows, columns),),) = packed.vision_grids
    assert (frames - 1) * TOKENS_PER_SECOND >= max(rows, columns) > frames
    last_vision = int(packed.position_ids[:, packed.vision_mask].max())
    first_behind = int(packed.vision_mask.nonzero()[-1]) + 1
    assert packed.position_ids[:, first_behind].tolist() == [last_vision + 1] * 3
    theirs = official_positions(official, inputs)
    assert theirs[0, first_behind] <= last_vision
    assert torch.equal(packed.position_ids[:, :first_behind], theirs[:, :first_behind])


@every_request
def test_logits_and_six_tokens_equal_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    packed = vlm.prepare([REQUESTS[name]])
    embeds = official_embeds(official, official_inputs(vlm, REQUESTS[name], SECONDS))
    theirs, their_logits = official_greedy(official, embeds, packed.position_ids, 6)
    steps, logits = greedy(vlm, packed)
    assert_close(logits[:, 0], their_logits)
    assert [token for (token,) in steps] == theirs


@pytest.mark.parametrize("name", ["odd", "several", "between", "clip", "odd clip", "clip and picture", "text"])
def test_generation_equals_that_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    """Where both number a video alike, without telling transformers any position."""
    transformers = pytest.importorskip("transformers")
    inputs = official_inputs(vlm, REQUESTS[name], SECONDS)
    never = vlm.config.text_config.vocab_size  # None would mean the model's own end of sequence
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=never, pad_token_id=0)
    theirs = official.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    decoder = vlm.model.language_model
    ours = islice(decode_tokens(decoder, prefill(decoder, vlm.prepare([REQUESTS[name]]))), 6)
    assert [token for (token,) in ours] == theirs.tolist()


def test_answers_differ_by_what_is_shown_and_by_when(vlm: VisionLanguageModel, folder: Path) -> None:
    """So that equal logits above say something about the pictures and the seconds."""
    slower, request = load(folder, sampling=FpsSampling(fps=1.0)), REQUESTS["clip"]
    first, other = (vlm.prepare([Request("yes?", images=[picture(84, 56, seed)])]) for seed in (1, 2))
    for pair in ((first, other), (vlm.prepare([request]), slower.prepare([request]))):
        logits = [prefill(vlm.model.language_model, packed).logits for packed in pair]
        assert (logits[0] - logits[1]).abs().max() > 1e-3 * logits[0].abs().max()


def test_a_packed_batch_equals_its_requests_one_by_one(vlm: VisionLanguageModel) -> None:
    together = vlm.prepare([REQUESTS[name] for name in MIXED])
    alone = [vlm.prepare([REQUESTS[name]]) for name in MIXED]
    assert torch.equal(together.position_ids, torch.cat([packed.position_ids for packed in alone], dim=1))
    assert_close(together.inputs_embeds, torch.cat([packed.inputs_embeds for packed in alone]))
    steps, logits = greedy(vlm, together)
    for index, packed in enumerate(alone):
        own_steps, own_logits = greedy(vlm, packed)
        assert_close(logits[:, index], own_logits[:, 0])
        assert [step[index] for step in steps] == [token for (token,) in own_steps]


def test_bfloat16_weights_give_nearly_the_same_embeddings(vlm: VisionLanguageModel, folder: Path) -> None:
    exact, rounded = (each.prepare([REQUESTS["several"]]).inputs_embeds for each in (vlm, load(folder, dtype="bfloat16")))
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_a_video_whose_frames_lie_weeks_apart_is_refused(folder: Path) -> None:
    slow = load(folder, sampling=FpsSampling(fps=1e-7))
    with pytest.raises(ValueError, match=r"the frames of the video lie 2e\+07 seconds apart, too far for their positions"):
        slow.prepare([REQUESTS["clip"]])
    hour = VisionInput(torch.empty(0), ((600, 1, 1),), (28, 28), is_video=True, seconds_per_grid=3600.0 * 24)
    with pytest.raises(ValueError, match=r"lie 86400 seconds apart, too far for their positions"):  # only those of all frames
        slow.model.time_step(hour)
    assert slow.model.time_step(replace(hour, grids=((60, 1, 1),))) > 0


# What methods that choose tokens before the decoder read


def test_traces_hold_the_attention_and_keys_of_the_patches_that_were_merged(vlm: VisionLanguageModel) -> None:
    together = vlm.prepare([REQUESTS[name] for name in MIXED])
    alone = [trace for name in MIXED for trace in vlm.prepare([REQUESTS[name]]).vision]
    grids = [grid for request in together.vision_grids for grid in request]
    features = torch.cat([trace.project(trace.hidden_states) for trace in together.vision])
    assert torch.equal(features, together.inputs_embeds[together.vision_mask])
    for trace, own, (frames, rows, columns) in zip(together.vision, alone, grids, strict=True):
        attention, keys = trace.received_attention(), trace.keys()
        assert keys.shape == (4, frames * rows * columns, 8)
        # A frame's four patches a token share an attention of one.
        per_frame = 4 * attention.unflatten(1, (frames, rows * columns)).sum(-1)
        torch.testing.assert_close(per_frame, torch.ones(4, frames))
        assert_close(attention, own.received_attention())
        assert_close(keys, own.keys())


@pytest.mark.parametrize("full_blocks", [[1, 3], [0, 2]], ids=["frames last", "windows last"])
def test_a_trace_is_in_the_order_of_the_merged_patches(full_blocks: list[int], tmp_path: Path) -> None:
    """A single patch that stands out does so at its own token, in the features as in the keys and the attention."""
    official = qwen2_5_vl_reference(qwen2vl_tokenizer(), fullatt_block_indexes=full_blocks)
    vlm = load(write_qwen2_5_vl_folder(tmp_path, official, qwen2vl_tokenizer()))
    plain, marked = picture(140, 196), picture(140, 196)
    rows, columns, place = 7, 5, (3, 4)  # in the last column: in window order it comes elsewhere
    marked.paste((255, 0, 0), (28 * place[1], 28 * place[0], 28 * place[1] + 28, 28 * place[0] + 28))
    traces = [vlm.prepare([Request("yes?", images=[image])]).vision[0] for image in (plain, marked)]
    number = place[0] * columns + place[1]
    assert number not in (0, rows * columns - 1)
    for values in (lambda trace: trace.hidden_states, lambda trace: trace.keys().transpose(0, 1).flatten(1)):
        change = (values(traces[0]) - values(traces[1])).norm(dim=-1)
        assert int(change.argmax()) == number


RATIOS = {1: 0.6, 3: 0.5}


@pytest.mark.parametrize("name", ["several", "long clip", "clip and picture"])
def test_after_dropping_rows_keep_their_three_positions_and_decoding_goes_on_behind_the_whole_prompt(
    name: str, vlm: VisionLanguageModel, official: Any
) -> None:
    """transformers' own layers, rows taken out by hand, are the oracle for the prompt and for every decoded token."""
    packed, decoder = vlm.prepare([REQUESTS[name]]), vlm.model.language_model
    out = prefill(decoder, packed, V2Drop(DropSchedule(RATIOS)))
    behind = int(packed.position_ids.max()) + 1
    assert out.cache.position_ids.tolist() == [[behind]] * decoder.config.num_hidden_layers
    embeds, positions, logits = packed.inputs_embeds, packed.position_ids, out.logits[0]
    vision = packed.vision_mask.nonzero().flatten()
    for step in range(3):
        is_vision = torch.cat([packed.vision_mask, torch.zeros(step, dtype=torch.bool)])
        theirs, left = official_dropping(official, embeds, positions, is_vision, RATIOS)
        assert_close(logits, theirs)
        for layer_idx, (indices,) in out.kept:
            assert vision[indices].tolist() == [row for row in left[layer_idx] if is_vision[row]]
        token = logits.argmax().view(1)
        embeds = torch.cat([embeds, decoder.embed_tokens(token)])
        positions = torch.cat([positions, torch.full((3, 1), behind + step)], dim=1)
        logits = decode_one_token(decoder, token, out.cache)[0]


# The command line


def test_the_command_line_answers_about_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(196, 140).save(tmp_path / "photo.png")
    options = ["--prompt", "What colour is the digit?", "--methods", "dense,v2drop", "--retain", "0.4", "--json"]
    places = ["--model", folder, "--image", tmp_path / "photo.png", "--output", tmp_path / "run"]
    assert cli.main([*map(str, places), *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, own = result["results"]
    assert result["model"] == folder.name
    assert dense["vision_tokens"] == 35
    assert own["mean_vision_tokens"] == pytest.approx(0.4 * 35, abs=1)
    assert (tmp_path / "run" / "kept.png").is_file()
