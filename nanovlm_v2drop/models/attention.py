"""Attention over packed tokens and over a key/value cache: five back ends behind one signature.

Shapes: T tokens of all sequences packed, B sequences, H query heads, K key/value heads, G = H / K queries that share a
key/value head, S slots of a cache.

`flash-attn` is the package. `varlen` is torch's own varlen_attn (CUDA). `blockwise` is for bfloat16 on CPUs, where torch's own
kernel is slow. `sdpa` runs everywhere, and the tests compare the others with it. `eager` writes out the whole attention matrix,
as the released codes of FastV and SparseVLM do, for a fair comparison of memory. A back end is chosen once, by name; a back end
that cannot run is an error and is never replaced silently.
"""

import importlib.util
import inspect
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

CacheSeqlens = Sequence[int] | Tensor  # filled slots of each sequence: host integers, or (B,) int32 on the device

BACKENDS = ("flash-attn", "varlen", "blockwise", "sdpa", "eager")  # "auto" never chooses the last one
AMPERE = (8, 0)  # the first compute capability that FlashAttention supports
QUERY_BLOCK = 320  # queries in one block of `blockwise`: smaller blocks make products slow, larger ones waste masked products
SCORES = 3_000_000  # scores in memory at once in `blockwise`: they fit into a CPU's cache between the two products


@cache
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that `name` ("auto" or one of BACKENDS) means on this device.

    "auto" is the first of BACKENDS that can run here. Raises ValueError for a named back end that cannot.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown attention back end {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    if name == "auto":
        return next(backend for backend in BACKENDS if obstacle(backend, device, dtype) is None)
    if (reason := obstacle(name, device, dtype)) is not None:
        raise ValueError(f"attention back end {name!r} cannot run: {reason}; use auto or sdpa")
    return name


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a back end cannot run, or None."""
    if backend in ("sdpa", "eager"):
        return None
    if backend == "blockwise":
        fits = device.type == "cpu" and dtype == torch.bfloat16
        return None if fits else f"it is for bfloat16 on a CPU, not {dtype} on {device.type}"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    if backend == "flash-attn" and not importlib.util.find_spec("flash_attn"):
        return "the package flash-attn is not installed"
    if backend == "varlen" and not varlen_accepts("enable_gqa"):
        return f"torch {torch.__version__} has no varlen_attn with enable_gqa"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return f"it needs a GPU of compute capability 8.0 (Ampere) or later, not {torch.cuda.get_device_name(device)}"
    return None


@cache
def varlen_accepts(argument: str) -> bool:
    """Whether the varlen_attn of this torch takes `argument`. Its signature differs between releases."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return argument in inspect.signature(varlen_attn).parameters


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Host values, copied to a device without waiting for its pending work. torch.tensor(..., device=) would wait."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def cumulative(seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens (B + 1,) int32 on `device`, computed once for all layers."""
    return sent(torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32), device)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Sequence[int],
    backend: str,
    *,
    causal: bool = True,
    key_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Attention inside each packed sequence: q (T, H, head_dim), k and v (T, K, head_dim) -> (T, H, head_dim).

    Without `causal`, as in a vision tower, every row sees its whole sequence. With `key_seqlens`, a sequence has more keys than
    queries, and its queries are those of its last keys.
    """
    key_seqlens = seqlens if key_seqlens is None else key_seqlens
    if backend == "sdpa":
        return sdpa_attention(q, k, v, seqlens, causal, key_seqlens)
    if backend in ("eager", "blockwise"):
        on_one = eager_attention if backend == "eager" else blockwise_attention
        lengths = (seqlens, key_seqlens, key_seqlens)
        parts = zip(*(packed.split(tuple(own)) for packed, own in zip((q, k, v), lengths, strict=True)), strict=True)
        return joined([on_one(q_part, k_part, v_part, causal) for q_part, k_part, v_part in parts])
    starts = (cumulative(tuple(seqlens), q.device), cumulative(tuple(key_seqlens), q.device))
    longest = (max(seqlens), max(key_seqlens))
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *starts, *longest, causal=causal)
    from torch.nn.attention.varlen import varlen_attn

    window_size, enable_gqa = (-1, 0 if causal else -1), q.shape[1] != k.shape[1]
    attended = varlen_attn(q, k, v, *starts, *longest, window_size=window_size, enable_gqa=enable_gqa)
    return cast(Tensor, attended)  # a pair only where the log-sum-exp is asked for


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts concatenated. A single part is returned as it is, because torch.cat would copy it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: Sequence[int],
    causal: bool = True,
    key_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """The back end that runs everywhere. Neighbours of equal length, such as a video's frames, share one call."""
    runs = [(*pair, len(list(run))) for pair, run in groupby(zip(seqlens, key_seqlens or seqlens, strict=True))]
    queries = q.split([length * count for length, _, count in runs])
    keys, values = (packed.split([length * count for _, length, count in runs]) for packed in (k, v))
    attended = []
    for (rows, slots, _), *part in zip(runs, queries, keys, values, strict=True):
        shapes = zip(part, (rows, slots, slots), strict=True)
        query, key, value = (packed.unflatten(0, (-1, length)).transpose(1, 2) for packed, length in shapes)
        # (count, heads, length, head_dim) each; is_causal is correct where the numbers of queries and keys are equal.
        mask = later_rows_mask(rows, slots, q.device) if causal and rows != slots else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        attended.append(out.transpose(1, 2).flatten(0, 1))
    return joined(attended)


def later_rows_mask(rows: int, slots: int, device: torch.device) -> Tensor:
    """(rows, slots) True for what the last `rows` of `slots` tokens see."""
    return torch.ones(rows, slots, dtype=torch.bool, device=device).tril_(slots - rows)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """One sequence, with all attention weights (H, T, T) in memory at once."""
    rows = torch.arange(len(k) - len(q), len(k), device=q.device)
    weights = attention_weights(q, k, rows if causal else rows.fill_(len(k) - 1)).to(v.dtype)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(q.shape[1] // k.shape[1], 1))


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """One sequence, some queries and heads at a time: batched products with all keys, or with those up to the last query.

    On a CPU in bfloat16, these products are several times faster than torch's fused kernel. Scores are rounded to the dtype
    before the softmax, as in transformers' eager attention; the softmax itself sums in float32.
    """
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # (K, T, head_dim)
    attended, earlier = torch.empty_like(q), k.shape[1] - len(q)
    for start in range(0, len(q), QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, len(q)))
        rows, visible = block.stop - start, earlier + block.stop if causal else k.shape[1]
        queries = grouped(q[block] * q.shape[-1] ** -0.5, len(k))  # (K, rows * G, head_dim)
        bias = causal_bias(rows, q) if causal else None
        at_once = max(1, SCORES // (queries.shape[1] * visible))
        heads = [slice(first, first + at_once) for first in range(0, len(k), at_once)]
        parts = [attend_to_keys(queries[some], k[some, :visible], v[some, :visible], bias) for some in heads]
        attended[block] = ungrouped(joined(parts), rows)
    return attended


def attend_to_keys(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled queries (K, R * G, head_dim) to keys and values (K, T, head_dim); `bias` (R, 1, R) is for the last R keys."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if bias is not None:
        scores.unflatten(1, (len(bias), -1))[..., -len(bias) :] += bias
    return torch.bmm(scores.softmax(-1), values)


def grouped(q: Tensor, num_key_value_heads: int) -> Tensor:
    """(R, H, head_dim) -> (K, R * G, head_dim): queries that share a key/value head are neighbours."""
    return q.unflatten(1, (num_key_value_heads, -1)).transpose(0, 1).flatten(1, 2)


def ungrouped(attended: Tensor, rows: int) -> Tensor:
    """(K, R * G, head_dim) -> (R, H, head_dim)"""
    return attended.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)


def causal_bias(rows: int, like: Tensor) -> Tensor:
    """(R, 1, R): minus infinity for keys after the query, else zero."""
    return torch.full((rows, rows), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)[:, None]


def attention_weights(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """(H, R, T) causal softmax attention of the queries q (R, H, head_dim) at `rows` (R,) to all keys k (T, K, head_dim).

    The softmax is in float32 at least. Methods that rank by attention compute only the few rows that they need.
    """
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    visible = torch.arange(len(k), device=k.device) <= rows[:, None]
    return softmax_weights(scores.masked_fill(~visible, -torch.inf), q.shape[-1])


def softmax_weights(scores: Tensor, head_dim: int) -> Tensor:
    """Attention from the products (..., K) of queries and keys, in float32 at least. It may overwrite `scores`."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(head_dim**-0.5).softmax(-1)


def attention_with_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: CacheSeqlens, backend: str) -> Tensor:
    """A new token of each sequence attends to its cache: q (B, H, head_dim), caches (B, S, K, head_dim) -> (B, H, head_dim).

    `cache_seqlens` includes the new token's own slot. As a tensor on the device, it causes no wait and no shape depends on it,
    as a CUDA graph requires. `backend` is the one of prefill; `decode_backend` gives the one that runs here.
    """
    backend = decode_backend(backend)
    if backend == "blockwise":
        return plain_attention_with_cache(q, k_cache, v_cache, cache_seqlens)
    if backend == "sdpa":
        return sdpa_attention_with_cache(q, k_cache, v_cache, cache_seqlens)
    lengths = lengths_on(q.device, cache_seqlens)
    if backend == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        return flash_attn_with_kvcache(q[:, None], k_cache, v_cache, cache_seqlens=lengths)[:, 0]
    from torch.nn.attention.varlen import varlen_attn

    batch, slots, num_key_value_heads, _ = k_cache.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    packed = (k_cache.flatten(0, 1), v_cache.flatten(0, 1), starts, starts * slots, 1, slots)
    return cast(Tensor, varlen_attn(q, *packed, seqused_k=lengths, enable_gqa=q.shape[1] != num_key_value_heads))


def plain_attention_with_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: CacheSeqlens) -> Tensor:
    """Two batched products over all slots, the empty ones included. Whole caches with heads first are read without a copy."""
    batch, _, num_key_value_heads, head_dim = k_cache.shape
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)  # (B, K, S, head_dim)
    queries = (q * head_dim**-0.5).view(batch * num_key_value_heads, -1, head_dim)  # (B * K, G, head_dim)
    scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2)).unflatten(0, (batch, -1))
    if (mask := slot_mask(cache_seqlens, keys)) is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), values.flatten(0, 1)).view_as(q)


def sdpa_attention_with_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: CacheSeqlens) -> Tensor:
    """As `attention_with_cache`. Empty slots are cut off where the host knows the lengths, and masked elsewhere."""
    if not isinstance(cache_seqlens, Tensor):
        k_cache, v_cache = k_cache[:, : max(cache_seqlens)], v_cache[:, : max(cache_seqlens)]
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    mask = slot_mask(cache_seqlens, keys)
    attended = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1]
    )
    return attended[:, :, 0]


def decode_backend(backend: str) -> str:
    """The back end of decoding when `backend` is the one of prefill."""
    if backend == "varlen":
        return "varlen" if varlen_accepts("seqused_k") else "sdpa"
    return "sdpa" if backend == "eager" else backend


def reads_heads_first(backend: str) -> bool:
    """Whether decoding is faster with all slots of a head next to each other: (B, K, S, head_dim) in memory."""
    return decode_backend(backend) in ("blockwise", "sdpa")


def slot_mask(cache_seqlens: CacheSeqlens, keys: Tensor) -> Tensor | None:
    """(B, 1, 1, S) True for the filled slots of `keys` (B, K, S, head_dim); None if the host knows that all are filled."""
    if not isinstance(cache_seqlens, Tensor) and min(cache_seqlens) == keys.shape[2]:
        return None
    lengths = lengths_on(keys.device, cache_seqlens)
    return (torch.arange(keys.shape[2], device=keys.device) < lengths[:, None])[:, None, None]


def lengths_on(device: torch.device, cache_seqlens: CacheSeqlens) -> Tensor:
    """(B,) int32"""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    return sent(torch.tensor(cache_seqlens, dtype=torch.int32), device)
