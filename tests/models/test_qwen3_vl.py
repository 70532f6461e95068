"""Qwen3-VL as a whole equals transformers' on tiny random models: configuration, names, features, deepstack, logits."""

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen2vl import (
    clip,
    official_dropping,
    official_greedy,
    official_inputs,
    picture,
    positions_by_the_rule,
    qwen2vl_tokenizer,
)
from qwen3_vl import decoder_inputs, hub_tensors, qwen3_vl_reference, write_qwen3_vl_folder
from safetensors.torch import save_file
from torch import Tensor

from nanovlm_v2drop import cli
from nanovlm_v2drop.dropping import DropSchedule, V2Drop
from nanovlm_v2drop.inference import Prefilled, decode_one_token, decode_tokens, prefill
from nanovlm_v2drop.loading.checkpoint import CheckpointError
from nanovlm_v2drop.loading.zoo import VisionLanguageModel, load
from nanovlm_v2drop.models.config import Qwen3VLConfig, Qwen3VLVisionConfig, TextConfig, VLMConfig
from nanovlm_v2drop.models.vlm import PackedInputs
from nanovlm_v2drop.processing.prompts import Request
from nanovlm_v2drop.research.theory import drop_point

# Qwen/Qwen3-VL-2B-Instruct, -4B-Instruct and -8B-Instruct.
TOWER_2B: dict[str, Any] = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TEXT_2B: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 151936,
}
HUB_2B: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": TEXT_2B,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": TOWER_2B,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
SIZES_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36}
TOWER_8B = {"hidden_size": 1152, "depth": 27, "intermediate_size": 4304, "out_hidden_size": 4096}
HUB_8B: dict[str, Any] = {
    **{name: value for name, value in HUB_2B.items() if name != "tie_word_embeddings"},
    "text_config": {**TEXT_2B, **SIZES_8B, "tie_word_embeddings": False},
    "vision_config": {**TOWER_2B, **TOWER_8B, "deepstack_visual_indexes": [8, 16, 24]},
}
REQUESTS = {
    "odd": Request("What colour is the digit?", images=[picture(224, 160)]),
    "tall": Request("What is it?", images=[picture(40, 300)]),
    "tiny": Request("yes or no", images=[picture(9, 11)]),
    "thin": Request("no?", images=[picture(300, 20)]),
    "several": Request("Which is the digit?", images=[picture(96, 160), picture(60, 120), picture(160, 224)]),
    "between": Request("Look at <image> and say what it is.", images=[picture(100, 75)]),
    "clip": Request("What digit?", video=clip(4, 160, 96)),
    "odd clip": Request("What digit?", video=clip(5, 160, 90)),
    "clip and picture": Request("In <video> or <image> yes?", images=[picture(84, 56)], video=clip(4, 84, 140)),
    "two clips": Request("In <video> or <video> yes?", video=[clip(2, 64, 96), clip(9, 96, 64)]),
    "text": Request("What colour?"),
}
MIXED = ["several", "text", "two clips", "odd", "clip and picture"]
every_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def official() -> Any:
    """transformers' Qwen3VLForConditionalGeneration with the weights of `folder`."""
    return qwen3_vl_reference(qwen2vl_tokenizer())


@pytest.fixture(scope="module")
def folder(official: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-VL in the layout of Qwen's repositories. Read only."""
    return write_qwen3_vl_folder(tmp_path_factory.mktemp("tiny-qwen3-vl"), official, qwen2vl_tokenizer())


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def theirs(vlm: VisionLanguageModel, official: Any) -> Callable[[str], dict[str, Any]]:
    """What transformers' decoder gets for a request, by its name."""
    return cache(lambda name: decoder_inputs(official, official_inputs(vlm, REQUESTS[name])))


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
    return pytest.importorskip("transformers").Qwen3VLConfig(**json.loads(json.dumps(raw)))


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def assert_equals_transformers(config: VLMConfig, theirs: Any) -> None:
    assert isinstance(config, Qwen3VLConfig)
    for item in dataclasses.fields(Qwen3VLVisionConfig):
        assert getattr(config.vision_config, item.name) == as_tuple(getattr(theirs.vision_config, item.name)), item.name
    text = [item.name for item in dataclasses.fields(TextConfig) if hasattr(theirs.text_config, item.name)]
    assert len(text) >= 9
    for name in text:
        assert getattr(config.text_config, name) == getattr(theirs.text_config, name), name
    rope = theirs.text_config.rope_parameters
    assert config.text_config.rope_theta == rope["rope_theta"]
    assert config.text_config.mrope_section == tuple(rope.get("mrope_section", [24, 20, 20]))
    assert config.text_config.tie_word_embeddings == theirs.tie_word_embeddings
    assert (config.image_token_id, config.video_token_id) == (theirs.image_token_id, theirs.video_token_id)
    assert (config.text_config.qk_norm, config.text_config.mrope_interleaved, config.text_config.qkv_bias) == (
        True,
        True,
        False,
    )


every_size = pytest.mark.parametrize("raw", [HUB_2B, HUB_8B], ids=["2b", "8b"])


@every_size
def test_the_hubs_config_is_read_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    config = VLMConfig.from_official(raw)
    assert_equals_transformers(config, official_config(raw))
    assert config.text_config.tie_word_embeddings == (raw is HUB_2B)


@every_size
def test_a_config_that_transformers_saved_again_says_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    official_config(raw).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved["text_config"]
    assert VLMConfig.from_folder(tmp_path) == VLMConfig.from_official(raw)


@every_size
def test_every_form_of_the_config_says_the_same(raw: dict[str, Any]) -> None:
    text, rope = raw["text_config"], {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    forms = [
        {
            **raw,
            "text_config": {**text, "rope_scaling": None, "rope_parameters": {**rope, "rope_theta": 5e6}, "rope_theta": None},
        },
        {**raw, "text_config": {**text, "rope_scaling": {"mrope_section": [24, 20, 20], "type": "mrope"}}},
        {**raw, "vision_config": {**raw["vision_config"], "model_type": "qwen3_vl_vision"}},
    ]
    for form in forms:
        assert VLMConfig.from_official(form) == VLMConfig.from_official(raw)


def test_every_default_equals_that_of_transformers() -> None:
    raw = {"model_type": "qwen3_vl", "vision_config": {"out_hidden_size": 4096}}  # the defaults of the parts do not fit
    assert_equals_transformers(VLMConfig.from_official(raw), official_config(raw))
    text = {"text_config": {"model_type": "qwen3_vl_text"}}
    assert VLMConfig.from_official({**raw, **text}) == VLMConfig.from_official(raw)


def tower(**changes: Any) -> dict[str, Any]:
    return {"vision_config": {**TOWER_2B, **changes}}


def text(**changes: Any) -> dict[str, Any]:
    return {"text_config": {**TEXT_2B, **changes}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (tower(model_type="qwen2_5_vl"), r"vision_config\.model_type = 'qwen2_5_vl' is not supported"),
        (tower(hidden_act="relu"), r"vision_config\.hidden_act = 'relu' is not supported"),
        (tower(patch_size=[16, 16]), r"vision_config\.patch_size = \[16, 16\] is not supported"),
        (tower(num_position_embeddings=2300), r"vision_config\.num_position_embeddings 2300 must be a square number"),
        (tower(num_position_embeddings=2**40), r"vision_config\.num_position_embeddings = 1099511627776 is not supported"),
        (tower(deepstack_visual_indexes=[5, 11, 24]), r"deepstack_visual_indexes \(5, 11, 24\) must be .* below the depth 24"),
        (tower(deepstack_visual_indexes=[11, 5]), r"deepstack_visual_indexes \(11, 5\) must be rising numbers"),
        (tower(deepstack_visual_indexes=[5, 5]), r"deepstack_visual_indexes \(5, 5\) must be rising numbers"),
        (tower(deepstack_visual_indexes=[-1]), r"vision_config\.deepstack_visual_indexes = .*-1"),
        (tower(hidden_size=1000), r"vision_config\.hidden_size 1000 must be a positive multiple of 4 \* num_heads"),
        (tower(out_hidden_size=4096), r"vision_config\.out_hidden_size 4096 must be the decoder's hidden_size 2048"),
        (text(num_hidden_layers=2), r"deepstack_visual_indexes names 3 blocks, one a layer; the decoder has 2 layers"),
        (text(model_type="qwen2_vl_text"), r"text_config\.model_type = 'qwen2_vl_text' .* one of 'qwen3_vl', 'qwen3_vl_text'"),
        (text(attention_bias=True), r"text_config\.attention_bias = True is not supported"),
        (
            text(rope_scaling={"mrope_interleaved": False, "mrope_section": [24, 20, 20], "rope_type": "default"}),
            r"text_config\.rope_scaling\.mrope_interleaved = False is not supported; expected True",
        ),
        (text(head_dim=64), r"mrope_section \(24, 20, 20\) must sum to half of head_dim 64"),
        ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe is a mixture of experts, which is not supported; take one of the dense"),
    ],
    ids=str,
)
def test_a_setting_that_would_change_the_numbers_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLMConfig.from_official({**HUB_2B, **changes})


# Checkpoint


def test_the_folder_is_one_that_transformers_loads(official: Any, folder: Path) -> None:
    loaded, report = type(official).from_pretrained(folder, output_loading_info=True)
    assert {name for name, found in report.items() if found} == set()
    for name, tensor in official.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for item in dataclasses.fields(Qwen3VLVisionConfig):
        stored, made = (getattr(each.config.vision_config, item.name) for each in (loaded, official))
        assert stored == made, item.name
    assert loaded.config.text_config.rope_parameters == official.config.text_config.rope_parameters


def original_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }


def hubs_names_of_version_4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace("model.language_model.", "language_model.model."): tensor for name, tensor in tensors.items()}
    return {name.replace("lm_head.", "language_model.lm_head."): tensor for name, tensor in renamed.items()}


@pytest.mark.parametrize("dialect", [dict, original_names, hubs_names_of_version_4])
def test_every_set_of_names_gives_the_same_model(
    dialect: Callable[..., dict[str, Tensor]],
    official: Any,
    vlm: VisionLanguageModel,
    copy: Callable[[dict[str, Tensor]], Path],
) -> None:
    state, expected = load(copy(dialect(hub_tensors(official)))).model.state_dict(), vlm.model.state_dict()
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
    official = qwen3_vl_reference(qwen2vl_tokenizer(), tie_word_embeddings=True)
    assert "lm_head.weight" not in hub_tensors(official)
    tied = load(write_qwen3_vl_folder(tmp_path, official, qwen2vl_tokenizer()))
    decoder = tied.model.language_model
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    inputs, packed = official_inputs(tied, REQUESTS["several"]), tied.prepare([REQUESTS["several"]])
    assert_close(prefill(decoder, packed).logits[0], official(**inputs).logits[0, -1])


MISSING = {
    "model.visual.merger.norm.weight": "visual.merger.norm.weight",
    "model.visual.deepstack_merger_list.2.linear_fc1.bias": "visual.deepstack_merger_list.2.linear_fc1.bias",
    "model.visual.pos_embed.weight": "visual.pos_embed.weight",
    "model.language_model.layers.3.self_attn.k_norm.weight": "language_model.layers.3.self_attn.k_norm.weight",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(name: str, official: Any, copy: Callable[[dict[str, Tensor]], Path]) -> None:
    tensors = hub_tensors(official)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"lacks tensors of the model: .*{MISSING[name]}; is the download complete"):
        load(copy(tensors))


def test_a_tower_of_fewer_blocks_than_config_json_says_is_named(
    official: Any, copy: Callable[[dict[str, Tensor]], Path]
) -> None:
    tensors = {name: tensor for name, tensor in hub_tensors(official).items() if ".visual.blocks.3." not in name}
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


# Prompts


def test_pictures_stand_in_a_conversation_without_system_message(vlm: VisionLanguageModel) -> None:
    token_ids, media = vlm.tokens_and_media(REQUESTS["several"])
    pads = ("<|vision_start|>" + "<|image_pad|>" * medium.num_tokens + "<|vision_end|>" for medium in media)
    prompt = f"<|im_start|>user\n{''.join(pads)}{REQUESTS['several'].text}<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids == qwen2vl_tokenizer().encode(prompt).ids


def processor_text(medium: Any, num_frames: int, fps: float) -> str:
    """How transformers writes a video in place of its token."""
    processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    self = object.__new__(processing.Qwen3VLProcessor)
    self.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    self.vision_start_token, self.vision_end_token, self.video_token = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"
    grids = torch.tensor(medium.grids) * torch.tensor([1, 2, 2])
    metadata = SimpleNamespace(fps=fps, frames_indices=list(range(num_frames)))
    return self.replace_video_token({"video_grid_thw": grids, "video_metadata": [metadata]}, 0)


@pytest.mark.parametrize("name", ["clip", "odd clip"])
def test_a_video_is_written_as_by_transformers_in_place_of_its_token_and_those_around_it(
    name: str, vlm: VisionLanguageModel
) -> None:
    """transformers 5 leaves the two tokens around the video; up to 4.57, and in training, they went."""
    request = REQUESTS[name]
    token_ids, (medium,) = vlm.tokens_and_media(request)
    written = processor_text(medium, len(request.video), 2.0)
    prompt = f"<|im_start|>user\n{written}{request.text}<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids == qwen2vl_tokenizer().encode(prompt).ids
    version_5 = prompt.replace(written, f"<|vision_start|>{written}<|vision_end|>")
    assert len(qwen2vl_tokenizer().encode(version_5).ids) == len(token_ids) + 2


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["several", "between", "clip and picture", "two clips", "text"])
def test_the_chat_template_of_a_folder_asks_alike(
    name: str, vlm: VisionLanguageModel, official: Any, copy: Callable[[dict[str, Tensor]], Path]
) -> None:
    folder = copy(hub_tensors(official))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert load(folder, template="checkpoint").token_ids(REQUESTS[name]) == vlm.token_ids(REQUESTS[name])


def test_a_templated_prompt_without_a_video_for_its_mark_is_refused(vlm: VisionLanguageModel) -> None:
    prompt = "<|vision_start|><|video_pad|><|vision_end|>What?"
    with pytest.raises(ValueError, match="1 image or video tokens"):
        vlm.prepare([Request(prompt=prompt)])
    with pytest.raises(
        ValueError, match=r"the prompt has 0 <\|vision_start\|><\|video_pad\|><\|vision_end\|> but 1 pictures or"
    ):
        vlm.prepare([Request(prompt="<|video_pad|>What?", video=clip(2, 64, 64))])


# The whole


@every_request
def test_features_deepstack_and_embeddings_equal_those_of_transformers(
    name: str, vlm: VisionLanguageModel, theirs: Callable[[str], dict[str, Any]]
) -> None:
    packed, official = vlm.prepare([REQUESTS[name]]), theirs(name)
    assert_close(packed.inputs_embeds, official["inputs_embeds"][0])
    if name == "text":
        assert packed.deepstack is None
        return
    assert packed.deepstack is not None
    assert torch.equal(packed.vision_mask, official["visual_pos_masks"][0])
    assert packed.deepstack.shape[1] == len(official["deepstack_visual_embeds"]) == 3
    for level, expected in enumerate(official["deepstack_visual_embeds"]):
        assert_close(packed.deepstack[packed.vision_mask, level], expected)
    assert not packed.deepstack[~packed.vision_mask].any()


@every_request
def test_positions_equal_those_of_transformers_and_of_training(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    packed, (token_ids, media) = vlm.prepare([REQUESTS[name]]), vlm.tokens_and_media(REQUESTS[name])
    inputs = official_inputs(vlm, REQUESTS[name])
    expected, _ = official.model.get_rope_index(**{key: value for key, value in inputs.items() if "pixel" not in key})
    assert torch.equal(packed.position_ids, expected[:, 0])
    frames = [(1, *grid[1:]) for medium in media for grid in medium.grids for _ in range(grid[0])]
    assert torch.equal(packed.position_ids, positions_by_the_rule(token_ids, frames, vlm.config.vision_tokens.values()))


@every_request
def test_logits_and_six_tokens_equal_those_of_transformers(
    name: str, vlm: VisionLanguageModel, official: Any, theirs: Callable[[str], dict[str, Any]]
) -> None:
    packed, given = vlm.prepare([REQUESTS[name]]), theirs(name)
    deepstack = None if name == "text" else (given["visual_pos_masks"][0], given["deepstack_visual_embeds"])
    expected, their_logits = official_greedy(official, given["inputs_embeds"][0], packed.position_ids, 6, deepstack)
    steps, logits = greedy(vlm, packed)
    assert_close(logits[:, 0], their_logits)
    assert [token for (token,) in steps] == expected


@pytest.mark.parametrize("name", ["odd", "several", "two clips", "clip and picture", "text"])
def test_generation_equals_that_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    transformers = pytest.importorskip("transformers")
    inputs = official_inputs(vlm, REQUESTS[name])
    never = vlm.config.text_config.vocab_size  # None would mean the model's own end of sequence
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=never, pad_token_id=0)
    expected = official.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    decoder = vlm.model.language_model
    ours = islice(decode_tokens(decoder, prefill(decoder, vlm.prepare([REQUESTS[name]]))), 6)
    assert [token for (token,) in ours] == expected.tolist()


def test_every_level_of_deepstack_changes_the_answer(vlm: VisionLanguageModel) -> None:
    """So that equal logits above say something about them."""
    packed, decoder = vlm.prepare([REQUESTS["clip"]]), vlm.model.language_model
    dense = prefill(decoder, packed).logits
    assert packed.deepstack is not None
    for level in range(3):
        without = packed.deepstack.index_fill(1, torch.tensor([level]), 0.0)
        other = prefill(decoder, dataclasses.replace(packed, deepstack=without)).logits
        assert (other - dense).abs().max() > 1e-2 * dense.abs().max()


def test_a_model_without_deepstack_is_one_of_an_empty_list(tmp_path: Path) -> None:
    official = qwen3_vl_reference(qwen2vl_tokenizer(), deepstack_visual_indexes=[])
    vlm = load(write_qwen3_vl_folder(tmp_path, official, qwen2vl_tokenizer()))
    inputs, packed = official_inputs(vlm, REQUESTS["odd"]), vlm.prepare([REQUESTS["odd"]])
    assert packed.deepstack is None
    assert_close(prefill(vlm.model.language_model, packed).logits[0], official(**inputs).logits[0, -1])


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


def test_bfloat16_weights_give_nearly_the_same_embeddings_and_deepstack(vlm: VisionLanguageModel, folder: Path) -> None:
    exact, rounded = (each.prepare([REQUESTS["several"]]) for each in (vlm, load(folder, dtype="bfloat16")))
    for name in ("inputs_embeds", "deepstack"):
        wide, narrow = getattr(exact, name), getattr(rounded, name)
        assert narrow.dtype == torch.bfloat16
        assert (narrow - wide).norm() < 0.05 * wide.norm()


# Dropping


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


@pytest.mark.parametrize("with_deepstack", [False, True], ids=["clean", "with deepstack"])
@pytest.mark.parametrize("ratios", [{1: 0.6, 3: 0.5}, {2: 0.4, 5: 0.2}, {3: 0.3}, {4: 0.3}], ids=str)
@pytest.mark.parametrize("name", ["several", "two clips", "clip and picture"])
def test_dropping_takes_the_deepstack_of_dropped_rows_away_and_decoding_goes_on_behind_the_whole_prompt(
    name: str, ratios: dict[int, float], with_deepstack: bool, vlm: VisionLanguageModel, official: Any
) -> None:
    """transformers' own layers, rows taken out by hand, are the oracle for the prompt and for every decoded token."""
    packed, decoder = vlm.prepare([REQUESTS[name]]), vlm.model.language_model
    out = prefill(decoder, packed, V2Drop(DropSchedule(ratios), with_deepstack=with_deepstack))
    behind = int(packed.position_ids.max()) + 1
    assert out.cache.position_ids.tolist() == [[behind]] * decoder.config.num_hidden_layers
    embeds, positions, logits = packed.inputs_embeds, packed.position_ids, out.logits[0]
    assert packed.deepstack is not None
    levels = packed.deepstack.unbind(1)
    for step in range(2):
        more = torch.zeros(step, embeds.shape[1])
        theirs, left = official_dropping(
            official,
            embeds,
            positions,
            torch.cat([packed.vision_mask, torch.zeros(step, dtype=torch.bool)]),
            ratios,
            [torch.cat([level, more]) for level in levels],
            with_deepstack,
        )
        assert_close(logits, theirs)
        assert_kept(out, packed, left)
        token = logits.argmax().view(1)
        embeds = torch.cat([embeds, decoder.embed_tokens(token)])
        positions = torch.cat([positions, torch.full((3, 1), behind + step)], dim=1)
        logits = decode_one_token(decoder, token, out.cache)[0]


def assert_kept(out: Prefilled, packed: PackedInputs, left: dict[int, list[int]]) -> None:
    vision = packed.vision_mask.nonzero().flatten()
    for layer_idx, (indices,) in out.kept:
        assert vision[indices].tolist() == [row for row in left[layer_idx] if row in set(vision.tolist())]


@pytest.mark.parametrize("metric", ["l2", "l1", "cosine"])
def test_the_towers_message_is_part_of_the_variation_at_layers_1_to_3_only_where_it_is_asked_for(
    metric: str, vlm: VisionLanguageModel
) -> None:
    packed, decoder = vlm.prepare([REQUESTS["several"]]), vlm.model.language_model
    for layer in range(1, 6):
        clean, whole = (
            prefill(decoder, packed, V2Drop(DropSchedule({layer: 0.3}), metric, with_deepstack=asked)).kept[0][1][0].tolist()
            for asked in (False, True)
        )
        assert (clean == whole) == (layer > 3)


def test_the_theory_is_not_measured_where_the_tower_adds_to_the_states(vlm: VisionLanguageModel) -> None:
    with pytest.raises(ValueError, match=r"this model's tower adds to their outputs \(deepstack\)"):
        drop_point(vlm.model.language_model, vlm.prepare([REQUESTS["odd"]]), 2)
    assert drop_point(vlm.model.language_model, vlm.prepare([REQUESTS["text"]]), 2).layer_idx == 2


# The command line


def test_the_command_line_answers_about_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(224, 160).save(tmp_path / "photo.png")
    options = ["--prompt", "What colour is the digit?", "--methods", "dense,v2drop", "--retain", "0.4", "--json"]
    places = ["--model", folder, "--image", tmp_path / "photo.png", "--output", tmp_path / "run"]
    assert cli.main([*map(str, places), *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, own = result["results"]
    assert result["model"] == folder.name
    assert dense["vision_tokens"] == 35
    assert own["mean_vision_tokens"] == pytest.approx(0.4 * 35, abs=1)
    assert (tmp_path / "run" / "kept.png").is_file()
