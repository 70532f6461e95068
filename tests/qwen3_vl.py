"""A tiny random Qwen3-VL, made by transformers and laid out as the hub lays out its checkpoints; what transformers makes of it.

Everything that is as in Qwen2-VL comes from tests/qwen2vl.py. Shapes: T tokens of one prompt, D hidden_size of the decoder.
"""

from pathlib import Path
from typing import Any

import qwen2vl
from tokenizers import Tokenizer
from torch import Tensor

HEAD_DIM, MROPE_SECTION, ROPE_THETA = 24, [5, 4, 3], 5e6  # heads are wider than hidden_size / heads, sections are uneven
PATCH_SIZE = 16
# Three levels of deepstack; 5 x 5 learned positions.
TOWER = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": qwen2vl.TEXT["hidden_size"],
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 1, 3],
}
PICTURES = {
    "size": {"shortest_edge": 4096, "longest_edge": 16777216},
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": 2,
    "merge_size": qwen2vl.MERGE_SIZE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
}
VIDEOS = {
    **{name: value for name, value in PICTURES.items() if name != "image_processor_type"},
    "size": {"shortest_edge": 4096, "longest_edge": 25165824},
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def qwen3_vl_reference(tokenizer: Tokenizer, tie_word_embeddings: bool = False, **tower: Any) -> Any:
    """transformers' Qwen3-VL: 6 layers with grouped queries, 4 blocks in the tower, weights so large that each matters."""
    rope = {
        "rope_type": "default",
        "rope_theta": ROPE_THETA,
        "mrope_section": MROPE_SECTION,
        "mrope_interleaved": True,
    }
    text = {"head_dim": HEAD_DIM, "rope_parameters": rope}
    return qwen2vl.reference("Qwen3VL", {**TOWER, **tower}, tokenizer, tie_word_embeddings, **text)


def hub_tensors(official: Any) -> dict[str, Tensor]:
    """The hub's names, which are those of transformers 5; a tied head is left out."""
    tensors = {name: tensor.contiguous() for name, tensor in official.state_dict().items()}
    if official.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def hub_config(official: Any) -> dict[str, Any]:
    """config.json as Qwen wrote it: the decoder in a section of its own, with rope_scaling and rope_theta."""
    text, config = official.config.text_config, official.config
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **{name: getattr(config, name) for name in tokens},
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            **qwen2vl.TEXT,
            "attention_bias": False,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "dtype": "float32",
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": MROPE_SECTION, "rope_type": "default"},
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": config.tie_word_embeddings,
            "vocab_size": text.vocab_size,
        },
        "vision_config": {
            **{name: getattr(config.vision_config, name) for name in TOWER},
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "model_type": "qwen3_vl",
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": qwen2vl.MERGE_SIZE,
            "temporal_patch_size": 2,
        },
    }


def write_qwen3_vl_folder(folder: Path, official: Any, tokenizer: Tokenizer) -> Path:
    """A checkpoint in the layout of Qwen's repositories, float32."""
    files = {
        "config.json": hub_config(official),
        "preprocessor_config.json": PICTURES,
        "video_preprocessor_config.json": VIDEOS,
    }
    return qwen2vl.write_folder(folder, files, hub_tensors(official), tokenizer)


def decoder_inputs(official: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers' model hands to its decoder."""
    seen: list[dict[str, Any]] = []
    hook = official.model.language_model.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    official(**inputs)
    hook.remove()
    return seen[0]
