"""V2Drop-plus: this project's own method. It keeps what is new in the hidden states, inside the prefill loop.

It comes from a search on the two shipped demos. There the variation that V2Drop ranks by does no better than chance in some
layers (`--ablation ranking`), so it is not used here. A token is worth keeping if it is unusual and if no more unusual token of
its frame resembles it.

1. `unusual` is 1 minus the cosine of a token's hidden state and the mean hidden state of the prompt's vision tokens.
2. `distance` is 1 minus the largest cosine with any more unusual token of the same frame, after the mean has been subtracted.
   Of several tokens that show one thing, only the most unusual one has a large distance. In a video this is so in every frame,
   so what is kept still says when a thing is there.
3. The novel tokens are those with the largest distance x unusual^power. They are kept first, up to a limit.
4. The other places go to the least unusual tokens, the background. Attention averages over the vision tokens that are left: a
   model that sees mostly objects counts too many. The limit is tighter at layer 0, where no layer has counted yet.

Cost: at each drop point one product of N x N x D for N vision tokens of width D, however many are kept. No attention, query or
key is read. The kept counts follow from the schedule, and no value comes to the host. The N x N cosines are kept in float32:
157 MB for 6,272 tokens, and about as much again while they are compared.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention import sent
from .base import PrefillState, TokenDropper, check_numbers
from .schedule import DropSchedule, layers_at_depths
from .state import MERGED

# Chosen on questions 10,000 to 10,599 of demo and 10,000 to 10,479 of demo-video, and on no other model.
NOVEL_SHARE, NOVEL_PER_FRAME = 0.3, 4  # novel tokens at layer 0: this share of the kept ones, but at least so many a frame
NOVEL_SHARE_BEHIND, NOVEL_SHARE_OF_PROMPT = 0.5, 1 / 9  # behind it: of the kept ones, but at least so many of the prompt's
POWER_AT_ENTRANCE, POWER = 1.0, 0.5  # at layer 0 and behind it
LATER_SHARE = 0.6  # kept at the second drop
TIGHT_SHARE = 0.4  # the same for a picture whose first drop is at layer 0
FEWEST = 1 / 12  # of a picture's tokens: what a first drop behind layer 0 must leave


class V2DropPlus(TokenDropper):
    """Keep the tokens that no more unusual token of their frame resembles, and enough background beside them."""

    name = "v2drop-plus"
    depths = (0.0, 1 / 4)
    leanest = (0.0, TIGHT_SHARE)

    @classmethod
    def schedule_for(cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1) -> DropSchedule:
        """Two drops. Raises OutOfReach with the method's floor.

        The first drop of a picture is as deep as the budget allows, up to a quarter of the layers: vision tokens exchange what
        belongs together there, and a drop behind it costs least. The second is at half of the depth. The first drop of a
        video, which repeats itself from frame to frame, and of a tight budget is at layer 0, the second at a quarter.
        """
        size = mean_tokens, num_vision_tokens, num_layers
        if frames > 1:
            layers = layers_at_depths(num_layers, cls.depths)
            return DropSchedule.for_mean_tokens(*size, layers=layers, leanest=(0.0, LATER_SHARE))
        middle = layers_at_depths(num_layers, (1 / 2,))[0]
        for first in range(num_layers // 4, 0, -1):
            layers_behind = middle - first + LATER_SHARE * (num_layers - middle)  # in units of what the first drop keeps
            kept = (mean_tokens * num_layers - first * num_vision_tokens) / layers_behind
            if kept >= FEWEST * num_vision_tokens:
                return DropSchedule.for_mean_tokens(*size, layers=(first, middle), leanest=(0.0, LATER_SHARE))
        return super().schedule_for(*size)

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        kept = []
        sequences = zip(state.vision_rows(), state.text_rows(), frame_numbers(state), vision_counts, strict=True)
        for index, (vision, text, frames, count) in enumerate(sequences):
            if count < len(vision):
                power = POWER if state.layer_idx else POWER_AT_ENTRANCE
                chosen = self.choose(state.hidden_states[vision], frames, count, num_novel(state, index, count), power)
                vision = vision[chosen]
            kept.append(torch.cat([text, vision]).sort().values)
        return torch.cat(kept)

    def choose(self, hidden_states: Tensor, frames: Tensor, count: int, novel: int, power: float) -> Tensor:
        """(count,) of the vision tokens (N, D) of one sequence: the `novel` most novel ones, then the least unusual."""
        hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = hidden_states.mean(0, keepdim=True)
        unusual = (1 - F.cosine_similarity(hidden_states, mean, dim=-1)).clamp(min=0)
        check_numbers(self.name, unusual)
        distance = distance_to_more_unusual(F.normalize(hidden_states - mean, dim=-1), unusual, frames)
        first = (distance * unusual**power).argsort(descending=True, stable=True)[:novel]
        return (-unusual).index_fill(0, first, torch.inf).argsort(descending=True, stable=True)[:count]


def num_novel(state: PrefillState, index: int, count: int) -> int:
    """How many of the `count` tokens that a sequence keeps are chosen by novelty: a host integer."""
    if state.layer_idx == 0:
        frames = sum(grid[0] for grid in state.vision_grids[index])
        return min(count, max(round(NOVEL_SHARE * count), NOVEL_PER_FRAME * frames))
    of_prompt = NOVEL_SHARE_OF_PROMPT * state.prompt_vision_counts[index]
    return min(count, max(1, round(of_prompt), int(NOVEL_SHARE_BEHIND * count)))


def distance_to_more_unusual(directions: Tensor, unusual: Tensor, frames: Tensor) -> Tensor:
    """(N,) 1 minus the largest cosine with a more unusual token of the same frame; 2 for the most unusual one of a frame.

    `directions` (N, D) have length 1. Of two equally unusual tokens the earlier one counts as more unusual.
    """
    order = torch.arange(len(unusual), device=unusual.device)
    earlier = (unusual == unusual[:, None]) & (order < order[:, None])
    rivals = ((unusual > unusual[:, None]) | earlier) & (frames == frames[:, None])
    cosines = (directions @ directions.T).masked_fill(~rivals, -1.0)
    return (1 - cosines.amax(-1)).clamp(min=0)


def frame_numbers(state: PrefillState) -> list[Tensor]:
    """The number of the frame, picture, tile or newline that each vision token of a sequence is of, one tensor a sequence.

    A token that an earlier method of a chain has made is of the frame of the token before it, or else behind it.
    """
    numbers = []
    for grids, vision in zip(state.vision_grids, state.vision_rows(), strict=True):
        sizes = [prod(grid[1:]) for grid in grids for _ in range(grid[0])]
        frames = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        numbers.append(sent(frames, vision.device)[of_prompt(state.vision_indices[vision])])
    return numbers


def of_prompt(indices: Tensor) -> Tensor:
    """(N,) `vision_indices`, with that of the token before it, or else behind it, for a token that is not of the prompt."""
    known, rows = indices != MERGED, torch.arange(len(indices), device=indices.device)
    before = torch.where(known, rows, -1).cummax(0).values
    first = torch.where(known, rows, len(rows) - 1).amin() if len(rows) else rows
    return indices[torch.where(before < 0, first, before)].clamp(min=0)
