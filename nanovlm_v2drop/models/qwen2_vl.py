"""Qwen2-VL and Qwen2.5-VL: a tower of their own for pictures of any size, Qwen2 decoder with multimodal positions.

Shapes: V width of the tower, D hidden_size of the decoder, n vision tokens of one picture or video.
Sources: transformers models/qwen2_vl/modeling_qwen2_vl.py, models/qwen2_5_vl/modeling_qwen2_5_vl.py. Positions behind a video
are those of version 4.57; see multimodal_positions.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .config import Qwen2_5_VLConfig, Qwen2VLConfig
from .decoder import Decoder
from .vision_qwen2 import Qwen2VLVisionTower, QwenVisionTower, multimodal_positions
from .vision_qwen2_5 import Qwen2_5_VLVisionTower
from .vlm import VLM, Encoded, VisionInput, traces_of

LARGEST_POSITION = 2**24  # up to here, float32 holds every position exactly


class Qwen2VLModel(VLM):
    """Qwen2-VL: frames of a video count 0, 1, 2, ... on the time axis."""

    config: Qwen2VLConfig

    def __init__(
        self,
        config: Qwen2VLConfig,
        attention: str = "auto",
        tower: Callable[[Any, str], QwenVisionTower] = Qwen2VLVisionTower,
    ) -> None:
        super().__init__()
        self.config = config
        self.visual = tower(config.vision_config, attention)
        self.language_model = Decoder(config.text_config, attention)

    def encode(self, media: Sequence[VisionInput]) -> list[Encoded]:
        grids = [self.patch_grid(medium) for medium in media]
        block_input, output = self.visual.encode(self.patches(media), grids)
        sizes = [prod(grid) for grid in grids]
        features = self.visual.merger(output).split([medium.num_tokens for medium in media])
        return [self.traced(*part) for part in zip(media, block_input.split(sizes), features, strict=True)]

    def patches(self, media: Sequence[VisionInput]) -> Tensor:
        """The patches of all pictures and videos on the model's device."""
        return self.on_device(torch.cat([each.pixel_values for each in media]))

    def traced(self, medium: VisionInput, block_input: Tensor, features: Tensor) -> Encoded:
        """One picture or video, from the input (patches, V) of the tower's last block and the merged features (n, D)."""
        grids = [self.patch_grid(medium)]

        def merged(values: Tensor) -> Tensor:
            """(heads, patches, ...) -> (heads, n, ...): the patches of one token are neighbours."""
            return values.unflatten(1, (medium.num_tokens, -1)).mean(2)

        def attention() -> Tensor:
            return merged(self.visual.received_attention(block_input, grids))

        def keys() -> Tensor:
            return merged(self.visual.keys(block_input, grids))

        return Encoded(features, traces_of(medium, features, attention, keys))

    def patch_grid(self, medium: VisionInput) -> tuple[int, int, int]:
        """Frames, rows and columns of patches, before merging."""
        ((frames, rows, columns),), merge = medium.grids, self.config.vision_config.spatial_merge_size
        return frames, rows * merge, columns * merge

    def position_ids(self, token_ids: Sequence[int], media: Sequence[VisionInput]) -> Tensor:
        grids = [grid for medium in media for grid in medium.grids]
        return multimodal_positions(
            token_ids, grids, self.config.vision_tokens.values(), [self.time_step(medium) for medium in media]
        )

    def time_step(self, medium: VisionInput) -> float:
        """How far the positions of two frames of a video lie apart on the time axis."""
        return 1


class Qwen2_5_VLModel(Qwen2VLModel):
    """Qwen2.5-VL: windows in the tower; a video's positions on the time axis are in steps of a fixed part of a second."""

    config: Qwen2_5_VLConfig

    def __init__(self, config: Qwen2_5_VLConfig, attention: str = "auto") -> None:
        super().__init__(config, attention, Qwen2_5_VLVisionTower)

    def time_step(self, medium: VisionInput) -> float:
        """How far the positions of two frames lie apart; raises ValueError where those of the whole video reach too far."""
        step = self.config.vision_config.tokens_per_second * medium.seconds_per_grid
        if step * medium.grids[0][0] > LARGEST_POSITION:
            raise ValueError(
                f"the frames of the video lie {medium.seconds_per_grid:g} seconds apart, too far for their positions; is the "
                "frame rate in the file right? Re-encode it, or give the frames as a list of pictures"
            )
        return step
