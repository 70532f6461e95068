"""SparseVLM+: version 2.0 of SparseVLM's code (arXiv 2410.04417, December 2025).

Raters as in SparseVLM, and what they attended to in the layer before ranks the vision tokens; but tokens are only dropped,
position ids are kept, attention is divided by what rotary position alone would give, and only the heads that look at the
picture most are asked.
Source: github.com/Gumpest/SparseVLMs (USE_VERSION 2_0), llava/model/language_model/modelling_sparse_llama.py and score.py.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .base import PrefillState, Published
from .schedule import CountSchedule, DropSchedule
from .sparsevlm import RatedByText


class SparseVLMPlus(RatedByText):
    """Drop what the raters look at least, position set aside, in the heads that look at the picture most.

    `num_heads`: how many heads at most, 14 in the released code; by default the share that these are of LLaVA-1.5-7B's 32.
    Position alone is the attention logit of two constant vectors after rotation. At long distances it turns negative, in
    LLaMA-7B from 1707 tokens on, and what it divides with it: as released, the method is one for short prompts.
    Deviations from the released code: attention, raters and pictures as in SparseVLM; a stage at which no more tokens arrive
    than it keeps drops none (there, always one).
    """

    name = "sparsevlm-plus"
    published: ClassVar[Mapping[str, Published]] = {
        setting: Published(CountSchedule(counts), {"num_heads": 14})
        for setting, counts in {
            "192": {3: 300, 7: 200, 16: 118},
            "128": {3: 238, 7: 108, 16: 60},
            "96": {3: 246, 7: 54, 16: 28},
            "64": {3: 66, 7: 34, 16: 20},
        }.items()
    }

    def __init__(self, schedule: DropSchedule, num_heads: int | None = None) -> None:
        super().__init__(schedule)
        if num_heads is not None and num_heads < 1:
            raise ValueError(f"num_heads {num_heads} must be at least 1")
        self.num_heads = num_heads

    def rater_weights(self, state: PrefillState, text: Tensor, start: int, end: int) -> Tensor:
        assert state.rotary is not None
        cos, sin = (table[:, 0].float() for table in state.rotary)
        alone = gravity((cos[text], sin[text]), (cos[start:end], sin[start:end]))
        return super().rater_weights(state, text, start, end) / alone

    def mean_over_heads(self, rated: Tensor, vision_mask: Tensor) -> Tensor:
        return rated[self.best_heads(rated.masked_fill(~vision_mask, 0.0).sum(1))].mean(0)

    def best_heads(self, mass: Tensor) -> Tensor:
        """Numbers of the heads with most attention on the picture, given it for each (H,)."""
        share = max(1, round(len(mass) * 14 / 32))
        return mass.topk(share if self.num_heads is None else min(self.num_heads, len(mass))).indices


def gravity(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """(R, T) attention logits of vectors of ones, given cosines and sines (R, head_dim) and (T, head_dim) of their places."""
    (query_cos, query_sin), (key_cos, key_sin) = queries, keys
    return (query_cos @ key_cos.T + query_sin @ key_sin.T) * query_cos.shape[-1] ** -0.5
