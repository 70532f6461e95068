"""The seam between prefill and a dropping method: what a method may see, and what every method has in common.

Shapes: T tokens of all sequences packed, B sequences, D hidden_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .schedule import DropSchedule


@dataclass
class PrefillState:
    """Everything at the entrance of layer `layer_idx`.

    `seqlens` and `vision_counts` are host integers: how many tokens stay is known beforehand, so a drop point never waits
    for the GPU. Position ids are indexed, never renumbered.
    """

    layer_idx: int
    hidden_states: Tensor  # (T, D) input of this layer
    previous: Tensor | None  # (T, D) input of the layer before; None at layer 0
    position_ids: Tensor  # (T,) or (3, T)
    vision_mask: Tensor  # (T,)
    vision_indices: Tensor  # (T,) number of a vision token among those of its prompt, before any drop; -1 for text
    seqlens: tuple[int, ...]
    vision_counts: tuple[int, ...]  # vision tokens now, one number a sequence
    prompt_vision_counts: tuple[int, ...]  # vision tokens before any drop
    seeds: tuple[int, ...]  # one number a sequence, the same in every batch

    def take(self, keep: Tensor, vision_counts: Sequence[int]) -> "PrefillState":
        """Only the rows `keep` (T',), which leave `vision_counts` vision tokens in each sequence."""
        changes = zip(self.seqlens, self.vision_counts, vision_counts, strict=True)
        return replace(
            self,
            hidden_states=self.hidden_states[keep],
            previous=None if self.previous is None else self.previous[keep],
            position_ids=self.position_ids[..., keep],
            vision_mask=self.vision_mask[keep],
            vision_indices=self.vision_indices[keep],
            seqlens=tuple(length - before + after for length, before, after in changes),
            vision_counts=tuple(vision_counts),
        )


class TokenDropper(ABC):
    """A dropping method: the schedule, the per-sequence top-k, the return to reading order, and text never leaves.

    A method overrides `score`; one that does not rank overrides `select`.
    """

    name: ClassVar[str]
    earliest_layer: ClassVar[int] = 0

    def __init__(self, schedule: DropSchedule) -> None:
        self.schedule = schedule

    @classmethod
    def official(cls) -> "TokenDropper":
        """The method with the settings of its authors' released code, where there is one."""
        raise NotImplementedError(f"{cls.__name__} has no released code to follow; give it a DropSchedule")

    @abstractmethod
    def score(self, state: PrefillState) -> Tensor:
        """(T,) one number a token, higher = keep; the numbers of text tokens are not looked at."""

    def __call__(self, state: PrefillState) -> PrefillState:
        """The state after this drop point. Where nothing leaves, it is the very same object."""
        counts = tuple(self.schedule.kept_count(state.layer_idx, current) for current in state.vision_counts)
        return state if counts == state.vision_counts else state.take(self.select(state, counts), counts)

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        """(T',) rows that stay, in reading order: all text, and the `vision_counts` best vision tokens of each sequence."""
        # Vision scores stay finite, so that no vision token can push a text token out of the top k.
        scores = self.score(state).float().nan_to_num().masked_fill(~state.vision_mask, torch.inf)
        kept, start = [], 0
        for length, before, after in zip(state.seqlens, state.vision_counts, vision_counts, strict=True):
            best = scores[start : start + length].topk(length - before + after, sorted=False).indices
            kept.append(best.sort().values + start)
            start += length
        return torch.cat(kept)
