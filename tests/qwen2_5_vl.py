"""A tiny random Qwen2.5-VL, made by transformers and laid out as the hub lays out its checkpoints.

Everything that is as in Qwen2-VL comes from tests/qwen2vl.py.
"""

from pathlib import Path
from typing import Any

import qwen2vl
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm_v2drop.loading.zoo import VisionLanguageModel
from nanovlm_v2drop.processing.prompts import Request

TOKENS_PER_SECOND = 2
# Windows of 2 x 2 vision tokens.
TOWER = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 4,
    "out_hidden_size": qwen2vl.TEXT["hidden_size"],
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": TOKENS_PER_SECOND,
}


def qwen2_5_vl_reference(tokenizer: Tokenizer, tie_word_embeddings: bool = False, **tower: Any) -> Any:
    """transformers' Qwen2.5-VL: 6 layers with grouped queries, 4 blocks in the tower, weights so large that each matters."""
    return qwen2vl.reference("Qwen2_5_VL", {**TOWER, **tower}, tokenizer, tie_word_embeddings)


def hub_config(official: Any) -> dict[str, Any]:
    """config.json as Qwen wrote it: flat, with a complete section for the tower."""
    stored = {name: getattr(official.config.vision_config, name) for name in TOWER}
    return {
        **qwen2vl.hub_config(official),
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": {
            **stored,
            "hidden_act": "silu",
            "in_chans": 3,
            "patch_size": qwen2vl.PATCH_SIZE,
            "spatial_patch_size": qwen2vl.PATCH_SIZE,
            "spatial_merge_size": qwen2vl.MERGE_SIZE,
            "temporal_patch_size": 2,
        },
    }


def write_qwen2_5_vl_folder(folder: Path, official: Any, tokenizer: Tokenizer) -> Path:
    """A checkpoint in the layout of Qwen's repositories, float32."""
    return qwen2vl.write_qwen2vl_folder(folder, official, tokenizer, hub_config(official))


def official_inputs(vlm: VisionLanguageModel, request: Request, seconds: float) -> dict[str, Tensor]:
    """What transformers' forward takes; the pairs of frames of every video lie `seconds` apart."""
    inputs = qwen2vl.official_inputs(vlm, request)
    if "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = torch.full((len(inputs["video_grid_thw"]),), seconds)
    return inputs
