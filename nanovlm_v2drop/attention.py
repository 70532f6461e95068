"""Causal attention over packed tokens and over a key/value cache: four back ends behind one signature.

Shapes: T tokens of all sequences packed, B sequences, H query heads, K key/value heads, S slots of a cache.

`flash-attn` is the package, `varlen` is torch's own varlen_attn (CUDA), `sdpa` is the twin that runs everywhere and that the
tests compare the others with; `eager` writes out the whole attention matrix, as the released codes of FastV and SparseVLM
do, for an honest comparison of memory. A back end is chosen once and by name; one that cannot run is an error, never a quiet
replacement.
"""

import importlib.util
import inspect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("flash-attn", "varlen", "sdpa", "eager")  # the last is never chosen by "auto"


@cache
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that `name` ("auto" or one of BACKENDS) stands for on this device.

    "auto" takes the first of BACKENDS that can run here. Raises ValueError for a back end asked for by name that cannot.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown attention back end {name!r}; choose one of: auto, {', '.join(BACKENDS)}")
    obstacles = {backend: obstacle(backend, device, dtype) for backend in BACKENDS}
    if name == "auto":
        return next(backend for backend in BACKENDS if obstacles[backend] is None)
    if obstacles[name] is not None:
        raise ValueError(f"attention back end {name!r} cannot run: {obstacles[name]}; use auto or sdpa")
    return name


def obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a back end from running, or None."""
    if backend in ("sdpa", "eager"):
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {dtype}"
    if backend == "flash-attn":
        return None if importlib.util.find_spec("flash_attn") else "the package flash-attn is not installed"
    return None if varlen_accepts("enable_gqa") else f"torch {torch.__version__} has no varlen_attn with enable_gqa"


def varlen_accepts(argument: str) -> bool:
    """Whether this torch's varlen_attn takes `argument`: its signature grew between releases."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return argument in inspect.signature(varlen_attn).parameters


def cumulative(seqlens: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens (B + 1,) int32 on `device`; the copy is asynchronous where the device allows it."""
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    return cu_seqlens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cu_seqlens


def attention(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], backend: str) -> Tensor:
    """Causal attention inside each packed sequence: q (T, H, head_dim), k and v (T, K, head_dim) -> (T, H, head_dim)."""
    if backend == "sdpa":
        return sdpa_attention(q, k, v, seqlens)
    if backend == "eager":
        return eager_attention(q, k, v, seqlens)
    cu_seqlens, longest = cumulative(seqlens, q.device), max(seqlens)
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1]
    )
    return cast(Tensor, attended)  # a pair only where the log-sum-exp is asked for


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int]) -> Tensor:
    """The twin: one scaled_dot_product_attention a sequence. Equal lengths go through in one call."""
    if len(set(seqlens)) == 1:
        return sdpa_causal(*(packed.unflatten(0, (len(seqlens), -1)) for packed in (q, k, v))).flatten(0, 1)
    parts = zip(*(packed.split(tuple(seqlens)) for packed in (q, k, v)), strict=True)
    return torch.cat([sdpa_causal(*(part[None] for part in triple))[0] for triple in parts])


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, T, heads, head_dim) in and out; is_causal is safe here because queries and keys are equally many."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int]) -> Tensor:
    """Every attention weight (H, T, T) of a sequence in memory at once."""
    parts = []
    for q_part, k_part, v_part in zip(*(packed.split(tuple(seqlens)) for packed in (q, k, v)), strict=True):
        rows = torch.arange(len(q_part), device=q.device)
        weights = attention_weights(q_part, k_part, rows).to(v.dtype)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v_part.repeat_interleave(q.shape[1] // k.shape[1], 1)))
    return torch.cat(parts)


def attention_weights(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Causal softmax attention of the queries q (R, H, head_dim), which stand at `rows` (R,), to all keys k (T, K, head_dim).

    (H, R, T), softmax in float32 at least. Methods that rank by attention ask for the few rows that they rank by.
    """
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * q.shape[-1] ** -0.5
    visible = torch.arange(len(k), device=k.device) <= rows[:, None]
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def attention_with_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Sequence[int], backend: str) -> Tensor:
    """One new token a sequence looks at its whole cache: q (B, H, head_dim), caches (B, S, K, head_dim) -> (B, H, head_dim).

    `cache_seqlens`: filled slots of each sequence, the new token's own included. torch's varlen_attn has no contiguous
    cache, so "varlen" decodes through scaled_dot_product_attention; that is what `decode_backend` reports.
    """
    if decode_backend(backend) == "flash-attn":
        from flash_attn import flash_attn_with_kvcache

        lengths = torch.tensor(cache_seqlens, dtype=torch.int32, device=q.device)
        return flash_attn_with_kvcache(q[:, None], k_cache, v_cache, cache_seqlens=lengths)[:, 0]
    longest = max(cache_seqlens)
    keys, values = k_cache[:, :longest].transpose(1, 2), v_cache[:, :longest].transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        q[:, :, None], keys, values, attn_mask=slot_mask(cache_seqlens, q.device), enable_gqa=q.shape[1] != keys.shape[1]
    )
    return attended[:, :, 0]


def decode_backend(backend: str) -> str:
    """What runs in decode when `backend` runs in prefill."""
    return "flash-attn" if backend == "flash-attn" else "sdpa"


def slot_mask(cache_seqlens: Sequence[int], device: torch.device) -> Tensor | None:
    """(B, 1, 1, S) True for filled slots; None where all sequences are equally long, since then nothing is hidden."""
    if len(set(cache_seqlens)) == 1:
        return None
    lengths = torch.tensor(cache_seqlens, device=device)
    return (torch.arange(max(cache_seqlens), device=device) < lengths[:, None])[:, None, None]
