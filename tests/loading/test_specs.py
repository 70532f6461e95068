"""The table of models: what it says can be counted, and reading it needs no torch."""

import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nanovlm_v2drop.benchmark.workload import SHAPES
from nanovlm_v2drop.loading.families import FAMILIES
from nanovlm_v2drop.loading.specs import MODELS, VIDEO
from nanovlm_v2drop.models.config import (
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    NanoVLMConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLVisionConfig,
    Qwen2VLConfig,
    Qwen2VLVisionConfig,
    Qwen3VLConfig,
    Qwen3VLVisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
    TextConfig,
    VLMConfig,
)
from nanovlm_v2drop.models.model_classes import MODEL_CLASSES
from nanovlm_v2drop.processing.prompts import TEMPLATES

SIGLIP_BASE = SiglipVisionConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
)
ROOT = Path(__file__).parents[2]
PUBLISHED_SHARDS = {"llava-1.5-7b": [4.99, 4.96, 4.18], "qwen2-vl-7b": [3.9, 3.86, 3.86, 3.86, 1.09]}  # GB
REMOTE = [name for name, spec in MODELS.items() if spec.repository is not None]


def config_of(name: str, text: TextConfig) -> VLMConfig:
    if name.startswith("qwen2-vl"):
        return Qwen2VLConfig(text_config=text, vision_config=Qwen2VLVisionConfig(hidden_size=text.hidden_size))
    if name.startswith("qwen2.5-vl"):
        inner = 3456 if name.endswith("72b") else 3420
        sizes = {"hidden_size": 1280, "out_hidden_size": text.hidden_size, "intermediate_size": inner}
        return Qwen2_5_VLConfig(text_config=text, vision_config=Qwen2_5_VLVisionConfig(**sizes))
    if name.startswith("qwen3-vl"):
        small = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": (5, 11, 17)}
        sizes = small if name.endswith(("-2b", "-4b")) else {}
        tower = Qwen3VLVisionConfig(out_hidden_size=text.hidden_size, **sizes)
        return Qwen3VLConfig(text_config=text, vision_config=tower)
    if name == "nanovlm-222m":
        return NanoVLMConfig(text, 49152, vision_config=replace(SIGLIP_BASE, image_size=224), scale_factor=2)
    if name.startswith("nanovlm"):
        return NanoVLMConfig(text, 49152, vision_config=SIGLIP_BASE, scale_factor=4)
    if name.startswith("smolvlm"):
        tower, scale = (SiglipVisionConfig(), 3) if name.endswith("2.2b") else (SIGLIP_BASE, 4)
        return SmolVLMConfig(
            text, image_token_id=49190, vision_config=tower, scale_factor=scale, takes_video=name.startswith("smolvlm2")
        )
    if name.startswith("llava-v1.6"):
        return LlavaNextConfig(text_config=text)
    return (LlavaConfig if name.startswith("llava-1.5") else LlavaOnevisionConfig)(text_config=text)


def weights_of(name: str, num_layers: int) -> int:
    """How many weights the model has with so many layers; a tied head counts once."""
    config = config_of(name, replace(SHAPES[name], num_hidden_layers=num_layers))
    with torch.device("meta"):
        model = MODEL_CLASSES[type(config)](config, "sdpa")
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", REMOTE)
def test_the_stated_number_of_weights_is_that_of_the_models_shapes(name: str) -> None:
    three, four = weights_of(name, 3), weights_of(name, 4)  # each of three levels of deepstack needs a layer
    total = three + (four - three) * (SHAPES[name].num_hidden_layers - 3)
    assert MODELS[name].parameters == pytest.approx(total / 1e9, rel=5e-3)


@pytest.mark.parametrize("name", PUBLISHED_SHARDS)
def test_the_stated_download_is_as_large_as_the_published_shards(name: str) -> None:
    assert MODELS[name].download_size == pytest.approx(sum(PUBLISHED_SHARDS[name]), rel=5e-3)


@pytest.mark.parametrize("name", ["demo", "demo-video"])
def test_the_stated_number_of_weights_of_a_shipped_model_is_that_of_its_file(name: str) -> None:
    with safe_open(MODELS[name].folder / "model.safetensors", framework="pt") as opened:
        total = sum(prod(opened.get_slice(tensor).get_shape()) for tensor in opened.keys())  # noqa: SIM118
    assert MODELS[name].parameters == pytest.approx(total / 1e9, rel=0.01)
    assert MODELS[name].download_size is None


def test_every_entry_has_a_summary_and_every_family_a_known_template() -> None:
    assert all(family.template in TEMPLATES for family in FAMILIES.values())
    for name, spec in MODELS.items():
        assert spec.name == name
        assert spec.template is None or spec.template in TEMPLATES
        assert spec.summary
        assert spec.licence
        assert spec.folder == ROOT / "weights" / name


def test_the_models_that_take_a_video_are_those_whose_config_takes_one() -> None:
    for name in REMOTE:
        assert (VIDEO in MODELS[name].takes) == config_of(name, SHAPES[name]).takes_video, name


def test_the_table_is_read_without_torch() -> None:
    script = "import sys\nfrom nanovlm_v2drop.loading.specs import MODELS\nprint(len(MODELS), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(len(MODELS)), "False"]
