"""Qwen2-VL's vision tower, what later towers share with it, and the positions of vision tokens in its decoder.

Shapes: L patches of all pictures packed, D embed_dim, H heads, T tokens of one prompt; t, h, w are frames (groups of
temporal_patch_size pictures), rows and columns of patches.

Pictures keep their own size and are packed without padding; attention stays inside each frame. Patches come in merge order: the
four patches of one vision token are neighbours. Parameter names are the official ones below `visual.`.
Source: transformers models/qwen2_vl/modeling_qwen2_vl.py.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby, repeat
from math import prod
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention, resolve_backend, softmax_weights
from .config import Qwen2VLVisionConfig, QwenVisionConfig
from .decoder import Rotary, apply_rotary
from .vision import ACTIVATIONS

Grid = tuple[int, int, int]
Norm = Callable[..., nn.Module]

NORM_EPS = 1e-6  # the model's code fixes this and the next one; config.json has neither
ROPE_THETA = 10000.0
WEIGHTS_BYTES = 64 * 2**20  # largest size of the attention weights that `received_attention` holds at once


class PatchEmbed(nn.Module):
    """A convolution whose stride equals its kernel size. The patches are cut already, so it is one matrix product."""

    def __init__(self, config: QwenVisionConfig, bias: bool = False) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel, stride=kernel, bias=bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)  # (L, D)


class QwenVisionAttention(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, hidden_states: Tensor, rotary: Rotary, seqlens: Sequence[int], backend: str) -> Tensor:
        q, k, v = self.rotated(hidden_states, rotary)
        return self.proj(attention(q, k, v, seqlens, backend, causal=False).flatten(1))

    def rotated(self, hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, and values, (L, H, head_dim) each."""
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        # The table is float32, so the rotation is too, like the official one. In bfloat16, neighbouring positions are equal.
        return apply_rotary(q, rotary).to(v.dtype), apply_rotary(k, rotary).to(v.dtype), v


class Qwen2VLVisionMLP(nn.Module):
    def __init__(self, config: Qwen2VLVisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class QwenVisionBlock(nn.Module):
    """Attention and an MLP, each behind a norm of its own; `norm` makes one of a width and an epsilon."""

    def __init__(self, config: QwenVisionConfig, norm: Norm, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm(config.embed_dim, eps=NORM_EPS)
        self.norm2 = norm(config.embed_dim, eps=NORM_EPS)
        self.attn = QwenVisionAttention(config)
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, rotary: Rotary, seqlens: Sequence[int], backend: str) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary, seqlens, backend)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class PatchMerger(nn.Module):
    """Each square of neighbouring patches becomes one token of the decoder's width. The GELU is the exact one (erf)."""

    def __init__(self, config: QwenVisionConfig, norm: Norm) -> None:
        super().__init__()
        self.merged_size = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = norm(config.embed_dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_size, self.merged_size), nn.GELU(), nn.Linear(self.merged_size, config.out_hidden_size)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden_states).view(-1, self.merged_size))


class QwenVisionTower(nn.Module):
    """Packed patches to vision tokens. `attention` is the name of a back end, or "auto"; see attention.resolve_backend.

    Every method takes `grid_thw`: frames, rows and columns of patches of each picture or video, in order. Raises ValueError for
    grids that do not match the patches or cannot be merged.
    """

    patch_bias: ClassVar[bool] = False

    def __init__(self, config: QwenVisionConfig, blocks: Iterable[QwenVisionBlock], merger: nn.Module, attention: str) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.patch_embed = PatchEmbed(config, self.patch_bias)
        self.blocks = nn.ModuleList(blocks)
        self.merger = merger

    @property
    def last_block(self) -> QwenVisionBlock:
        return cast(QwenVisionBlock, self.blocks[-1])

    def forward(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        """(L, C * temporal_patch_size * patch_size ** 2) -> (L / spatial_merge_size ** 2, out_hidden_size)"""
        return self.merger(self.encode(pixel_values, grid_thw)[1])

    def encode(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Input and output of the last block, before the merger, (L, D) each, in the order of the patches."""
        self.check_patches(pixel_values, grid_thw)
        hidden_states = self.patch_embed(pixel_values)
        rotary = self.rotary_table(grid_thw, hidden_states.device)
        return self.run_blocks(hidden_states, rotary, grid_thw)

    def run_blocks(self, hidden_states: Tensor, rotary: Rotary, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Input and output of the last block, from the embedded patches, all (L, D)."""
        backend = resolve_backend(self.attention, hidden_states.device, hidden_states.dtype)
        seqlens, before = frame_lengths(grid_thw), hidden_states
        for block in self.blocks:
            before, hidden_states = hidden_states, block(hidden_states, rotary, seqlens, backend)
        return before, hidden_states

    def received_attention(self, block_input: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        """(H, L): softmax attention that each patch receives in the last block, the mean over all patches of its frame.

        `block_input` (L, D) is the input of that block. Queries are processed in parts, with WEIGHTS_BYTES of weights in
        memory.
        """
        q, k, _ = self.last_rotated(block_input, grid_thw)
        return received_in_segments(q, k, frame_lengths(grid_thw))

    def keys(self, block_input: Tensor, grid_thw: Sequence[Grid]) -> Tensor:
        """(H, L, head_dim): keys of the last block, rotated as in its attention, from its input (L, D)."""
        return self.last_rotated(block_input, grid_thw)[1].transpose(0, 1)

    def last_rotated(self, block_input: Tensor, grid_thw: Sequence[Grid]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (L, H, head_dim) of the last block."""
        rotary = self.rotary_table(grid_thw, block_input.device)
        return self.last_block.attn.rotated(self.last_block.norm1(block_input), rotary)

    def rotary_table(self, grid_thw: Sequence[Grid], device: torch.device) -> Rotary:
        """Cosines and sines (L, 1, head_dim) in float32: half of the angles from the row, half from the column."""
        half = self.config.embed_dim // self.config.num_heads // 2
        frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, half, 2, device=device).float() / half)
        places = torch.cat([patch_places(grid, self.config.spatial_merge_size, device) for grid in grid_thw])
        angles = (places[..., None].float() * frequencies).flatten(1)  # (L, head_dim / 2)
        angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()

    def check_patches(self, pixel_values: Tensor, grid_thw: Sequence[Grid]) -> None:
        """Raise ValueError unless the grids match the patches and every frame can be merged."""
        config = self.config
        for grid in grid_thw:
            if min(grid) < 1 or any(side % config.spatial_merge_size for side in grid[1:]):
                raise ValueError(
                    f"grid {tuple(grid)} (frames, rows, columns of patches) must be positive, and rows and columns "
                    f"multiples of spatial_merge_size {config.spatial_merge_size}; Qwen2VLImageProcessor makes such grids"
                )
        shape = (sum(map(prod, grid_thw)), config.in_channels * config.temporal_patch_size * config.patch_size**2)
        if pixel_values.shape != shape or not shape[0]:
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} must be {shape} for the grids {list(grid_thw)}")


class Qwen2VLVisionTower(QwenVisionTower):
    """Qwen2-VL's tower: layer norms, and a plain MLP. Raises ValueError for an unknown activation."""

    def __init__(self, config: Qwen2VLVisionConfig, attention: str = "auto") -> None:
        blocks = (QwenVisionBlock(config, nn.LayerNorm, Qwen2VLVisionMLP(config)) for _ in range(config.depth))
        super().__init__(config, blocks, PatchMerger(config, nn.LayerNorm), attention)


def patch_places(grid: Grid, merge_size: int, device: torch.device) -> Tensor:
    """Row and column (L, 2) of each patch of one picture or video, in merge order, the same in every frame."""
    frames, rows, columns = grid
    axes = torch.arange(rows, device=device), torch.arange(columns, device=device)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # (h, w, 2)
    squares = places.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2)
    return squares.reshape(-1, 2).repeat(frames, 1)


def frame_lengths(grid_thw: Sequence[Grid]) -> list[int]:
    """Patches of every frame of every picture, in order. Attention stays inside a frame."""
    return [rows * columns for frames, rows, columns in grid_thw for _ in range(frames)]


def received_in_segments(q: Tensor, k: Tensor, seqlens: list[int]) -> Tensor:
    """(H, L): the attention to each of the keys k (L, H, head_dim), averaged over the queries q of its packed sequence."""
    segments = zip(q.split(seqlens), k.split(seqlens), strict=True)
    return torch.cat([received_in_frame(*segment) for segment in segments], dim=-1)


def received_in_frame(q: Tensor, k: Tensor) -> Tensor:
    """(H, K): the attention to each key (K, H, head_dim), averaged over the queries (Q, H, head_dim) of one frame."""
    row_bytes = 2 * k.shape[1] * len(k) * torch.promote_types(k.dtype, torch.float32).itemsize  # scores, and their softmax
    chunks = q.split(max(1, WEIGHTS_BYTES // row_bytes))
    scores = (torch.einsum("qhd,khd->hqk", chunk, k) for chunk in chunks)
    return cast(Tensor, sum(softmax_weights(some, q.shape[-1]).sum(1) for some in scores)) / len(q)


def multimodal_positions(
    token_ids: Sequence[int], grids: Sequence[Grid], vision_token_ids: Collection[int], time_steps: Sequence[float] = ()
) -> Tensor:
    """Positions (3, T), int64, of one prompt: time, row and column (M-RoPE, Qwen2-VL paper, section 2.1).

    `grids`: frames, rows and columns of the vision tokens (after merging) of each picture or video, in prompt order. The tokens
    of a grid have ids of `vision_token_ids`, and their positions start after the last position of the text. `time_steps`: how
    far the positions of two frames lie apart, for each grid; by default 1. Text continues after the largest position so
    far. This also holds after a video, as in training and in transformers up to 4.57. transformers 5 ignores the frames there,
    and its positions are smaller where a video has more frames than rows and columns.
    Raises ValueError where a run of vision tokens does not match the next grids.
    """
    pending, steps = deque(grids), iter(time_steps or repeat(1))
    blocks, following = [torch.empty(3, 0, dtype=torch.int64)], 0
    for is_vision, length in token_runs(token_ids, vision_token_ids):
        text = torch.arange(length).expand(3, -1)
        for block in map(grid_positions, grids_of_run(length, pending), steps) if is_vision else (text,):
            blocks.append(following + block)
            following += int(block.max()) + 1
    if pending:
        raise ValueError(f"the prompt has no vision tokens for the last {len(pending)} of the grids {list(grids)}")
    return torch.cat(blocks, dim=1)


def grid_positions(grid: Grid, time_step: float = 1) -> Tensor:
    """(3, t * h * w): time, row and column of each token of one picture or video, counted from 0.

    The time of a frame is its number times `time_step`, computed in float32 and truncated, as in transformers.
    """
    frames, rows, columns = map(torch.arange, grid)
    return torch.cartesian_prod((frames * time_step).long(), rows, columns).T


def token_runs(token_ids: Sequence[int], vision_token_ids: Collection[int]) -> Iterator[tuple[bool, int]]:
    """(is vision, length) of each run. A run is one repeated vision id, or text."""
    kinds = (token if token in vision_token_ids else None for token in token_ids)
    for kind, run in groupby(kinds):
        yield kind is not None, len(list(run))


def grids_of_run(length: int, pending: deque[Grid]) -> list[Grid]:
    """Take from `pending` the grids that together fill a run of `length` vision tokens."""
    taken: list[Grid] = []
    while pending and sum(map(prod, taken)) < length:
        taken.append(pending.popleft())
    held = sum(map(prod, taken))
    if held != length:
        raise ValueError(
            f"a run of {length} vision tokens does not match the next grids {taken}, which hold {held}; repeat the vision "
            "token of each picture or video once for every vision token that it has, in the order of the grids"
        )
    return taken
