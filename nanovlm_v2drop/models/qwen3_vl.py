"""Qwen3-VL: its own tower, Qwen3 decoder, and tower features that are added behind the decoder's first layers (deepstack).

Shapes: n vision tokens of one picture or video, S levels of deepstack, D hidden_size of the decoder.
Source: transformers models/qwen3_vl/modeling_qwen3_vl.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from .config import Qwen3VLConfig
from .qwen2_vl import Qwen2VLModel
from .vision_qwen2 import multimodal_positions
from .vision_qwen3 import Qwen3VLVisionTower
from .vlm import Encoded, VisionInput


class Qwen3VLModel(Qwen2VLModel):
    """Qwen3-VL: words stand between the frames of a video and tell the time, so each frame is a grid of its own."""

    config: Qwen3VLConfig
    visual: Qwen3VLVisionTower

    def __init__(self, config: Qwen3VLConfig, attention: str = "auto") -> None:
        super().__init__(config, attention, Qwen3VLVisionTower)

    def encode(self, media: Sequence[VisionInput]) -> list[Encoded]:
        grids = [self.patch_grid(medium) for medium in media]
        block_input, output, levels = self.visual.encode_levels(self.patches(media), grids)
        counts, sizes = [medium.num_tokens for medium in media], [prod(grid) for grid in grids]
        parts = zip(media, block_input.split(sizes), self.visual.merger(output).split(counts), strict=True)
        return [replace(self.traced(*part), deepstack=own) for part, own in zip(parts, levels.split(counts), strict=True)]

    def position_ids(self, token_ids: Sequence[int], media: Sequence[VisionInput]) -> Tensor:
        frames = [(1, rows, columns) for medium in media for count, rows, columns in medium.grids for _ in range(count)]
        return multimodal_positions(token_ids, frames, self.config.vision_tokens.values())
