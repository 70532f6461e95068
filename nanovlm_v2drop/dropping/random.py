"""Random dropping: the control that every published method has to beat."""

import torch
from torch import Tensor

from .base import PrefillState, TokenDropper
from .schedule import DropSchedule
from .v2drop import PUBLISHED_SCHEDULES


class Random(TokenDropper):
    """Keep a random subset; what a later drop point keeps is a subset of what an earlier one kept.

    Each prompt draws one number for each of its vision tokens, once, from `seed` and the prompt's own number: the same sample
    loses the same tokens in every batch and on every device. V2Drop's own Random is not released.
    """

    name = "random"

    def __init__(self, schedule: DropSchedule, seed: int = 0) -> None:
        super().__init__(schedule)
        self.seed = seed

    @classmethod
    def official(cls) -> "Random":
        return cls(PUBLISHED_SCHEDULES["released-code"])

    def score(self, state: PrefillState) -> Tensor:
        numbers = [self.draw(count, seed) for count, seed in zip(state.prompt_vision_counts, state.seeds, strict=True)]
        indices = state.vision_indices.clamp(min=0).split(state.seqlens)
        return torch.cat([drawn.to(rows.device)[rows] for drawn, rows in zip(numbers, indices, strict=True)])

    def draw(self, count: int, prompt_seed: int) -> Tensor:
        """(count,) one number for each vision token of a prompt; one unused number for a prompt without any."""
        generator = torch.Generator().manual_seed(prompt_seed * 1_000_003 + self.seed)
        return torch.rand(max(count, 1), generator=generator)
