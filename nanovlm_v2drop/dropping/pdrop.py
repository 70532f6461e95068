"""PyramidDrop: accelerating LVLMs via pyramid visual redundancy reduction (CVPR 2025, arXiv 2410.17247).

At the input of each stage's first layer, the vision tokens that receive most attention from the last instruction token are
kept. The attention uses that layer's own norm, queries and keys: a softmax over all keys, averaged over heads. Position ids are
renumbered without gaps after each drop, and decoded tokens continue from each layer's own length.
Source: github.com/Cooperx521/PyramidDrop, llava/model/modeling_llama_pdrop.py.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .base import PrefillState, Published, TokenDropper
from .fastv import last_row_attention
from .schedule import DropSchedule, OutOfReach, layers_at_depths


class PyramidDrop(TokenDropper):
    """Drop, stage by stage, the vision tokens that receive least attention from the end of the instruction.

    Deviations from the released code: batches are packed (in the released code, a padded batch fails without FlashAttention).
    Multimodal position ids (Qwen2-VL) keep their values, because they are places in a grid. A share is taken of the tokens that
    enter the stage (in the released code, of the prompt's tokens, so counts can differ by one). As in the released code, a drop
    point computes the next layer's key projection a second time.
    """

    name = "pdrop"
    published: ClassVar[Mapping[str, Published]] = {
        "8/16/24 lambda 0.5": Published(DropSchedule({8: 0.5, 16: 0.5, 24: 0.5})),
        "2/8/16 lambda 0.56": Published(DropSchedule({2: 0.56, 8: 0.56, 16: 0.56})),  # its author, in issue 29, for 192
        "2/8/16 lambda 0.42": Published(DropSchedule({2: 0.42, 8: 0.42, 16: 0.42})),  # 128
        "2/8/16 lambda 0.19": Published(DropSchedule({2: 0.19, 8: 0.19, 16: 0.19})),  # 64
    }
    renumbers = True
    depths = (8 / 32, 16 / 32, 24 / 32)
    early_depths = (2 / 32, 8 / 32, 16 / 32)  # the author's advice for budgets below the floor of `depths`

    @classmethod
    def schedule_for(
        cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1
    ) -> DropSchedule:
        """One share for all three stages; budgets below the floor of the default layers use those that the author advises."""
        for depths in (cls.depths, cls.early_depths):
            layers = layers_at_depths(num_layers, depths)
            schedules = [DropSchedule(dict.fromkeys(layers, step / 1000)) for step in range(1001)]
            means = [schedule.mean_tokens(num_vision_tokens, num_layers) for schedule in schedules]
            if means[0] - 0.5 <= mean_tokens <= num_vision_tokens:
                nearest = min(range(1001), key=lambda step: abs(means[step] - mean_tokens))
                return schedules[nearest]
        raise OutOfReach(
            f"a mean of {mean_tokens:g} vision tokens is out of reach: with drop layers {list(layers)} of {num_layers} and "
            f"{num_vision_tokens} vision tokens it lies between {means[0]:.1f} and {num_vision_tokens}",
            schedules[0],
        )

    def score(self, state: PrefillState) -> Tensor:
        assert state.project_next is not None
        return last_row_attention(*state.project_next(state.last_rows()), state)
