"""Random dropping: the control that every published method has to beat.

V2Drop's own Random is not released. Both here draw once for each prompt, so that what a later drop point keeps is a subset of
what an earlier one kept, and from `seed` and the prompt's own number, so that a sample loses the same tokens in every batch
and on every device.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .base import PrefillState, Published, TokenDropper
from .schedule import DropSchedule
from .v2drop import V2Drop


class Random(TokenDropper):
    """Keep a random subset, at V2Drop's layers and shares."""

    name = "random"
    seeded = True
    published: ClassVar[Mapping[str, Published]] = V2Drop.published

    def __init__(self, schedule: DropSchedule, seed: int = 0) -> None:
        super().__init__(schedule)
        self.seed = seed

    def score(self, state: PrefillState) -> Tensor:
        prompts = zip(state.vision_grids, state.seeds, state.vision_indices.split(state.seqlens), strict=True)
        return torch.cat([self.draw(grids, seed).to(indices.device)[indices] for grids, seed, indices in prompts])

    def draw(self, grids: tuple[tuple[int, int, int], ...], prompt_seed: int) -> Tensor:
        """(count + 1,) one number for each vision token of a prompt; the last is for text, whose index is -1."""
        generator = torch.Generator().manual_seed(prompt_seed * 1_000_003 + self.seed)
        numbers = [self.draw_picture(*grid, generator) for grid in grids]
        return torch.cat([*numbers, torch.zeros(1)])

    def draw_picture(self, frames: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """(frames * rows * columns,)"""
        return torch.rand(frames * rows * columns, generator=generator)


class RandomGrid(Random):
    """Keep a random subset that is spread evenly over the picture: whatever its size, each quadrant, each quadrant of a
    quadrant and so on holds its share, give or take one token.

    Tokens are numbered by taking turns between the four quadrants of the picture, within each between its four, and so on,
    in an order that is drawn for every one of them; the first numbers are kept.
    """

    name = "random-grid"

    def draw_picture(self, frames: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        levels = (max(rows, columns) - 1).bit_length()
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        row, column = row * 2**levels // rows, column * 2**levels // columns  # places in a square of 2 ** levels
        turns = torch.zeros(frames, rows, columns)
        for level in range(levels):
            size = 2 ** (levels - level)  # of the squares whose quadrants take turns here
            order = torch.rand(frames, 4**level, 4, generator=generator).argsort(-1)
            parent = row // size * 2**level + column // size
            quadrant = row % size // (size // 2) * 2 + column % size // (size // 2)
            turns += order[:, parent, quadrant] * 4**level
        frame_turns = torch.rand(frames, generator=generator)[:, None, None]  # frames of a video take turns too
        return -(turns + frame_turns).flatten()
