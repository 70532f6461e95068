"""LLaVA-1.6 with Mistral beside transformers, and Mistral's window: refused exactly where it would hide a token."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from llava_next import llava_next_reference, official_inputs, picture, write_llava_next_folder

from nanovlm_v2drop import Request, V2Drop, generate, load, prefill
from nanovlm_v2drop.dropping import DropSchedule
from nanovlm_v2drop.loading.specs import MODELS
from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.models.config import LlavaNextConfig, TextConfig, VLMConfig

transformers = pytest.importorskip("transformers")
CONTEXT = 256
# llava-hf/llava-v1.6-mistral-7b-hf
HUB: dict[str, Any] = {
    "model_type": "llava_next",
    "image_token_index": 32000,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "text_config": {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
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
}


def tiny_mistral(window: int | None) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    settings = {"max_position_embeddings": CONTEXT, "sliding_window": window, "rope_parameters": rope}
    return llava_next_reference("Mistral", num_key_value_heads=1, **settings)


@pytest.fixture(scope="module", params=[None, CONTEXT], ids=["no window", "a window of the whole context"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VisionLanguageModel]:
    official = tiny_mistral(request.param)
    return official, load(write_llava_next_folder(tmp_path_factory.mktemp("tiny-mistral"), official))


@pytest.mark.parametrize("size", [(60, 60), (100, 40), (20, 90)])
def test_logits_and_answers_equal_those_of_transformers(size: tuple[int, int], pair: tuple[Any, VisionLanguageModel]) -> None:
    official, vlm = pair
    request = Request("What is shown?", images=[picture(*size)])
    inputs = official_inputs(vlm, request)
    ours = prefill(vlm.model.language_model, vlm.prepare([request])).logits[0]
    torch.testing.assert_close(ours, official(**inputs).logits[0, -1], atol=1e-4, rtol=1e-4)
    (answer,) = generate(vlm, [request], max_new_tokens=6)
    theirs = official.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer.token_ids == theirs


def test_a_question_is_asked_in_mistrals_conversation(pair: tuple[Any, VisionLanguageModel]) -> None:
    _, vlm = pair
    assert vlm.template == "mistral_instruct"
    ids = tiny_tokenizer().encode("[INST] <image>\nWhat is shown? [/INST]").ids
    place = ids.index(vlm.config.image_token_id)
    found, (medium,) = vlm.tokens_and_media(Request("What is shown?", images=[picture(60, 60)]))
    assert found == ids[:place] + [vlm.config.image_token_id] * medium.num_tokens + ids[place + 1 :]


def test_dropping_works_with_mistral(pair: tuple[Any, VisionLanguageModel]) -> None:
    _, vlm = pair
    request = Request("What is shown?", images=[picture(100, 40)])
    (answer,) = generate(vlm, [request], V2Drop(DropSchedule({1: 0.5, 2: 0.2})), max_new_tokens=4)
    total = vlm.prepare([request]).vision_counts[0]
    assert [len(kept) for _, kept in answer.kept] == [total // 2, total // 2 // 5]


def test_the_hubs_config_gives_the_released_settings() -> None:
    config = VLMConfig.from_official(HUB)
    assert isinstance(config, LlavaNextConfig)
    sizes = {"vocab_size": 32064, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768}
    assert config.text_config == TextConfig(**sizes, rms_norm_eps=1e-5, rope_theta=1e6)
    assert (config.image_token_id, config.eos_token_ids) == (32000, (2,))
    official = transformers.LlavaNextConfig(**copy.deepcopy(HUB)).text_config
    assert official.sliding_window is None
    assert official.rope_parameters["rope_theta"] == config.text_config.rope_theta


def test_a_section_that_says_nothing_has_the_defaults_of_transformers() -> None:
    bare = {"model_type": "llava_next", "text_config": {"model_type": "mistral", "sliding_window": None}}
    config = VLMConfig.from_official(bare).text_config
    official = transformers.MistralConfig()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    assert all(getattr(config, name) == getattr(official, name) for name in names)
    assert config.rope_theta == official.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 4096}, r"sliding_window of 4096 tokens .* the context of max_position_embeddings 32768"),
        ({"sliding_window": 32767}, r"sliding_window of 32767 tokens .*; only full attention is implemented"),
        ({"sliding_window": "4096"}, r"sliding_window = '4096' is not supported"),
        (
            {"sliding_window": 32768, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "sliding_window of 32768 tokens .* prompts of a context without limit",
        ),
        (
            {"sliding_window": 32768, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "sliding_window of 32768 tokens .* the context of .* 65536",
        ),
    ],
    ids=str,
)
def test_a_window_that_would_hide_a_token_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^text_config\.{message}"):
        VLMConfig.from_official({**HUB, "text_config": {**HUB["text_config"], **changes}})


def test_a_section_without_a_window_has_that_of_transformers_class_and_is_refused() -> None:
    without = {name: value for name, value in HUB["text_config"].items() if name != "sliding_window"}
    assert transformers.MistralConfig(**without).sliding_window == 4096
    with pytest.raises(ValueError, match="sliding_window of 4096 tokens is not supported, because it is smaller"):
        VLMConfig.from_official({**HUB, "text_config": without})


@pytest.mark.parametrize("window", [32768, 131072])
def test_a_window_that_never_acts_is_read(window: int) -> None:
    raw = {**HUB, "text_config": {**HUB["text_config"], "sliding_window": window}}
    assert VLMConfig.from_official(raw) == VLMConfig.from_official(HUB)


def test_transformers_window_would_have_changed_the_logits(tmp_path: Path) -> None:
    windowed, official = tiny_mistral(40), tiny_mistral(None)
    vlm = load(write_llava_next_folder(tmp_path / "full", official))
    inputs = official_inputs(vlm, Request("What is shown?", images=[picture(60, 60)]))
    assert inputs["input_ids"].shape[1] > 40
    assert (windowed(**inputs).logits[0, -1] - official(**inputs).logits[0, -1]).abs().max() > 0.01
    shutil.copytree(tmp_path / "full", tmp_path / "windowed")
    windowed.config.save_pretrained(tmp_path / "windowed")
    with pytest.raises(ValueError, match=r"config\.json: text_config\.sliding_window of 40 tokens is not supported"):
        load(tmp_path / "windowed")


def test_the_name_of_the_model_leads_to_its_repository() -> None:
    assert MODELS["llava-v1.6-mistral-7b"].repository == "llava-hf/llava-v1.6-mistral-7b-hf"
