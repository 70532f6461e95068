"""SmolVLM equals transformers' on tiny random models: positions, features, logits, answers; under every set of names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from smolvlm import (
    PATCH,
    SCALE,
    TEXT,
    VISION,
    Oracle,
    clip,
    original_names,
    picture,
    preprocessor,
    smollm2_tokenizer,
    smolvlm_reference,
    write_smolvlm_folder,
)
from tiny import logits_of, resizing_horizontally_first
from torch import Tensor

from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load
from nanovlm_v2drop.loading.files import CheckpointError
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import SmolVLMConfig, VLMConfig
from nanovlm_v2drop.models.smolvlm import Connector, patch_positions
from nanovlm_v2drop.report.gallery import board_of

transformers = pytest.importorskip("transformers")
REQUESTS = {
    "picture": Request("<image>What colour?", images=[picture(50, 40)]),
    "thin picture": Request("<image>What?", images=[picture(9, 300)]),
    "picture of one tile's size": Request("<image>What?", images=[picture(32, 32)]),
    "pictures": Request("Is <image> in<image> yes or no?", images=[picture(70, 33), picture(21, 90)]),
    "video": Request("<video>What happens?", video=clip(5)),
    "text": Request("yes or no?"),
}
every_request = pytest.mark.parametrize("name", REQUESTS)
# HuggingFaceTB/SmolVLM2-500M-Video-Instruct, as its model page shows it.
HUB_500M: dict[str, Any] = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "smolvlm",
    "pad_token_id": 128002,
    "scale_factor": 4,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "pad_token_id": 2,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": False,
    "use_reentrant_checkpointing": False,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "smolvlm_vision",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}


@pytest.fixture(scope="module")
def reference() -> Any:
    return smolvlm_reference(smollm2_tokenizer())


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smolvlm_folder(tmp_path_factory.mktemp("smolvlm"), reference, smollm2_tokenizer())


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VisionLanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def official(vlm: VisionLanguageModel) -> dict[str, dict[str, Tensor]]:
    """What transformers' processors make of each request."""
    oracle = Oracle(vlm, smollm2_tokenizer())
    with resizing_horizontally_first():
        return {name: oracle.inputs(request) for name, request in REQUESTS.items()}


# The numbers


@every_request
def test_token_ids_and_pixels_are_those_of_transformers(name: str, vlm: VisionLanguageModel, official: Any) -> None:
    token_ids, media = vlm.tokens_and_media(REQUESTS[name])
    assert token_ids == official[name]["input_ids"][0].tolist()
    if media:
        pixels = torch.cat([medium.pixel_values for medium in media])
        torch.testing.assert_close(pixels, official[name]["pixel_values"][0], atol=1e-6, rtol=0)


@every_request
def test_features_and_logits_are_those_of_transformers(
    name: str, vlm: VisionLanguageModel, reference: Any, official: Any
) -> None:
    packed = vlm.prepare([REQUESTS[name]])
    if "pixel_values" in official[name]:
        features = reference.model.get_image_features(official[name]["pixel_values"]).pooler_output
        torch.testing.assert_close(packed.inputs_embeds[packed.vision_mask], torch.cat(list(features)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(vlm.model, packed), reference(**official[name]).logits[0], atol=1e-4, rtol=1e-4)


def test_a_batch_generates_the_tokens_that_transformers_generates_for_each_request(
    vlm: VisionLanguageModel, reference: Any, official: Any
) -> None:
    answers = generate(vlm, list(REQUESTS.values()), None, max_new_tokens=8)
    for name, answer in zip(REQUESTS, answers, strict=True):
        inputs, end = official[name], list(vlm.config.eos_token_ids)
        new = reference.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=2)
        expected = new[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.token_ids) == [token for token in expected if token not in end]


def test_vision_rows_between_words_are_kept_by_number_and_all_words_stay(vlm: VisionLanguageModel) -> None:
    packed = vlm.prepare([REQUESTS["pictures"]])
    runs = torch.diff(packed.vision_mask.int()).eq(1).sum()
    assert runs == sum(frames for frames, _, _ in packed.vision_grids[0]) > 4
    (answer,) = generate(vlm, [REQUESTS["pictures"]], V2Drop(DropSchedule({2: 0.5, 4: 0.1})), max_new_tokens=2)
    (first, kept), (second, fewer) = answer.kept
    assert (first, second) == (2, 4)
    assert set(fewer.tolist()) < set(kept.tolist()) < set(range(packed.vision_counts[0]))


def test_idefics3_is_the_same_model_without_videos(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    older = load(write_smolvlm_folder(tmp_path, smolvlm_reference(smollm2_tokenizer(), "Idefics3"), smollm2_tokenizer()))
    request = REQUESTS["pictures"]
    torch.testing.assert_close(logits_of(older.model, older.prepare([request])), logits_of(vlm.model, vlm.prepare([request])))
    with pytest.raises(ValueError, match="takes pictures only, not a video; give its frames as images"):
        older.prepare([REQUESTS["video"]])


# 27 patches as in the 2.2B model; 25, of which some share a position in float32; one patch a token.
GRIDS = {"27": (54, 2, 3), "25": (50, 2, 5), "19": (38, 2, 1), "not filled": (33, 4, 2)}


@pytest.mark.parametrize("name", GRIDS)
def test_towers_of_other_grids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    size, patch, scale = GRIDS[name]
    tokenizer = smollm2_tokenizer()
    reference = smolvlm_reference(tokenizer, vision={**VISION, "image_size": size, "patch_size": patch}, scale=scale)
    sizes = {"tile": size, "longest_edge": 2 * size}
    vlm = load(write_smolvlm_folder(tmp_path, reference, tokenizer, **sizes))
    request = Request("<image>What?", images=[picture(61, 40)])
    with resizing_horizontally_first():
        official = Oracle(vlm, tokenizer, **sizes).inputs(request)
    packed = vlm.prepare([request])
    assert vlm.token_ids(request) == official["input_ids"][0].tolist()
    features = torch.cat(list(reference.model.get_image_features(official["pixel_values"]).pooler_output))
    torch.testing.assert_close(packed.inputs_embeds[packed.vision_mask], features, atol=1e-5, rtol=1e-5)


def test_patches_of_the_released_models_are_in_plain_order() -> None:
    for side in (14, 27, 32):
        assert patch_positions(side) == list(range(side**2))
    assert patch_positions(25) != list(range(625))


def test_a_token_is_the_square_of_patches_at_its_place() -> None:
    side, scale = 6, 3
    squares = Connector(1, 1, scale).squares(torch.arange(side**2).float()[None, :, None])[0, :, :, 0]
    rows = torch.arange(side**2).reshape(side, side)
    expected = [rows[top : top + 3, left : left + 3].flatten() for top in (0, 3) for left in (0, 3)]
    assert torch.equal(squares, torch.stack(expected).float())


def test_traces_hold_the_attention_and_keys_of_the_last_block_averaged_over_the_patches_of_a_token(
    vlm: VisionLanguageModel, reference: Any, official: Any
) -> None:
    packed = vlm.prepare([REQUESTS["picture"]])
    tower = reference.model.vision_model
    tower.set_attn_implementation("eager")
    captured: dict[str, Tensor] = {}
    block = tower.encoder.layers[-1].self_attn
    hook = block.k_proj.register_forward_hook(lambda module, args, output: captured.update(keys=output))
    pixels = official["picture"]["pixel_values"][0]
    weights = tower(pixels, output_attentions=True).attentions[-1]
    hook.remove()
    tower.set_attn_implementation("sdpa")
    side = VISION["image_size"] // PATCH // SCALE
    received = weights.mean(2).unflatten(-1, (side, SCALE, side, SCALE)).mean((3, 5)).flatten(2)  # (tiles, heads, n)
    keys = captured["keys"].unflatten(-1, (VISION["num_attention_heads"], -1))
    keys = keys.unflatten(1, (side, SCALE, side, SCALE)).mean((2, 4)).flatten(1, 2).transpose(1, 2)
    assert len(packed.vision) == len(pixels) == len(packed.vision_grids[0])
    for tile, trace in enumerate(packed.vision):
        torch.testing.assert_close(trace.received_attention(), received[tile], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(trace.keys(), keys[tile], atol=1e-5, rtol=1e-5)


def test_a_video_has_one_grid_of_all_its_frames(vlm: VisionLanguageModel) -> None:
    packed = vlm.prepare([REQUESTS["video"]])
    assert packed.vision_grids == (((5, 4, 4),),)
    assert packed.vision[0].received_attention().shape == (2, 80)


def test_a_picture_and_a_video_in_one_prompt_are_those_of_two_prompts(vlm: VisionLanguageModel) -> None:
    image, video = picture(50, 40), clip(3)
    both = vlm.prepare([Request("<video>In<image>yes?", images=[image], video=video)])
    apart = vlm.prepare([Request("<video>a", video=video), Request("<image>a", images=[image])])
    torch.testing.assert_close(both.inputs_embeds[both.vision_mask], apart.inputs_embeds[apart.vision_mask])
    assert both.vision_grids[0] == apart.vision_grids[0] + apart.vision_grids[1]


# The files


def weights(vlm: VisionLanguageModel) -> dict[str, Tensor]:
    return vlm.model.state_dict()


DIALECTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"hub": dict, "bare model": original_names}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_set_of_names_gives_the_same_weights(
    dialect: str, reference: Any, vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    tensors = DIALECTS[dialect](reference.state_dict())
    other = load(write_smolvlm_folder(tmp_path, reference, smollm2_tokenizer(), tensors))
    assert all(torch.equal(tensor, weights(vlm)[name]) for name, tensor in weights(other).items())


@pytest.mark.parametrize("original_format", [True, False])
def test_what_transformers_saves_itself_loads(
    original_format: bool, reference: Any, folder: Path, vlm: VisionLanguageModel, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path, save_original_format=original_format)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = load(tmp_path)
    assert all(torch.equal(tensor, weights(vlm)[name]) for name, tensor in weights(other).items())
    assert other.config == vlm.config


def test_settings_that_transformers_5_nests_are_read(folder: Path, vlm: VisionLanguageModel, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    nested = {
        "image_processor": preprocessor(),
        "video_processor": {**preprocessor(), "video_processor_type": "SmolVLMVideoProcessor"},
        "image_seq_len": 16,
        "processor_class": "SmolVLMProcessor",
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    other = load(tmp_path)
    assert other.image_processor == vlm.image_processor
    assert other.sampling == vlm.sampling


def test_a_head_of_its_own_is_needed_unless_the_flag_ties_it(reference: Any, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lacks tensors of the model: language_model\.lm_head\.weight"):
        load(write_smolvlm_folder(tmp_path / "own", reference, smollm2_tokenizer(), tensors))
    tied = smolvlm_reference(smollm2_tokenizer(), tied=True)
    tensors = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    model = load(write_smolvlm_folder(tmp_path / "tied", tied, smollm2_tokenizer(), tensors)).model
    assert model.language_model.lm_head.weight is model.language_model.embed_tokens.weight


def test_the_hubs_config_gives_the_released_sizes() -> None:
    config = VLMConfig.from_official(HUB_500M)
    assert isinstance(config, SmolVLMConfig)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size, vision.num_patches) == (768, 12, 3072, 1024)
    assert (vision.hidden_act, vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.rope_theta) == (960, 32, 5, 1e5)
    assert not text.tie_word_embeddings
    assert (config.token_grid, config.image_token_id, config.takes_video) == (8, 49190, True)


@pytest.mark.parametrize("kind", ["SmolVLM", "Idefics3"])
def test_what_a_config_leaves_out_is_as_in_transformers_classes(kind: str) -> None:
    official = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", "vocab_size": 128300}, vision_config={"patch_size": 16}
    )
    config = VLMConfig.from_official(
        {
            "model_type": kind.lower(),
            "text_config": {"model_type": "llama", "vocab_size": 128300},
            "vision_config": {"patch_size": 16},
        }
    )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    for name in (*sizes, "layer_norm_eps", "hidden_act"):
        assert getattr(config.vision_config, name) == getattr(official.vision_config, name)
    assert config.text_config.rms_norm_eps == official.text_config.rms_norm_eps
    assert config.text_config.hidden_size == official.text_config.hidden_size
    assert (config.image_token_id, config.scale_factor) == (official.image_token_id, official.scale_factor)


def test_a_tower_that_cannot_be_shuffled_is_refused(reference: Any, tmp_path: Path) -> None:
    write_smolvlm_folder(tmp_path, reference, smollm2_tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale_factor": 3}))
    with pytest.raises(ValueError, match="patches along a side of a tile 8 must be a positive multiple of scale_factor 3"):
        load(tmp_path)


def test_the_text_section_keeps_every_size(vlm: VisionLanguageModel) -> None:
    for name, value in TEXT.items():
        assert getattr(vlm.config.text_config, name) == value


def test_the_board_shows_the_whole_picture_and_the_tokens_of_its_last_tile(vlm: VisionLanguageModel) -> None:
    board = board_of(vlm, REQUESTS["picture"])
    total = vlm.prepare([REQUESTS["picture"]]).vision_counts[0]
    assert board.grid == (4, 4)
    assert board.cells == [-1] * (total - 16) + list(range(16))


def test_a_model_in_memory_is_asked_with_its_own_processor(reference: Any, vlm: VisionLanguageModel) -> None:
    processor = Oracle(vlm, smollm2_tokenizer()).processor
    held = load(reference, processor=processor)
    request = REQUESTS["pictures"]
    assert held.image_processor == vlm.image_processor
    assert held.token_ids(request) == vlm.token_ids(request)
    torch.testing.assert_close(logits_of(held.model, held.prepare([request])), logits_of(vlm.model, vlm.prepare([request])))
