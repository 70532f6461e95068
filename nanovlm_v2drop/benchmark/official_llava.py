"""The files of a LLaVA-1.5 in the layout of llava-hf: names of tensors, settings, and a tokenizer with the released ids."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from ..loading.uninitialised import Uninitialised
from ..models.config import LlavaConfig, TextConfig, VisionConfig, VLMConfig
from ..models.vlm import LlavaModel
from .official_tokenizer import byte_tokenizer

HUB_PREFIXES = (
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
    ("vision_tower.", "vision_tower.vision_model."),
)
SPECIALS, IMAGE, PAD = ("<unk>", "<s>", "</s>"), "<image>", "<pad>"  # the first three have the ids 0, 1 and 2
IMAGE_ID = 32000  # <pad> is the next; behind it, the released vocabulary is padded
FEATURE_LAYER, LAST_LAYER = -2, -1  # LLaVA-1.5 reads the states before the last block
STATISTICS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def llava_settings(shape: TextConfig, tower: VisionConfig, feature_layer: int, image_id: int) -> dict[str, Any]:
    """The config.json of a LLaVA with this decoder and tower."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": tower.num_patches,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "vision_feature_layer": feature_layer,
        "vision_config": {"model_type": "clip_vision_model", **asdict(tower)},
        "text_config": {"model_type": "qwen2" if shape.qkv_bias else "llama", "eos_token_id": 2, **asdict(shape)},
    }


def llava_tensors(shape: TextConfig, tower: VisionConfig) -> dict[str, Tensor]:
    """All tensors on the meta device by the names of the Hub: those of our model, and those that transformers needs besides."""
    with torch.device("meta"), Uninitialised():
        config = VLMConfig.from_official(llava_settings(shape, tower, LAST_LAYER, shape.vocab_size - 1))  # all blocks
        assert isinstance(config, LlavaConfig)
        return dict(hub_tensors(LlavaModel(config)))


def hub_tensors(model: LlavaModel) -> Iterator[tuple[str, Tensor]]:
    tied = model.config.text_config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if not (tied and name.endswith("lm_head.weight")):
            old, new = next((pair for pair in HUB_PREFIXES if name.startswith(pair[0])), ("", ""))
            yield new + name.removeprefix(old), tensor
    for name in ("weight", "bias"):
        yield f"vision_tower.vision_model.post_layernorm.{name}", torch.empty(model.config.vision_config.hidden_size)


def llava_tokenizer() -> Tokenizer:
    """The bytes, and invented words up to the vocabulary of LLaMA; the special tokens have the released ids."""
    tokenizer = byte_tokenizer(SPECIALS, IMAGE_ID, (*SPECIALS, IMAGE, PAD))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def llava_files(shape: TextConfig, tower: VisionConfig) -> dict[str, dict[str, Any]]:
    """The folder's settings by file."""
    side = tower.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    pixels = {"image_processor_type": "CLIPImageProcessor", "resample": 3, **sizes, **STATISTICS, **steps}
    return {
        "config.json": llava_settings(shape, tower, FEATURE_LAYER, IMAGE_ID),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": IMAGE_ID + 1},
        "preprocessor_config.json": pixels,
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": PAD, "unk_token": "<unk>"},
    }
