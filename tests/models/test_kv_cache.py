"""The cache alone: its bytes, and what happens where it is full or empty. The prefill loop tests what it holds."""

import pytest
import torch
from torch import Tensor

from nanovlm_v2drop.models.kv_cache import KV_CACHE_DTYPES, KVCache, filled

HEADS, HEAD_DIM = 2, 8
SEQLENS = [(5, 3), (2, 3)]  # of the layers


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def filled_cache(max_new_tokens: int, dtype: str = "auto", heads_first: bool = True) -> KVCache:
    cache = KVCache(max_new_tokens, heads_first, dtype)
    for number, seqlens in enumerate(SEQLENS):
        cache.fill(rows(sum(seqlens), number), rows(sum(seqlens), number + 9), seqlens)
    cache.finish(torch.tensor([[9, 7], [9, 7]]))
    return cache


@pytest.mark.parametrize(("dtype", "row_bytes"), [("auto", 4 * HEAD_DIM), ("int8", HEAD_DIM + 2)])
def test_the_bytes_are_those_of_the_keys_and_values_of_filled_slots(dtype: str, row_bytes: int) -> None:
    cache = filled_cache(4, dtype)
    assert [cache.nbytes_of(0), cache.nbytes_of(1)] == [2 * HEADS * row_bytes * 7, 2 * HEADS * row_bytes * 6]
    assert cache.nbytes == 2 * HEADS * row_bytes * 13


@pytest.mark.parametrize("dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_a_full_cache_grows_and_keeps_its_rows(max_new_tokens: int, heads_first: bool, dtype: str) -> None:
    cache = filled_cache(max_new_tokens, dtype, heads_first)
    held = [filled(keys, seqlens) for keys, seqlens in zip(cache.keys, cache.seqlens, strict=True)]
    for number in range(max_new_tokens + 1):
        if cache.is_full:
            assert number == max_new_tokens
            cache.grow()
        for layer_idx in range(len(SEQLENS)):
            cache.append(layer_idx, rows(2, 20 + number), rows(2, 30 + number))
        cache.advance()
        cache.advance_on_device()
    assert [keys.shape[1] for keys in cache.keys] == [max(own) + max_new_tokens + max(max_new_tokens, 1) for own in SEQLENS]
    for before, keys, seqlens in zip(held, cache.keys, cache.seqlens, strict=True):
        for own, now in zip(before, filled(keys, seqlens), strict=True):
            assert torch.equal(now[: len(own)], own)
            assert len(now) == len(own) + max_new_tokens + 1
            assert now[len(own) :].any(-1).all()
    assert cache.slots.tolist() == [list(own) for own in cache.seqlens]


def test_a_sequence_may_lose_all_its_tokens() -> None:
    cache = filled_cache(1)
    cache.crop([2, 0])
    assert cache.seqlens == [(3, 3), (0, 3)]
    assert cache.lengths.tolist() == [[4, 4], [1, 4]]
    with pytest.raises(ValueError, match=r"cannot remove \[1, 1\] tokens from sequences of \[0, 3\] tokens"):
        cache.crop(1)
