"""Prefill of a later turn of a conversation: its tokens go through every layer once and see each layer's own cache.

Shapes: T tokens of the turn packed, B sequences, D hidden_size, H query heads, K key/value heads.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..dropping.base import PrefillState, TokenDropper
from ..models.attention import attention, resolve_backend
from ..models.decoder import Decoder, Rotary
from ..models.kv_cache import KVCache
from ..models.vlm import PackedInputs
from .prefill_loop import Prefilled, begin, drop, enter, rotary_of, warn_if_nothing_dropped


@torch.no_grad()
def prefill_turn(decoder: Decoder, packed: PackedInputs, cache: KVCache, dropper: TokenDropper | None = None) -> Prefilled:
    """Run a turn (T, D) of each sequence of a cache through every layer, and put its rows behind those of the cache.

    The rows of a turn see each layer's own cache, whose length depends on what was dropped. Their positions in a layer continue
    those of the layer; `packed.position_ids` begin at zero. Pictures of the turn are dropped like those of a first prompt: a
    method sees the rows of the turn alone, and their attention to each other. The `pruning` of the cache stays as it is.

    Raises ValueError as `prefill`, for another number of sequences than the cache has, and for a decoder that decodes by a CUDA
    graph. An error leaves the cache as it was.
    """
    check_turn(decoder, packed, cache)
    state = begin(decoder, enter(decoder, packed), dropper)
    turn, positions, survivors = KVCache(0, cache.heads_first, cache.dtype), [], []
    for layer_idx, layer in enumerate(decoder.layers):
        state.layer_idx = layer_idx
        if dropper is not None and layer_idx in dropper.schedule:
            state = drop(decoder, dropper, state, rotary_behind(decoder, cache, state), turn)
            survivors.append((layer_idx, state.vision_indices.split(state.seqlens)))
        positions.append(state.next_position)
        rotary, attend = rotary_behind(decoder, cache, state), partial(attend_behind, decoder, cache, turn, dropper, state)
        show = partial(dropper.observe, state) if dropper is not None and layer_idx in dropper.layers_observed else None
        state.advance(layer(state.hidden_states, rotary, attend, show))
    turn.finish(torch.stack(positions))
    logits = decoder.lm_head(decoder.norm(state.hidden_states[state.last_rows()]))
    warn_if_nothing_dropped(dropper, packed, state)
    cache.extend(turn)
    return Prefilled(logits, cache, survivors)


def attend_behind(
    decoder: Decoder,
    cache: KVCache,
    turn: KVCache,
    dropper: TokenDropper | None,
    state: PrefillState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Attention of a turn's rows in one layer, q (T, H, head_dim), k and v (T, K, head_dim), which are added to `turn`."""
    turn.fill(k, v, state.seqlens)
    is_read = dropper is not None and state.layer_idx in dropper.layers_read
    state.queries, state.keys = (q, k) if is_read else (None, None)
    keys, values, key_seqlens = cache.followed_by(state.layer_idx, k, v, state.seqlens)
    backend = resolve_backend(decoder.attention, q.device, decoder.dtype)
    return attention(q, keys, values, state.seqlens, backend, key_seqlens=key_seqlens)


def rotary_behind(decoder: Decoder, cache: KVCache, state: PrefillState) -> Rotary:
    """Cosines and sines of a turn's rows in the layer of `state`, behind the positions that this layer has used."""
    first = cache.position_ids[state.layer_idx]  # (B,)
    of_rows = torch.cat([own.expand(length) for own, length in zip(first, state.seqlens, strict=True)])
    shifted = replace(state, position_ids=state.position_ids + of_rows, next_position=state.next_position + first)
    return rotary_of(decoder, shifted)


def check_turn(decoder: Decoder, packed: PackedInputs, cache: KVCache) -> None:
    """Raise ValueError as `prefill_turn`."""
    check_decoder(decoder)
    if len(packed.seqlens) != len(cache.sequences):
        raise ValueError(f"the turn has {len(packed.seqlens)} sequences, but the cache has {len(cache.sequences)}")


def check_decoder(decoder: Decoder) -> None:
    """Raise ValueError for a decoder that decodes by a CUDA graph."""
    if decoder.cuda_graph:
        raise ValueError("a conversation decodes without a CUDA graph, because its cache grows; set cuda_graph to False")
