"""FastV: an image is worth 1/2 tokens after layer 2 (ECCV 2024, arXiv 2403.06764).

At the input of layer K the vision tokens stay that the prompt's last token attended to most in layer K - 1: softmax over all
keys, mean over heads. Position ids are kept.
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
    """Drop the vision tokens that the last token of the prompt looks at least.

    Deviations from the released codes: only the last token's row of attention is computed, so FlashAttention stays on
    (there, layer K - 1 or all layers write the whole matrix); every sample ranks its own tokens (there, sample 0 rules the
    batch); what prefill kept stays for the whole answer (the in-place version, which has no cache, chooses again for every
    token); layer K - 1 runs once (the lmms-eval version runs it twice and stores its keys twice); the kept count is truncated,
    as V2Drop's is (the version with a cache rounds it).
    """

    name = "fastv"
    published: ClassVar[Mapping[str, Published]] = {
        "K=2 R=50%": Published(DropSchedule({2: 0.5})),  # the paper's default
        "K=3 R=50%": Published(DropSchedule({3: 0.5})),  # the README's results
    }
    earliest_layer = 1  # layer 0 has no attention before it
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
