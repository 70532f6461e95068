"""FastV: an image is worth 1/2 tokens after layer 2 (ECCV 2024, arXiv 2403.06764).

At the input of layer K, the vision tokens that received most attention from the prompt's last token in layer K - 1 are kept.
The attention is a softmax over all keys, averaged over heads. Position ids are kept.
Source: github.com/pkunlp-icler/FastV, src/transformers (in place) and src/FastV/llava-hf (with a cache).
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..models.attention import attention_weights
from .base import PrefillState, Published, TokenDropper
from .schedule import DropSchedule


class FastV(TokenDropper):
    """Drop the vision tokens that receive least attention from the prompt's last token.

    Deviations from the released codes:
    - Only the last token's row of attention is computed, so FlashAttention stays in use. The released codes write the whole
      attention matrix in layer K - 1 or in all layers.
    - Every sample ranks its own tokens. In the released codes, sample 0 decides for the whole batch.
    - The tokens kept in prefill stay for the whole answer. The in-place version has no cache and selects again for every token.
    - Layer K - 1 runs once. The lmms-eval version runs it twice and stores its keys twice.
    - The kept count is truncated, as in V2Drop. The version with a cache rounds it.
    """

    name = "fastv"
    published: ClassVar[Mapping[str, Published]] = {
        "K=2 R=50%": Published(DropSchedule({2: 0.5})),  # the paper's default
        "K=3 R=50%": Published(DropSchedule({3: 0.5})),  # the README's results
    }
    earliest_layer = 1  # no attention exists before layer 0
    reads_attention = True
    depths = (2 / 32,)
    leanest = (0.0,)

    def score(self, state: PrefillState) -> Tensor:
        queries, keys = state.queries_and_keys()
        return last_row_attention(queries[state.last_rows()], keys, state)


def last_row_attention(queries: Tensor, keys: Tensor, state: PrefillState) -> Tensor:
    """(T,) attention of each sequence's last token, mean over heads; queries (B, H, head_dim), keys (T, K, head_dim)."""
    rows = [
        attention_weights(query[None], keys[start:end], torch.full((1,), end - start - 1, device=keys.device))[:, 0].mean(0)
        for query, (start, end) in zip(queries, state.spans, strict=True)
    ]
    return torch.cat(rows)
