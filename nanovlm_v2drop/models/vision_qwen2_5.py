"""Qwen2.5-VL's vision tower: Qwen2-VL's with RMS norms, a gated MLP, and attention inside of windows in most blocks.

Shapes: L patches of all pictures packed, D hidden_size of the tower, H heads.

A window is a square of vision tokens of one frame; those at the right and lower edges may be smaller. Attention inside of
windows is attention inside of packed sequences, with the patches of a window next to each other. So the patches are put in
window order before the first block and back in their own order behind the last one.
Source: transformers models/qwen2_5_vl/modeling_qwen2_5_vl.py, vision_utils.py.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .attention import resolve_backend, sent
from .config import Qwen2_5_VLVisionConfig
from .decoder import GatedMLP, RMSNorm, Rotary
from .vision_qwen2 import Grid, PatchMerger, QwenVisionBlock, QwenVisionTower, frame_lengths, received_in_segments


class Qwen2_5_VLVisionTower(QwenVisionTower):
    """Packed patches to vision tokens, as QwenVisionTower."""

    config: Qwen2_5_VLVisionConfig

    def __init__(self, config: Qwen2_5_VLVisionConfig, attention: str = "auto") -> None:
        sizes = config.hidden_size, config.intermediate_size
        blocks = (QwenVisionBlock(config, RMSNorm, GatedMLP(*sizes, bias=True)) for _ in range(config.depth))
        super().__init__(config, blocks, PatchMerger(config, RMSNorm), attention)

    def run_blocks(self, hidden_states: Tensor, rotary: Rotary, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Input and output of the last block, from the embedded patches, all (L, D) in the order of the patches."""
        backend = resolve_backend(self.attention, hidden_states.device, hidden_states.dtype)
        frames, windows, forth, back = frame_lengths(grid_thw), *self.windows(grid_thw, hidden_states.device)
        hidden_states, (cos, sin) = hidden_states[forth], rotary
        before, rotary = hidden_states, (cos[forth], sin[forth])
        for index, block in enumerate(self.blocks):
            seqlens = frames if self.sees_frames(index) else windows
            before, hidden_states = hidden_states, block(hidden_states, rotary, seqlens, backend)
        return before[back], hidden_states[back]

    def received_attention(self, block_input: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        """(H, L): softmax attention that each patch receives in the last block, the mean over its frame or its window.

        All released models look at frames there. `block_input` (L, D) is the input of that block.
        """
        if self.sees_frames(self.config.depth - 1):
            return super().received_attention(block_input, grid_thw)
        windows, forth, back = self.windows(grid_thw, block_input.device)
        q, k, _ = self.last_rotated(block_input, grid_thw)
        return received_in_segments(q[forth], k[forth], windows)[:, back]

    def sees_frames(self, block_index: int) -> bool:
        """Whether attention in this block covers a whole frame."""
        return block_index in self.config.fullatt_block_indexes

    def windows(self, grid_thw: Sequence[Grid], device: torch.device) -> tuple[list[int], Tensor, Tensor]:
        """How many patches each window has, the numbers (L,) of the patches in window order, and the way back (L,)."""
        seqlens, orders, start = list[int](), list[Tensor](), 0
        for frames, rows, columns in grid_thw:
            windows = frame_windows(rows, columns, self.config.spatial_merge_size, self.config.window_side)
            starts = start + rows * columns * torch.arange(frames)[:, None]
            orders.append((starts + torch.cat(windows)).flatten())
            seqlens += [len(window) for window in windows] * frames
            start += prod((frames, rows, columns))
        order = torch.cat(orders)
        return seqlens, sent(order, device), sent(order.argsort(), device)


def frame_windows(rows: int, columns: int, merge_size: int, side: int) -> list[Tensor]:
    """The numbers of the patches of each window of a frame, row by row; a full window has `side` vision tokens on a side.

    `rows` and `columns` count patches. The patches of a vision token, which are neighbours, stay together.
    """
    tokens = torch.arange(rows * columns).view(rows // merge_size, columns // merge_size, merge_size**2)
    return [window.flatten() for band in tokens.split(side) for window in band.split(side, dim=1)]
