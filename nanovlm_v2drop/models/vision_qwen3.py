"""Qwen3-VL's vision tower: Qwen2-VL's with learned positions beside the rotated ones, and with results from several depths.

Shapes: L patches of all pictures packed, D hidden_size of the tower, S levels of deepstack.

The learned positions belong to a square of patches. They are interpolated linearly to the rows and columns of each picture.
Deepstack: the outputs of a few inner blocks go through mergers of their own. The decoder adds them to its vision tokens, one
level behind each of its first layers.
Source: transformers models/qwen3_vl/modeling_qwen3_vl.py, vision_utils.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import resolve_backend
from .config import Qwen3VLVisionConfig
from .vision import ACTIVATIONS
from .vision_qwen2 import NORM_EPS, Grid, QwenVisionBlock, QwenVisionTower, frame_lengths, patch_places

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of the square of learned positions around a patch


class Qwen3VLVisionMLP(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(hidden_states)))


class Qwen3VLPatchMerger(nn.Module):
    """Each square of neighbouring patches becomes one token of the decoder's width. The GELU is the exact one (erf).

    The norm acts on single patches, or on the joined patches of a token (`norm_joined`).
    """

    def __init__(self, config: Qwen3VLVisionConfig, norm_joined: bool) -> None:
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_joined = norm_joined
        self.norm = nn.LayerNorm(self.merged_size if norm_joined else config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(L, D) -> (L / spatial_merge_size ** 2, out_hidden_size)"""
        joined = hidden_states.view(-1, self.merged_size) if self.norm_joined else hidden_states
        return self.linear_fc2(F.gelu(self.linear_fc1(self.norm(joined).view(-1, self.merged_size))))


class Qwen3VLVisionTower(QwenVisionTower):
    """Packed patches to vision tokens, as QwenVisionTower, and to what deepstack adds to them."""

    config: Qwen3VLVisionConfig
    patch_bias = True

    def __init__(self, config: Qwen3VLVisionConfig, attention: str = "auto") -> None:
        blocks = (QwenVisionBlock(config, nn.LayerNorm, Qwen3VLVisionMLP(config)) for _ in range(config.depth))
        super().__init__(config, blocks, Qwen3VLPatchMerger(config, norm_joined=False), attention)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        levels = config.deepstack_visual_indexes
        self.deepstack_merger_list = nn.ModuleList(Qwen3VLPatchMerger(config, norm_joined=True) for _ in levels)

    def encode(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        return self.encode_levels(pixel_values, grid_thw)[:2]

    def encode_levels(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor, Tensor]:
        """Input and output (L, D) of the last block, and deepstack (L / spatial_merge_size ** 2, S, out_hidden_size).

        Raises ValueError as `encode`.
        """
        self.check_patches(pixel_values, grid_thw)
        hidden_states = self.patch_embed(pixel_values)
        hidden_states = hidden_states + self.learned_positions(grid_thw, hidden_states.device).to(hidden_states.dtype)
        rotary = self.rotary_table(grid_thw, hidden_states.device)
        backend = resolve_backend(self.attention, hidden_states.device, hidden_states.dtype)
        seqlens, before, mergers, levels = frame_lengths(grid_thw), hidden_states, iter(self.deepstack_merger_list), []
        for index, block in enumerate(self.blocks):
            before, hidden_states = hidden_states, block(hidden_states, rotary, seqlens, backend)
            if index in self.config.deepstack_visual_indexes:
                levels.append(next(mergers)(hidden_states))
        none = hidden_states.new_empty(len(hidden_states) // self.config.spatial_merge_size**2, 0, self.config.out_hidden_size)
        return before, hidden_states, torch.stack(levels, dim=1) if levels else none

    def learned_positions(self, grid_thw: Sequence[Grid], device: torch.device) -> Tensor:
        """(L, D), float32 at least: for each patch the mean of the four nearest learned positions, weighted by nearness."""
        parts = []
        for frames, rows, columns in grid_thw:
            places = patch_places((1, rows, columns), self.config.spatial_merge_size, device)
            (row, row_weight), (column, column_weight) = map(self.neighbours, places.unbind(1), (rows, columns))
            corners = [(row[i] * self.config.position_side + column[j], row_weight[i] * column_weight[j]) for i, j in CORNERS]
            frame = sum(self.pos_embed(numbers) * weight[:, None] for numbers, weight in corners)
            parts.append(frame.repeat(frames, 1))
        return torch.cat(parts)

    def neighbours(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The two nearest rows of the square (2, l), and their weights (2, l), for patches at `places` (l,) of `length` rows.

        The first and the last row of a picture have the first and the last row of the square. The same holds for columns.
        """
        side = self.config.position_side
        exact = places.float() * (side - 1) / max(length - 1, 1)
        low = exact.floor()
        return torch.stack([low, low + 1]).long().clamp(max=side - 1), torch.stack([1 - (exact - low), exact - low])
