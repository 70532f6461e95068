"""Decoding, one token after the other, over a cache whose layers have different lengths.

Shapes: B sequences, H query heads, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models.attention import CacheSeqlens, attention_with_cache, resolve_backend
from ..models.decoder import Decoder, rotary_table
from ..models.kv_cache import KVCache
from ..models.kv_cache_int8 import attention_with_int8_cache

# a layer and the new token's queries (B, H, head_dim) -> the keys and values that these may see, and the filled slots
Visible = Callable[[int, Tensor], tuple[Tensor, Tensor, CacheSeqlens]]


@torch.no_grad()
def decode_one_token(decoder: Decoder, token_ids: Tensor, cache: KVCache) -> Tensor:
    """Feed one token a sequence (B,) and return the logits of the next (B, V). The cache grows by one row a layer."""
    if cache.is_full:
        cache.grow()
    logits = decode_step(decoder, token_ids, cache, cache.visible)
    cache.advance()
    return logits


def decode_step(decoder: Decoder, token_ids: Tensor, cache: KVCache, visible: Visible) -> Tensor:
    """What the device does for one token: it appends to the cache, which must have room, and counts on."""
    hidden_states = decoder.widened(decoder.embed_tokens(token_ids))  # (B, D)
    backend = resolve_backend(decoder.attention, hidden_states.device, decoder.dtype)
    attention = attention_with_int8_cache if cache.is_int8 else partial(attention_with_cache, backend=backend)
    positions = cache.position_ids.flatten()
    cos, sin = rotary_table(decoder.config, positions, decoder.dtype, positions + 1)
    tables = zip(cos.split(len(token_ids)), sin.split(len(token_ids)), strict=True)
    for layer_idx, (layer, rotary) in enumerate(zip(decoder.layers, tables, strict=True)):

        def attend(q: Tensor, k: Tensor, v: Tensor, layer_idx: int = layer_idx) -> Tensor:
            cache.append(layer_idx, k, v)
            return attention(q, *visible(layer_idx, q))

        hidden_states = layer(hidden_states, rotary, attend)
    cache.advance_on_device()
    return decoder.lm_head(decoder.norm(hidden_states))


class GraphedSteps:
    """`decode_one_token` of one cache as a CUDA graph: launched whole, a token takes the GPU's time and not the launches'.

    Called with token ids (B,), gives logits (B, V), which the next call overwrites. Captured at the first call, and again when
    a full cache has grown. A cache whose slots are chosen for each token (`pruning`) cannot be captured. Raises ValueError for
    one, and for a cache in int8.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        if cache.is_int8:
            raise ValueError("a CUDA graph does not decode from an int8 cache; use kv_cache_dtype auto, or no CUDA graph")
        if cache.pruning is not None:
            raise ValueError("a method that prunes while decoding chooses slots on the host; decode it without a CUDA graph")
        self.decoder, self.cache = decoder, cache
        self.graph: torch.cuda.CUDAGraph | None = None
        self.token_ids = self.logits = torch.empty(0)  # what a replay reads and writes; made where it is captured

    @torch.no_grad()
    def __call__(self, token_ids: Tensor) -> Tensor:
        if self.cache.is_full:
            self.cache.grow()
            self.graph = None
        self.graph = self.graph or self.capture(token_ids)
        self.token_ids.copy_(token_ids)
        self.graph.replay()
        self.cache.advance()
        return self.logits

    def capture(self, token_ids: Tensor) -> torch.cuda.CUDAGraph:
        self.token_ids = token_ids.clone()
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # libraries choose their kernels in a first run, which must not be recorded
            self.step()
            self.cache.advance_on_device(-1)  # so that the first replay writes over what this run has appended
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.step()
        return graph

    def step(self) -> Tensor:
        return decode_step(self.decoder, self.token_ids, self.cache, self.cache.visible_on_device)


def decode_steps(decoder: Decoder, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """What feeds a token a sequence (B,) and gives the next logits (B, V), by a CUDA graph where `decoder.cuda_graph` asks."""
    if decoder.cuda_graph and cache.pruning is None:
        return GraphedSteps(decoder, cache)
    return partial(decode_one_token, decoder, cache=cache)
