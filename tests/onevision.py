"""A tiny random LLaVA-OneVision, made by transformers and laid out as llava-hf lays out its checkpoints.

Its tower reads real tiles, 384 pixels on a side and 27 x 27 patches, so that pictures are cut and counted as the released
models do it; only widths and depths are small.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import official_names
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm_v2drop.demo.data import QWEN2_SPECIALS, qwen2_tokenizer
from nanovlm_v2drop.processing.prompts import TEMPLATES

IMAGE_SIZE, PATCH_SIZE = 384, 14  # 27 x 27 patches and a rest of 6 pixels
PINPOINTS = [[height, width] for height in range(384, 2305, 384) for width in range(384, 2305, 384)]
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "vision_use_head": False,
}


def onevision_tokenizer() -> Tokenizer:
    """A tokenizer like Qwen2's tokenizer.json, trained on the templates; `<image>` and `<video>` have the last ids."""
    lines = [TEMPLATES[name]("What colour is the digit? yes no") for name in ("qwen_1_5", "qwen_hub")] * 4
    for special in QWEN2_SPECIALS:  # a special token is not built from letters
        lines = [line.replace(special, "") for line in lines]
    return qwen2_tokenizer(lines)


def onevision_reference(tokenizer: Tokenizer, **text_settings: Any) -> Any:
    """transformers' LLaVA-OneVision with weights so large that every layer matters, and nothing at zero or one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Qwen2Config(vocab_size=vocab_size(tokenizer), **TEXT, **text_settings),
        image_token_index=tokenizer.token_to_id("<image>"),
        video_token_index=tokenizer.token_to_id("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
        scale *= 2 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1  # attention that differs from a plain average
        centre = 1 if "norm" in name and name.endswith("weight") else 0
        # As large as the features around it, so that a wrong place shows.
        parameter.copy_(noise if name.endswith("image_newline") else centre + noise * scale)
    return model


def vocab_size(tokenizer: Tokenizer) -> int:
    """The number of embedding rows, which is larger than the number of tokens, as in the released models."""
    return -(-tokenizer.get_vocab_size() // 64) * 64


def onevision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names for transformers 5's parameters, written down apart from the loader's own table."""
    newline = {"image_newline": state["model.image_newline"].contiguous()}
    return newline | official_names({name: tensor for name, tensor in state.items() if name != "model.image_newline"})


def write_onevision_files(folder: Path, tokenizer: Tokenizer) -> None:
    """The files of a checkpoint folder besides config.json and weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    settings = {
        "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"},
        "generation_config.json": {"bos_token_id": eos[1], "eos_token_id": eos, "pad_token_id": eos[1]},
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_pad": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 1 / 255,
        },
    }
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))


def write_onevision_folder(folder: Path, reference: Any, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> Path:
    """A whole checkpoint folder, with the config.json that transformers saves."""
    reference.config.save_pretrained(folder)
    write_onevision_files(folder, tokenizer)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def picture(width: int, height: int) -> Image.Image:
    """Blobs of colour with noise, different at every place."""
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def frames(number: int) -> list[Image.Image]:
    """Pictures of the tower's own size."""
    return [picture(IMAGE_SIZE, IMAGE_SIZE).rotate(90 * turn).point(lambda value: value // 2) for turn in range(number)]
