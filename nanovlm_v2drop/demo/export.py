"""The last step of train.py: write a trained demo in its family's official layout, in float16 and with the hub's names."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..loading.files import write_safetensors
from ..models.config import ARITHMETIC, LlavaConfig
from ..models.vlm import LlavaModel, LlavaOnevisionModel
from ..processing.images import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from ..processing.images_onevision import SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from .data import VISION


def export_llava(model: LlavaModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write the files that llava-hf publishes for LLaVA-1.5."""
    tensors = official_tensors(model)
    write_folder(output, {**unused_tensors(tensors), **tensors}, tokenizer, llava_settings(model.config, tokenizer))


def export_onevision(model: LlavaOnevisionModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write the files that llava-hf publishes for LLaVA-OneVision, with the tower's last norm, which is never used."""
    norm, width = "vision_tower.vision_model.post_layernorm.", VISION.hidden_size
    unused = {f"{norm}weight": torch.ones(width).half(), f"{norm}bias": torch.zeros(width).half()}
    tensors = official_tensors(model)
    settings = onevision_settings(tokenizer, len(tensors["language_model.lm_head.weight"]))
    write_folder(output, {**unused, **tensors}, tokenizer, settings)


def write_folder(output: Path, tensors: dict[str, Tensor], tokenizer: Tokenizer, settings: dict[str, dict[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, output / "model.safetensors")
    tokenizer.save(str(output / "tokenizer.json"))
    for name, content in settings.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def official_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {official_name(name): value.half().contiguous() for name, value in model.state_dict().items()}


def official_name(name: str) -> str:
    """The name under which llava-hf stores our parameter."""
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        return name if inner.startswith("lm_head") else f"language_model.model.{inner}"
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def unused_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the layout that LLaVA never uses: the tower's last block, here zeros, and the norm behind it."""
    tower, last = "vision_tower.vision_model.", VISION.num_hidden_layers - 1
    first_block = f"{tower}encoder.layers.0."
    block = {
        name.replace(".layers.0.", f".layers.{last}."): torch.zeros_like(value)
        for name, value in tensors.items()
        if name.startswith(first_block)
    }
    norm, width = f"{tower}post_layernorm.", VISION.hidden_size
    return {**block, f"{norm}weight": torch.ones(width).half(), f"{norm}bias": torch.zeros(width).half()}


def llava_settings(config: LlavaConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """config.json and the other settings files, as in llava-hf/llava-1.5-7b-hf."""
    pad = tokenizer.get_vocab()["<pad>"]
    return {
        "config.json": llava_config(config, pad),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": config.eos_token_ids[0], "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "model_max_length": config.text_config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": llava_preprocessor(config.vision_config.image_size),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": VISION.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    }


def llava_config(config: LlavaConfig, pad: int) -> dict[str, Any]:
    text = {**asdict(config.text_config), "model_type": "llama", "torch_dtype": "float16"}
    derived = (*ARITHMETIC, "mrope_section")  # ours, not Hugging Face's
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "text_config": {name: value for name, value in text.items() if name not in derived},
        "torch_dtype": "float16",
        "vision_config": {**asdict(config.vision_config), "model_type": "clip_vision_model"},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default",
    }


def llava_preprocessor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": list(CLIP_IMAGE_MEAN),
        "image_std": list(CLIP_IMAGE_STD),
        "do_convert_rgb": True,
        "do_resize": True,
        "do_center_crop": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def onevision_settings(tokenizer: Tokenizer, vocab_size: int) -> dict[str, dict[str, Any]]:
    """config.json and the other settings files, as in llava-hf/llava-onevision-qwen2-7b-ov-hf, with the demo's sizes."""
    vocabulary = tokenizer.get_vocab()
    return {
        "config.json": onevision_config(vocabulary, vocab_size),
        "generation_config.json": {
            "eos_token_id": [vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]],
            "pad_token_id": vocabulary["<|endoftext|>"],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": onevision_text(vocab_size)["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": onevision_preprocessor(VISION.image_size),
    }


def onevision_config(vocabulary: dict[str, int], vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": vocabulary["<image>"],
        "video_token_index": vocabulary["<video>"],
        "image_grid_pinpoints": grid_pinpoints(VISION.image_size),
        "projector_hidden_act": "gelu",
        "text_config": onevision_text(vocab_size),
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": onevision_vision(),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def onevision_preprocessor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "size": {"height": size, "width": size},
        "image_grid_pinpoints": grid_pinpoints(size),
        "image_mean": list(SIGLIP_IMAGE_MEAN),
        "image_std": list(SIGLIP_IMAGE_STD),
        "do_convert_rgb": True,
        "do_pad": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def grid_pinpoints(size: int) -> list[list[int]]:
    """The tilings of LLaVA-OneVision: one or two tiles in each direction."""
    return [[rows * size, columns * size] for rows in (1, 2) for columns in (1, 2)]


def onevision_text(vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def onevision_vision() -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": VISION.hidden_size,
        "intermediate_size": VISION.intermediate_size,
        "num_hidden_layers": VISION.num_hidden_layers,
        "num_attention_heads": VISION.num_attention_heads,
        "image_size": VISION.image_size,
        "patch_size": VISION.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }
