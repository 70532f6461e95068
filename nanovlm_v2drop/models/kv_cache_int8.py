"""Rows of a key/value cache in int8, and the attention of a new token to them.

Each head of each token has a scale of its own: value = q * scale, q in -127 ... 127. A row holds the values of one head in int8
and behind them the scale in bfloat16: head_dim + SCALE_BYTES bytes. So a cache of such rows is a tensor like a cache of floats,
and what moves its slots moves values and scales together. vLLM calls this form int8_per_token_head.

Shapes: B sequences, H query heads, K key/value heads, S slots of a cache.
"""

import torch
from torch import Tensor

from .attention import CacheSeqlens, joined, slot_mask
from .linear import PIECE
from .linear_int8 import quantise_symmetric

SCALE_BYTES = torch.bfloat16.itemsize


def quantised(heads: Tensor) -> Tensor:
    """Keys or values (..., head_dim) -> rows (..., head_dim + SCALE_BYTES) int8; head_dim is even, as rotary embeddings need"""
    q, scale = quantise_symmetric(heads)
    return torch.cat([q, scale.bfloat16().view(torch.int8)], dim=-1)


def values_and_scales(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., head_dim + SCALE_BYTES) -> values (..., head_dim) int8 and scales (...) bfloat16, in the same memory"""
    values, scales = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    return values, scales.view(torch.bfloat16).squeeze(-1)


def dequantised(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (..., head_dim + SCALE_BYTES) -> keys or values (..., head_dim) in `dtype`"""
    values, scales = values_and_scales(rows)
    return (values.float() * scales.float()[..., None]).to(dtype)


def attention_with_int8_cache(q: Tensor, key_rows: Tensor, value_rows: Tensor, cache_seqlens: CacheSeqlens) -> Tensor:
    """As attention.attention_with_cache, q (B, H, head_dim), for rows (B, S, K, head_dim + SCALE_BYTES) of an int8 cache.

    The scales of keys multiply scores and the scales of values multiply weights, so the values are converted to float32 and
    not multiplied. Some heads at a time: what is converted stays in a CPU's cache.
    """
    if not isinstance(cache_seqlens, Tensor):
        key_rows, value_rows = key_rows[:, : max(cache_seqlens)], value_rows[:, : max(cache_seqlens)]
    batch, slots, num_key_value_heads, _ = key_rows.shape
    heads = batch * num_key_value_heads
    mask = slot_mask(cache_seqlens, key_rows.transpose(1, 2))  # (B, 1, 1, S)
    hidden = None if mask is None else ~mask[:, 0].expand(-1, num_key_value_heads, -1).reshape(heads, 1, slots)
    queries = (q.float() * q.shape[-1] ** -0.5).reshape(heads, -1, q.shape[-1])  # (B * K, G, head_dim)
    keys, values = (rows.transpose(1, 2).flatten(0, 1) for rows in (key_rows, value_rows))  # (B * K, S, ...)
    at_once = max(1, PIECE // (slots * q.shape[-1]))
    pieces = [slice(first, first + at_once) for first in range(0, heads, at_once)]
    parts = [attend(queries[own], keys[own], values[own], None if hidden is None else hidden[own]) for own in pieces]
    return joined(parts).view(q.shape).to(q.dtype)


def attend(queries: Tensor, key_rows: Tensor, value_rows: Tensor, hidden: Tensor | None) -> Tensor:
    """Scaled queries (K, G, head_dim) to rows (K, S, head_dim + SCALE_BYTES); `hidden` (K, 1, S) is True for empty slots."""
    keys, key_scales = values_and_scales(key_rows)
    values, value_scales = values_and_scales(value_rows)
    scores = torch.bmm(queries, keys.float().transpose(1, 2)).mul_(key_scales.float()[:, None])
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    return torch.bmm(scores.softmax(-1).mul_(value_scales.float()[:, None]), values.float())
