"""Random dropping: the control that every published method has to beat.

The authors of V2Drop have not released their Random. The draws here depend on `seed` and on the number of the prompt, so a
sample loses the same tokens in every batch and on every device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.attention import sent
from .base import PrefillState, Published, TokenDropper
from .schedule import DropSchedule
from .state import MERGED
from .v2drop import V2Drop


class Random(TokenDropper):
    """Keep a random subset, at V2Drop's layers and shares.

    It draws once a prompt. Averaged tokens, which an earlier method of a chain has made, have no number in the prompt: where
    there are some, it draws anew at each drop point.
    """

    name = "random"
    seeded = True
    published: ClassVar[Mapping[str, Published]] = V2Drop.published

    def __init__(self, schedule: DropSchedule, seed: int = 0, **options: Any) -> None:
        super().__init__(schedule, **options)
        self.seed = seed

    def score(self, state: PrefillState) -> Tensor:
        sequences = zip(state.vision_indices.split(state.seqlens), state.prompt_vision_counts, state.seeds, strict=True)
        return torch.cat([self.numbers_of(*sequence, state.layer_idx) for sequence in sequences])

    def numbers_of(self, indices: Tensor, prompt_count: int, prompt_seed: int, layer_idx: int) -> Tensor:
        """(R,) the random numbers of a sequence's rows with these `vision_indices`."""
        of_prompt = sent(self.draw(prompt_count, prompt_seed), indices.device)[indices.clamp(min=0)]
        of_rows = sent(self.draw(len(indices), prompt_seed + 1 + layer_idx), indices.device)
        return torch.where((indices == MERGED).any(), of_rows, of_prompt)

    def draw(self, count: int, prompt_seed: int) -> Tensor:
        """(count,) random numbers of a prompt; one unused number for a prompt without vision tokens."""
        generator = torch.Generator().manual_seed(prompt_seed * 1_000_003 + self.seed)
        return torch.rand(max(count, 1), generator=generator)


class RandomGrid(Random):
    """Keep a random subset that is spread evenly over each picture. Every token is equally likely to be kept.

    This is systematic sampling: the tokens are ordered along a curve that fills the picture quadrant by quadrant (Z-order),
    frame by frame, and every n/m-th token is taken from a random start.
    """

    name = "random-grid"

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        kept = []
        for index, (vision, text, count) in enumerate(zip(state.vision_rows(), state.text_rows(), vision_counts, strict=True)):
            places = sent(z_order(state.vision_grids[index]), vision.device)
            walk = vision[places[state.vision_indices[vision]].argsort()]
            start = self.draw(1, state.seeds[index] + state.layer_idx)
            steps = (torch.arange(count, dtype=torch.float64) + start) * len(vision) / max(count, 1)
            kept.append(torch.cat([walk[sent(steps.long(), vision.device)], text]).sort().values)
        return torch.cat(kept)


def z_order(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """(n,) place of each vision token of a prompt on the curve: interleaved bits of its row and column, pictures in order."""
    places, before = [torch.empty(0, dtype=torch.long)], 0
    for frames, rows, columns in grids:
        axes = torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")
        frame, row, column = (axis.flatten() for axis in axes)
        bits = (max(rows, columns) - 1).bit_length()
        place = frame * 4**bits
        for bit in range(bits):
            place = place + (column // 2**bit % 2) * 4**bit + (row // 2**bit % 2) * 2 * 4**bit
        places.append(place + before)
        before += frames * 4**bits
    return torch.cat(places)
