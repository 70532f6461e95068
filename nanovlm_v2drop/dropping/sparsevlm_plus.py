"""SparseVLM+: version 2.0 of SparseVLM's code (arXiv 2410.04417, December 2025).

As in SparseVLM, the attention of the raters in the previous layer ranks the vision tokens. Here, tokens are dropped and never
averaged, position ids are kept, attention is divided by the attention that rotary position alone would give, and only the heads
with most attention on the picture are used.
Source: github.com/Gumpest/SparseVLMs (USE_VERSION 2_0), llava/model/language_model/modelling_sparse_llama.py and score.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import PrefillState, Published
from .schedule import CountSchedule, DropSchedule
from .sparsevlm import RatedByText


class SparseVLMPlus(RatedByText):
    """Drop the tokens that receive least attention from the raters, corrected for position, in the heads that see the picture.

    `num_heads`: the largest number of heads. The released code uses 14; the default is the same share of the heads, 14 / 32.
    The attention of position alone is the attention logit of two constant vectors after rotation. It becomes negative at long
    distances (in LLaMA-7B, from 1707 tokens on), and so do the scores that it divides. The released method is therefore for
    short prompts. Deviations from the released code: those of SparseVLM in attention, raters and pictures. A stage that
    receives no more tokens than it keeps drops none (in the released code, always at least one).
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

    def __init__(self, schedule: DropSchedule, num_heads: int | None = None, **options: Any) -> None:
        super().__init__(schedule, **options)
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
        """The indices of the heads with most attention on the picture; `mass` (H,) is that attention."""
        share = max(1, round(len(mass) * 14 / 32))
        return mass.topk(share if self.num_heads is None else min(self.num_heads, len(mass))).indices


def gravity(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """(R, T) attention logits of vectors of ones, from the cosines and sines (R, head_dim), (T, head_dim) of their places."""
    (query_cos, query_sin), (key_cos, key_sin) = queries, keys
    return (query_cos @ key_cos.T + query_sin @ key_sin.T) * query_cos.shape[-1] ** -0.5
