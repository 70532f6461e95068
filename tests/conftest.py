"""A tiny random LLaVA, made by transformers and laid out as llava-hf lays out its checkpoints."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm_v2drop.demo.data import llama_tokenizer
from nanovlm_v2drop.processing.prompts import TEMPLATES

IMAGE_SIZE, PATCH_SIZE = 42, 7  # 36 vision tokens


def pytest_configure() -> None:
    """pytest-xdist runs one process a core; with torch's default, each of them would start one thread a core."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start


def tiny_tokenizer() -> Tokenizer:
    """In the form of LLaMA's tokenizer.json, trained on the templates."""
    return llama_tokenizer([template("What colour is the digit? yes no") for template in TEMPLATES.values()] * 4)


def tiny_reference(tokenizer: Tokenizer, **text_settings: Any) -> Any:
    """transformers' LLaVA: 6 layers with grouped queries, 4 CLIP blocks, weights so large that every layer matters."""
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text, **text_settings),
        image_token_index=tokenizer.token_to_id("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return model


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names for transformers 5's parameters, written down apart from the loader's own table."""
    prefixes = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    return {name: tensor.contiguous() for name, tensor in with_prefixes(state, prefixes).items()}


def with_prefixes(tensors: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Every name with its prefix, the first that fits, replaced by another; one without a known prefix is an error."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def write_processing_files(folder: Path, tokenizer: Tokenizer) -> None:
    """What a checkpoint folder holds besides config.json and weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other make tiny tensors a hundred times slower on a machine that is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_reference_model() -> Any:
    """transformers' LlavaForConditionalGeneration with the weights of `tiny_llava_folder`."""
    return tiny_reference(tiny_tokenizer())


@pytest.fixture(scope="session")
def tiny_hub_tensors(tiny_reference_model: Any) -> dict[str, Tensor]:
    """The weights of `tiny_llava_folder` under the hub's names."""
    return official_names(tiny_reference_model.state_dict())


@pytest.fixture(scope="session")
def tiny_llava_folder(
    tiny_reference_model: Any, tiny_hub_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny random LLaVA in the layout of llava-hf's repositories, float32. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny-llava")
    tiny_reference_model.config.save_pretrained(folder)
    write_processing_files(folder, tiny_tokenizer())
    save_file(tiny_hub_tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def copy_without_weights(tiny_llava_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a copy of `tiny_llava_folder` without its weights, for a test to write its own."""

    def copy(name: str = "copy") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in tiny_llava_folder.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copy
