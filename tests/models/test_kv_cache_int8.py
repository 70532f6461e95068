"""Rows of an int8 cache, and attention to them, beside the same in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanovlm_v2drop.models import kv_cache_int8
from nanovlm_v2drop.models.kv_cache_int8 import (
    SCALE_BYTES,
    attention_with_int8_cache,
    dequantised,
    quantised,
    values_and_scales,
)

BATCH, SLOTS, HEADS, KEY_HEADS, HEAD_DIM = 3, 11, 6, 2, 16


def exact_attention(q: Tensor, key_rows: Tensor, value_rows: Tensor, seqlens: list[int]) -> Tensor:
    """One sequence and one head at a time, in float64."""
    keys, values = (dequantised(rows, torch.float64) for rows in (key_rows, value_rows))
    out = torch.empty(q.shape, dtype=torch.float64)
    for sequence, length in enumerate(seqlens):
        for head in range(q.shape[1]):
            own = sequence, slice(length), head * keys.shape[2] // q.shape[1]
            weights = (keys[own] @ q[sequence, head].double() * q.shape[-1] ** -0.5).softmax(0)
            out[sequence, head] = weights @ values[own]
    return out


def random_rows(scale: float = 1.0) -> Tensor:
    """(B, S, K, head_dim + SCALE_BYTES) in the memory order of a cache with heads first."""
    heads = scale * torch.randn(BATCH, KEY_HEADS, SLOTS, HEAD_DIM)
    return quantised(heads).transpose(1, 2)


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_value_comes_back_within_half_of_its_scale(half: list[float], dtype: torch.dtype) -> None:
    heads = torch.tensor([half + half]).to(dtype)
    rows = quantised(heads)
    values, scales = values_and_scales(rows)
    assert rows.shape == (1, 2 * len(half) + SCALE_BYTES)
    assert values.abs().max() <= 127
    error = (dequantised(rows, torch.float64) - heads.double()).abs().max()
    assert error <= 0.5 * scales.double().max() * (1 + 1e-6) + 1e-37


def test_each_head_of_each_token_has_a_scale_of_its_own() -> None:
    heads = torch.randn(5, 4, 8) * torch.logspace(-3, 3, 20).view(5, 4, 1)
    assert (dequantised(quantised(heads), torch.float32) - heads).abs().amax(-1).div(heads.abs().amax(-1)).max() < 1 / 250
    # so a process that holds some of the heads has the same rows for them
    assert torch.equal(quantised(heads[:, :2]), quantised(heads)[:, :2])


def test_the_bytes_of_a_row_are_its_values_and_a_scale() -> None:
    assert quantised(torch.randn(7, 2, 128, dtype=torch.bfloat16)).nbytes == 7 * 2 * (128 + 2)


@pytest.mark.parametrize("seqlens", [[11, 11, 11], [4, 9, 1], [7, 7, 7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_device", [False, True])
def test_attention_is_that_of_the_exact_twin(seqlens: list[int], dtype: torch.dtype, on_device: bool) -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(BATCH, HEADS, HEAD_DIM).to(dtype), random_rows(3.0), random_rows()
    lengths = torch.tensor(seqlens, dtype=torch.int32) if on_device else seqlens
    attended = attention_with_int8_cache(q, keys, values, lengths)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), exact_attention(q, keys, values, seqlens), rtol=0, atol=tolerance)


def test_heads_in_several_pieces_attend_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given_rows = torch.randn(BATCH, HEADS, HEAD_DIM), random_rows(), random_rows(), [4, 9, 1]
    whole = attention_with_int8_cache(*given_rows)
    monkeypatch.setattr(kv_cache_int8, "PIECE", 4 * 9 * HEAD_DIM)  # 4 of 6 heads, then 2
    torch.testing.assert_close(attention_with_int8_cache(*given_rows), whole, rtol=0, atol=1e-6)


def test_the_contents_of_empty_slots_do_not_matter() -> None:
    torch.manual_seed(0)
    q, keys, values = torch.randn(BATCH, HEADS, HEAD_DIM), random_rows(), random_rows()
    wanted = attention_with_int8_cache(q, keys, values, [4, 9, 1])
    keys[0, 4:], values[0, 4:], keys[2, 1:], values[2, 1:] = 0, 0, 0, 0
    assert torch.equal(attention_with_int8_cache(q, keys, values, [4, 9, 1]), wanted)
