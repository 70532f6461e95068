"""How a model is asked: in the papers' conversation where its decoder is theirs, else in that of its own folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanovlm_v2drop.loading.families import FAMILIES, find_conversation, media_processor, released_sampling
from nanovlm_v2drop.models.config import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2VLConfig,
    SmolVLMConfig,
    TextConfig,
    VLMConfig,
)
from nanovlm_v2drop.processing.prompts import DEFAULT_TEMPLATE, TEMPLATES, Request, build_prompt
from nanovlm_v2drop.processing.video import SmolVLMSampling, UniformSampling

OWN = "{{ '<|user|>' }}{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}<|assistant|>"
LLAMA3, YI, QWEN2 = 128_320, 64_064, 152_064  # rows of their embeddings


def text(vocab_size: int = 32_064, **settings: Any) -> TextConfig:
    return TextConfig(vocab_size=vocab_size, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **settings)


# config, model_type of the decoder as config.json says it, and the template
DECODERS: dict[str, tuple[VLMConfig, str | None, str]] = {
    "LLaVA-1.5, Vicuna": (LlavaConfig(text_config=text()), "llama", "vicuna_v1"),
    "LLaVA-1.5, a file that names no decoder": (LlavaConfig(text_config=text()), None, "vicuna_v1"),
    "LLaVA-1.5, the original file": (LlavaConfig(text_config=text(32_000)), "llava_llama", "vicuna_v1"),
    "LLaVA-1.5, Llama 3": (LlavaConfig(text_config=text(LLAMA3)), "llama", "chat_template.jinja"),
    "LLaVA-1.6, Vicuna": (LlavaNextConfig(text_config=text()), "llama", "vicuna_v1"),
    "LLaVA-1.6, Qwen2": (LlavaNextConfig(text_config=text(QWEN2, qkv_bias=True)), "qwen2", "chat_template.jinja"),
    "LLaVA-1.6, Llama 3": (LlavaNextConfig(text_config=text(LLAMA3)), "llama", "chat_template.jinja"),
    "LLaVA-1.6, Mistral": (LlavaNextConfig(text_config=text()), "mistral", "mistral_instruct"),
    "LLaVA-1.5, Mistral": (LlavaConfig(text_config=text()), "mistral", "chat_template.jinja"),
    "LLaVA-1.6, Yi": (LlavaNextConfig(text_config=text(YI)), "llama", "chat_template.jinja"),
    "LLaVA-OneVision, Qwen2": (LlavaOnevisionConfig(text_config=text(QWEN2, qkv_bias=True)), "qwen2", "qwen_1_5"),
    "LLaVA-OneVision, LLaMA": (LlavaOnevisionConfig(text_config=text()), "llama", "chat_template.jinja"),
}


def folder_with(folder: Path, model_type: str | None, template: str | None = OWN) -> Path:
    named = {} if model_type is None else {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_next", "text_config": named}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder_that_is_not_the_papers_is_asked_in_its_own_template(case: str, tmp_path: Path) -> None:
    config, model_type, expected = DECODERS[case]
    name, conversation = find_conversation(folder_with(tmp_path, model_type), config, None)
    assert name == expected
    prompt = build_prompt(Request(text="What?"), conversation)
    own = prompt == "<|user|>What?<|assistant|>"
    assert own == (expected == "chat_template.jinja")
    assert own or prompt == TEMPLATES[expected]("What?")


@pytest.mark.parametrize("case", [case for case, (_, _, name) in DECODERS.items() if name == "chat_template.jinja"])
def test_an_unknown_decoder_without_a_template_is_refused_with_the_way_out(case: str, tmp_path: Path) -> None:
    config, model_type, _ = DECODERS[case]
    folder = folder_with(tmp_path, model_type, template=None)
    with pytest.raises(
        ValueError, match=r"holds no chat template, and none of the papers' is for its decoder; give --template"
    ):
        find_conversation(folder, config, None)
    assert find_conversation(folder, config, "vicuna_v1")[0] == "vicuna_v1"


def test_the_folders_own_template_can_be_asked_for_by_name(tmp_path: Path) -> None:
    config = LlavaConfig(text_config=text())
    assert find_conversation(folder_with(tmp_path, "llama"), config, None)[0] == "vicuna_v1"
    assert find_conversation(tmp_path, config, "checkpoint")[0] == "chat_template.jinja"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="holds no chat template; give --template"):  # and nothing about the papers
        find_conversation(tmp_path, config, "checkpoint")


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind is not LlavaConfig])
def test_a_way_to_make_pictures_square_is_refused_where_a_family_has_its_own(kind: type[VLMConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_aspect_ratio 'crop' is a choice of LLaVA-1\.5 alone; leave it out for "):
        media_processor(tmp_path, object.__new__(kind), "crop", None)


def test_the_frames_of_a_video_are_those_that_were_asked_for_or_those_of_the_folder_or_of_the_family(tmp_path: Path) -> None:
    given = {"video_sampling": {"fps": 2, "max_frames": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    for kind, family in FAMILIES.items():
        config = object.__new__(kind)
        assert released_sampling(tmp_path, config, 5) == UniformSampling(5)
        own = SmolVLMSampling(fps=2, max_frames=32) if kind is SmolVLMConfig else family.sampling
        assert released_sampling(tmp_path, config, None) == own


def test_a_broken_template_that_is_not_used_is_not_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "llama", template="{% for")
    assert find_conversation(folder, LlavaConfig(text_config=text()), None)[0] == "vicuna_v1"
    with pytest.raises(ValueError, match="cannot be read"):
        find_conversation(folder, LlavaConfig(text_config=text()), "checkpoint")


def test_every_family_has_a_known_template_and_llava_the_default() -> None:
    assert all(family.template in TEMPLATES for family in FAMILIES.values())
    assert {FAMILIES[kind].template for kind in (LlavaConfig, LlavaNextConfig)} == {DEFAULT_TEMPLATE}
    assert FAMILIES[Qwen2VLConfig].template == "qwen2_vl"
