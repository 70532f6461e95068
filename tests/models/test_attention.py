"""Every back end against one naive softmax in float64, and the back end that a name means."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovlm_v2drop.models import attention as module
from nanovlm_v2drop.models.attention import BACKENDS, attention, attention_with_cache, obstacle, resolve_backend

HEAD_DIM = 8
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)])  # query heads, key/value heads


def random_heads(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, head by head and row by row: the last query stands at the last key."""
    q, k, v = q.double(), k.double(), v.double()
    groups, offset = q.shape[1] // k.shape[1], len(k) - len(q)
    rows = []
    for row in range(len(q)):
        visible = slice(0, offset + row + 1)
        for head in range(q.shape[1]):
            scores = k[visible, head // groups] @ q[row, head] / q.shape[-1] ** 0.5
            rows.append(scores.softmax(0) @ v[visible, head // groups])
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "blockwise"])
@settings(deadline=None, max_examples=40)
@given(seqlens=lengths, heads=heads)
@example(seqlens=[4, 4, 4], heads=(4, 2))  # equal lengths share one call
@example(seqlens=[5, 1, 8], heads=(4, 2))
def test_packed_attention_equals_a_naive_softmax_inside_each_sequence(
    backend: str, seqlens: list[int], heads: tuple[int, int]
) -> None:
    q, k, v = (random_heads(sum(seqlens), h, HEAD_DIM, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1])))
    parts = zip(q.split(seqlens), k.split(seqlens), v.split(seqlens), strict=True)
    wanted = torch.cat([naive_attention(*part) for part in parts])
    torch.testing.assert_close(attention(q, k, v, seqlens, backend).double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "blockwise"])
@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4), heads=heads)
@example(pairs=[(4, 3), (4, 3), (4, 0)], heads=(4, 2))
def test_queries_of_a_later_turn_see_all_earlier_keys_of_their_sequence_and_their_own_up_to_themselves(
    backend: str, pairs: list[tuple[int, int]], heads: tuple[int, int]
) -> None:
    seqlens, key_seqlens = [rows for rows, _ in pairs], [rows + earlier for rows, earlier in pairs]
    q = random_heads(sum(seqlens), heads[0], HEAD_DIM, seed=0)
    k, v = (random_heads(sum(key_seqlens), heads[1], HEAD_DIM, seed=seed) for seed in (1, 2))
    parts = zip(q.split(seqlens), k.split(key_seqlens), v.split(key_seqlens), strict=True)
    wanted = torch.cat([naive_attention(*part) for part in parts])
    attended = attention(q, k, v, seqlens, backend, key_seqlens=key_seqlens)
    torch.testing.assert_close(attended.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "blockwise"])
@settings(deadline=None, max_examples=40)
@given(seqlens=lengths)
def test_without_a_causal_mask_every_row_sees_its_whole_sequence_and_no_other(backend: str, seqlens: list[int]) -> None:
    q, k, v = (random_heads(sum(seqlens), 3, HEAD_DIM, seed=i) for i in range(3))
    sequence = torch.arange(len(seqlens)).repeat_interleave(torch.tensor(seqlens))
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    weights = scores.masked_fill(sequence[:, None] != sequence, -torch.inf).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", weights, v)
    torch.testing.assert_close(attention(q, k, v, seqlens, backend, causal=False), wanted, atol=1e-5, rtol=0)
    later = [1 + length // 2 for length in seqlens]  # the last queries of each sequence
    some, of_some = (
        torch.cat([part[-length:] for part, length in zip(rows.split(seqlens), later, strict=True)]) for rows in (q, wanted)
    )
    attended = attention(some, k, v, later, backend, causal=False, key_seqlens=seqlens)
    torch.testing.assert_close(attended, of_some, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seqlens", "calls"), [([4, 4, 4], 1), ([4, 4, 5, 4], 3), ([1, 2, 3], 3)])
def test_neighbours_of_one_length_share_a_call(monkeypatch: pytest.MonkeyPatch, seqlens: list[int], calls: int) -> None:
    made, original = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*heads: Tensor, **options: bool) -> Tensor:
        made.append(1)
        return original(*heads, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", counted)
    attention(*(random_heads(sum(seqlens), 2, HEAD_DIM, seed=i) for i in range(3)), seqlens, "sdpa")
    assert len(made) == calls


@pytest.mark.parametrize(
    ("backend", "on_device"), [("sdpa", False), ("sdpa", True), ("blockwise", False), ("blockwise", True), ("eager", False)]
)
@settings(deadline=None, max_examples=40)
@given(cache_seqlens=lengths, heads=heads, room=st.integers(0, 3))
@example(cache_seqlens=[4, 4], heads=(4, 2), room=2)
@example(cache_seqlens=[4, 4], heads=(4, 2), room=0)
@example(cache_seqlens=[1, 6, 3], heads=(4, 2), room=0)
def test_a_new_token_sees_the_filled_slots_of_its_own_cache_and_no_others(
    backend: str, on_device: bool, cache_seqlens: list[int], heads: tuple[int, int], room: int
) -> None:
    batch, slots = len(cache_seqlens), max(cache_seqlens) + room
    q = random_heads(batch, heads[0], HEAD_DIM, seed=0)
    # The values behind the filled slots are huge, so reading one of them would show.
    k_cache, v_cache = (random_heads(batch, slots, heads[1], HEAD_DIM, seed=i) * 100 for i in (1, 2))
    filled = torch.arange(slots) < torch.tensor(cache_seqlens)[:, None]
    k_cache[filled] /= 100
    v_cache[filled] /= 100
    rows = zip(q, k_cache, v_cache, cache_seqlens, strict=True)
    wanted = torch.cat([naive_attention(row[None], k[:length], v[:length]) for row, k, v, length in rows])
    given_seqlens = torch.tensor(cache_seqlens, dtype=torch.int32) if on_device else cache_seqlens
    attended = attention_with_cache(q, k_cache, v_cache, given_seqlens, backend)
    torch.testing.assert_close(attended.double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_queries_in_several_blocks_see_what_queries_in_one_see(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    seqlens = [5, 23, 16]
    q, k, v = (random_heads(sum(seqlens), h, HEAD_DIM, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1])))
    wanted, unmasked = attention(q, k, v, seqlens, "sdpa"), attention(q, k, v, seqlens, "sdpa", causal=False)
    monkeypatch.setattr(module, "QUERY_BLOCK", 8)
    torch.testing.assert_close(attention(q, k, v, seqlens, "blockwise"), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(attention(q, k, v, seqlens, "blockwise", causal=False), unmasked, atol=1e-6, rtol=0)
    later = [4, 17, 16]  # the last queries of each sequence
    some = torch.cat([part[-length:] for part, length in zip(q.split(seqlens), later, strict=True)])
    wanted = torch.cat([part[-length:] for part, length in zip(wanted.split(seqlens), later, strict=True)])
    torch.testing.assert_close(attention(some, k, v, later, "blockwise", key_seqlens=seqlens), wanted, atol=1e-6, rtol=0)


def test_auto_on_a_cpu_is_blockwise_in_bfloat16_and_else_sdpa() -> None:
    assert resolve_backend("auto", CPU, torch.bfloat16) == "blockwise"
    assert resolve_backend("auto", CPU, torch.float32) == "sdpa"
    assert resolve_backend("sdpa", CPU, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("available", [BACKENDS, ("varlen", "sdpa", "eager"), ("sdpa", "eager")])
def test_auto_takes_the_first_back_end_that_can_run(available: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "obstacle", lambda backend, *_: None if backend in available else "it is not there")
    resolve_backend.cache_clear()
    assert resolve_backend("auto", CUDA, torch.bfloat16) == available[0]
    resolve_backend.cache_clear()


@pytest.mark.parametrize("backend", ["flash-attn", "varlen"])
@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, torch.bfloat16, "it needs a CUDA device, not cpu; use auto or sdpa"),
        (CUDA, torch.float32, r"it needs float16 or bfloat16, not torch\.float32"),
    ],
)
def test_a_back_end_that_cannot_run_is_refused_with_the_reason(
    backend: str, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"attention back end '{backend}' cannot run: {reason}"):
        resolve_backend(backend, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float32), (CPU, torch.float16), (CUDA, torch.bfloat16)])
def test_blockwise_is_refused_where_it_is_no_gain(device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"it is for bfloat16 on a CPU, not {dtype} on {device}"):
        resolve_backend("blockwise", device, dtype)


def test_a_missing_package_and_an_old_torch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    module.varlen_accepts.cache_clear()
    with pytest.raises(ValueError, match="the package flash-attn is not installed"):
        resolve_backend("flash-attn", CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch .* has no varlen_attn with enable_gqa"):
        resolve_backend("varlen", CUDA, torch.bfloat16)
    assert module.decode_backend("varlen") == "sdpa"  # it has no seqused_k either
    module.varlen_accepts.cache_clear()


def test_flash_attention_is_for_gpus_that_can_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    refusal = "it needs a GPU of compute capability 8.0 (Ampere) or later, not Tesla T4"
    for capability, reason in [((7, 5), refusal), ((8, 0), None), ((9, 0), None)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert obstacle("varlen", CUDA, torch.float16) == reason


def test_an_unknown_back_end_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"unknown attention back end 'fast'; choose one of: auto, {', '.join(BACKENDS)}"):
        resolve_backend("fast", CPU, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seqlens", [[37, 5, 64], [16, 16]])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "sdpa"])
def test_cuda_back_ends_agree_with_sdpa_in_bfloat16(backend: str, seqlens: list[int]) -> None:
    if reason := obstacle(backend, CUDA, torch.bfloat16):
        pytest.skip(reason)
    shapes = [(sum(seqlens), heads, 64) for heads in (8, 2, 2)]
    q, k, v = (random_heads(*shape, seed=i).to(CUDA, torch.bfloat16) for i, shape in enumerate(shapes))
    for causal in (True, False):
        ours, twin = (attention(q, k, v, seqlens, name, causal=causal) for name in (backend, "sdpa"))
        torch.testing.assert_close(ours, twin, atol=2e-2, rtol=2e-2)
    later = [length // 2 + 1 for length in seqlens]
    some = torch.cat([part[-length:] for part, length in zip(q.split(seqlens), later, strict=True)])
    ours, twin = (attention(some, k, v, later, name, key_seqlens=seqlens) for name in (backend, "sdpa"))
    torch.testing.assert_close(ours, twin, atol=2e-2, rtol=2e-2)
    caches = [tensor.new_zeros(len(seqlens), max(seqlens) + 3, 2, 64) for tensor in (k, v)]
    for cache, packed in zip(caches, (k, v), strict=True):
        for slots, rows in zip(cache, packed.split(seqlens), strict=True):
            slots[: len(rows)] = rows
    ours, twin = (attention_with_cache(q[: len(seqlens)], *caches, seqlens, name) for name in (backend, "sdpa"))
    torch.testing.assert_close(ours, twin, atol=2e-2, rtol=2e-2)
