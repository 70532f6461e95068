"""The files of a SmolVLM in the official layout: names of tensors, settings, and a tokenizer with the released ids."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from ..models.config import ARITHMETIC, SiglipVisionConfig, SmolVLMConfig, TextConfig
from ..models.model_classes import MODEL_CLASSES
from .official_tokenizer import byte_tokenizer

TILES_A_SIDE = 4  # of the first resize
ROWS = range(1, 7)
BASE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ADDED = (
    *("<global-img>", *(f"<row_{row}_col_{column}>" for row in ROWS for column in ROWS)),
    *("<fake_token_around_image>", "<image>"),
)
END = "<end_of_utterance>"
FIRST_ADDED, IMAGE_ID, END_ID = 49152, 49190, 49279
# Our names -> the official ones.
NAMES = {
    "vision_tower.": "model.vision_model.",
    "connector.": "model.connector.modality_projection.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.text_model.",
}


@dataclass(frozen=True)
class Sizes:
    """What the decoder's shape leaves open."""

    vision: SiglipVisionConfig
    scale_factor: int


BASE = Sizes(
    SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=512, patch_size=16
    ),
    scale_factor=4,
)
LARGE = Sizes(SiglipVisionConfig(), scale_factor=3)


def smolvlm_config(text: TextConfig, sizes: Sizes) -> SmolVLMConfig:
    return SmolVLMConfig(text, IMAGE_ID, None, (END_ID,), sizes.vision, sizes.scale_factor)


def smolvlm_tensors(config: SmolVLMConfig) -> dict[str, torch.Size]:
    """The shapes of all tensors by their official names."""
    with torch.device("meta"):
        state = MODEL_CLASSES[SmolVLMConfig](config, "sdpa").state_dict()
    return {official_name(name): tensor.shape for name, tensor in state.items()}


def official_name(name: str) -> str:
    ours = next(prefix for prefix in NAMES if name.startswith(prefix))
    return NAMES[ours] + name.removeprefix(ours)


def smolvlm_tokenizer() -> Tokenizer:
    """The bytes, and invented words up to the vocabulary of SmolLM2; the added tokens have the released ids."""
    reserved = [f"<reserved{number}>" for number in range(END_ID - FIRST_ADDED - len(ADDED))]
    return byte_tokenizer(BASE_SPECIALS, FIRST_ADDED, (*BASE_SPECIALS, *ADDED, *reserved, END))


def smolvlm_settings(config: SmolVLMConfig) -> dict[str, dict[str, Any]]:
    """The folder's settings by file."""
    side, end = config.vision_config.image_size, config.eos_token_ids[0]
    edges = {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": TILES_A_SIDE * side}}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1, "rescale_factor": 1 / 255}
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_pad", "do_image_splitting", "do_convert_rgb"), True)
    return {
        "config.json": {
            "architectures": ["Idefics3ForConditionalGeneration"],
            "model_type": "idefics3",
            "image_token_id": config.image_token_id,
            "scale_factor": config.scale_factor,
            "tie_word_embeddings": False,
            "text_config": {"model_type": "llama", **text_fields(config.text_config)},
            "vision_config": asdict(config.vision_config),
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": end, "pad_token_id": 2},
        "preprocessor_config.json": {"image_processor_type": "Idefics3ImageProcessor", **edges, **statistics, **steps},
        "processor_config.json": {"processor_class": "Idefics3Processor", "image_seq_len": config.token_grid**2},
        "tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": END, "pad_token": "<|im_end|>"},
    }


def text_fields(config: TextConfig) -> dict[str, Any]:
    """The decoder's settings under official names."""
    ours = (*ARITHMETIC, "mrope_section", "rotary_scaling")
    return {name: value for name, value in asdict(config).items() if name not in ours}
