"""Prefill, decoding and conversations over an int8 cache, beside a float cache whose values were rounded one by one."""

from collections.abc import Callable

import pytest
import torch
from tiny import FAMILIES, one_prompt, pack_together, tiny_decoder, tiny_prompts
from tiny_methods import SCHEDULE, every_method, make
from torch import Tensor

from nanovlm_v2drop.dropping import DROPPERS, V2Drop
from nanovlm_v2drop.inference import GraphedSteps, decode_one_token, prefill, prefill_turn, share_prefix
from nanovlm_v2drop.inference.prefill_loop import Prefilled
from nanovlm_v2drop.models.decoder import Decoder
from nanovlm_v2drop.models.kv_cache import KVCache
from nanovlm_v2drop.models.linear_int8 import MARGIN
from nanovlm_v2drop.models.vlm import PackedInputs

every_family = pytest.mark.parametrize("family", FAMILIES)


def rounded(heads: Tensor) -> Tensor:
    """Keys or values (..., head_dim) as an int8 cache gives them back."""
    wide = heads.double()
    scale = (wide.abs().amax(-1, keepdim=True).float() * (MARGIN / 127)).bfloat16().double()
    return ((wide / scale.clamp(min=1e-300)).round() * scale).to(heads.dtype)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What makes every cache a float cache, whose keys and values are rounded when they enter it."""
    fill, append = KVCache.fill, KVCache.append

    def rounded_fill(cache: KVCache, k: Tensor, v: Tensor, seqlens: tuple[int, ...]) -> None:
        fill(cache, rounded(k), rounded(v), seqlens)

    def rounded_append(cache: KVCache, layer_idx: int, k: Tensor, v: Tensor) -> None:
        append(cache, layer_idx, rounded(k), rounded(v))

    def switch() -> None:
        monkeypatch.setattr(KVCache, "fill", rounded_fill)
        monkeypatch.setattr(KVCache, "append", rounded_append)

    return switch


def with_int8(decoder: Decoder) -> Decoder:
    decoder.kv_cache_dtype = "int8"
    return decoder


def text_turn(decoder: Decoder, *sequences: list[int]) -> PackedInputs:
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    nowhere = torch.zeros(len(tokens), dtype=torch.bool)
    return PackedInputs(decoder.embed_tokens(tokens).detach(), positions, nowhere, [len(own) for own in sequences])


def conversation(decoder: Decoder, first: PackedInputs, name: str, cut: bool) -> tuple[list[Tensor], Prefilled]:
    """The logits of a prompt, some tokens, a shorter history, a question and some tokens again, and the first prefill."""
    out = prefill(decoder, first, make(name, cut_cache=cut) if cut else make(name), max_new_tokens=2)
    count, logits = len(first.seqlens), [out.logits]
    for token in (3, 1, 4):  # the third one finds no room
        logits.append(decode_one_token(decoder, torch.full((count,), token), out.cache))
    out.cache.crop([index % 2 for index in range(count)])
    question = text_turn(decoder, *([5, 9, 2][: 1 + index] for index in range(count)))
    logits.append(prefill_turn(decoder, question, out.cache).logits)
    logits += [decode_one_token(decoder, torch.full((count,), token), out.cache) for token in (6, 5)]
    return logits, out


@every_family
@every_method
@pytest.mark.parametrize("cut", [False, True])
def test_a_conversation_of_a_batch_equals_that_over_the_rounded_twin(
    name: str, family: str, cut: bool, twin: Callable[[], None]
) -> None:
    if cut and DROPPERS[name].merges:
        pytest.skip("earlier caches have no rows for averages")
    first = pack_together(tiny_prompts(family=family))
    logits, out = conversation(with_int8(tiny_decoder(**FAMILIES[family])), first, name, cut)
    twin()
    wanted, twin_out = conversation(tiny_decoder(**FAMILIES[family]), first, name, cut)
    ours, theirs = torch.stack(logits), torch.stack(wanted)
    # The sums of both are ordered differently, so a value in the middle of two integers may be rounded to the other one.
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    assert out.cache.seqlens == twin_out.cache.seqlens
    assert torch.equal(out.cache.position_ids, twin_out.cache.position_ids)


@every_method
def test_the_first_token_and_the_kept_tokens_are_those_of_a_float_cache(name: str) -> None:
    first = pack_together(tiny_prompts())
    quantised, float_ = (prefill(decoder, first, make(name)) for decoder in (with_int8(tiny_decoder()), tiny_decoder()))
    assert torch.equal(quantised.logits, float_.logits)
    for (layer, ours), (_, theirs) in zip(quantised.kept, float_.kept, strict=True):
        assert all(map(torch.equal, ours, theirs)), layer


def test_decoded_logits_are_near_those_of_a_float_cache() -> None:
    first, outcomes = one_prompt(5, 24, 7), []
    for decoder in (with_int8(tiny_decoder()), tiny_decoder()):
        cache = prefill(decoder, first, V2Drop(SCHEDULE)).cache
        outcomes.append(torch.stack([decode_one_token(decoder, torch.tensor([token]), cache) for token in (3, 1, 4)]))
    error = (outcomes[0] - outcomes[1]).norm() / outcomes[1].norm()
    assert 0 < error < 0.05


def test_the_bytes_of_a_cache_are_values_and_scales_and_shrink_with_dropping() -> None:
    decoder, first = with_int8(tiny_decoder()), one_prompt(5, 24, 7)
    dense, dropped = (prefill(decoder, first, dropper).cache for dropper in (None, V2Drop(SCHEDULE)))
    row = 2 * 2 * (8 + 2)  # keys and values of 2 heads, each with 8 values and a scale
    assert dense.nbytes == 6 * 36 * row
    assert dropped.nbytes == sum(length for (length,) in dropped.seqlens) * row < dense.nbytes
    assert all(keys.dtype == torch.int8 for keys in dropped.keys)


def test_runs_that_share_a_prefix_decode_as_alone() -> None:
    decoder, first = with_int8(tiny_decoder()), pack_together(tiny_prompts())
    prefix = share_prefix(decoder, first, [V2Drop(SCHEDULE)])
    step = torch.tensor([3, 1, 4])
    shared = decode_one_token(decoder, step, prefill(decoder, first, V2Drop(SCHEDULE), prefix=prefix).cache)
    torch.testing.assert_close(shared, decode_one_token(decoder, step, prefill(decoder, first, V2Drop(SCHEDULE)).cache))


def test_a_decoder_in_bfloat16_decodes_near_to_one_in_float32() -> None:
    first, outcomes = one_prompt(5, 24, 7), []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = with_int8(tiny_decoder()).to(dtype)
        given = PackedInputs(first.inputs_embeds.to(dtype), first.position_ids, first.vision_mask, first.seqlens)
        outcomes.append(decode_one_token(decoder, torch.tensor([3]), prefill(decoder, given).cache).float())
    assert (outcomes[0] - outcomes[1]).norm() < 0.05 * outcomes[0].norm()


def test_a_cuda_graph_is_refused() -> None:
    decoder = with_int8(tiny_decoder())
    with pytest.raises(ValueError, match="a CUDA graph does not decode from an int8 cache; use kv_cache_dtype auto"):
        GraphedSteps(decoder, prefill(decoder, one_prompt(5, 24, 7)).cache)
