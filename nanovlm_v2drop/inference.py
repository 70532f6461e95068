"""The prefill loop with its drop points, decoding, and generation.

Shapes: T tokens of all sequences packed, B sequences, D hidden_size, K key/value heads, S slots of a cache, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .dropping.base import PrefillState, TokenDropper
from .models.attention import CacheSeqlens, attention, attention_with_cache, reads_heads_first, resolve_backend
from .models.decoder import Decoder, DecoderLayer, Rotary, rotary_table
from .models.kv_cache import KVCache
from .models.vlm import PackedInputs

if TYPE_CHECKING:
    from .loading.zoo import VisionLanguageModel
    from .processing.prompts import Request

MAX_NEW_TOKENS = 64

# a layer and the new token's queries (B, H, head_dim) -> the keys and values that these may see, and the filled slots
Visible = Callable[[int, Tensor], tuple[Tensor, Tensor, CacheSeqlens]]


class NothingDropped(UserWarning):
    """A dropper was given and pictures were there, but every vision token stayed."""


@dataclass
class Prefilled:
    """What a prompt leaves behind: logits (B, V) of its last token, the cache, and who survived each drop point."""

    logits: Tensor
    cache: KVCache
    survivors: list[tuple[int, tuple[Tensor, ...]]] = field(default_factory=list)  # as `kept`, text rows as -1

    @property
    def kept(self) -> list[tuple[int, list[Tensor]]]:
        """[(layer_idx, [original numbers of the surviving vision tokens, ascending, one tensor a sequence]), ...]"""
        return [(layer_idx, [rows[rows >= 0] for rows in sequences]) for layer_idx, sequences in self.survivors]


@torch.no_grad()
def prefill(
    decoder: Decoder, packed: PackedInputs, dropper: TokenDropper | None = None, *, max_new_tokens: int = MAX_NEW_TOKENS
) -> Prefilled:
    """Run the prompts through every layer once, filling the cache; vision tokens leave at the dropper's drop points.

    Packed prompts (T, D) -> logits (B, V) of their last tokens. Layers before a drop point keep the keys of dropped tokens, so
    the cache is longer in early layers than in late ones.
    Raises ValueError for a schedule that cannot act on this decoder; warns where nothing was dropped from a picture.
    """
    backend = resolve_backend(decoder.attention, packed.inputs_embeds.device, packed.inputs_embeds.dtype)
    state = begin(decoder, packed, dropper)
    rotary = rotary_table(decoder.config, state.position_ids, state.hidden_states.dtype)
    cache = KVCache(max_new_tokens, reads_heads_first(backend))
    next_position = next_positions(state)
    positions, survivors = [], []
    layers_read = frozenset() if dropper is None else dropper.layers_read

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.fill(k, v, state.seqlens)
        state.queries, state.keys = (q, k) if state.layer_idx in layers_read else (None, None)
        return attention(q, k, v, state.seqlens, backend)

    for layer_idx, layer in enumerate(decoder.layers):
        state.layer_idx = layer_idx
        if dropper is not None and layer_idx in dropper.schedule:
            state = drop(decoder, cast(DecoderLayer, layer), dropper, state, rotary)
            rotary = rotary_table(decoder.config, state.position_ids, state.hidden_states.dtype)
            next_position = next_positions(state) if dropper.renumbers else next_position
            survivors.append((layer_idx, state.vision_indices.split(state.seqlens)))
        positions.append(next_position)
        state.previous, state.hidden_states = state.hidden_states, layer(state.hidden_states, rotary, attend)
    cache.finish(torch.stack(positions))
    if dropper is not None:
        cache.pruning = dropper.decode_pruning(state)
        warn_if_nothing_dropped(dropper, packed, state)
    return Prefilled(decoder.lm_head(decoder.norm(state.hidden_states[state.last_rows()])), cache, survivors)


def begin(decoder: Decoder, packed: PackedInputs, dropper: TokenDropper | None) -> PrefillState:
    """The state at the entrance of layer 0, which the dropper has looked at; raises ValueError as `prefill`."""
    state = agreed(decoder, replace(initial_state(packed), all_heads=decoder.all_heads))
    if dropper is None:
        return state
    dropper.schedule.check(decoder.config.num_hidden_layers, dropper.earliest_layer, dropper.latest_layer)
    return dropper.begin(state)


def drop(decoder: Decoder, layer: DecoderLayer, dropper: TokenDropper, state: PrefillState, rotary: Rotary) -> PrefillState:
    """One drop point, at the entrance of `layer`: the state that goes on, without what only the dropper was shown."""
    state.rotary, state.final_norm = rotary, decoder.norm
    state.project_next = partial(decoder.row_queries_and_keys, layer, state.hidden_states, rotary)
    return agreed(decoder, dropper(state).without_surroundings())


def warn_if_nothing_dropped(dropper: TokenDropper, packed: PackedInputs, state: PrefillState) -> None:
    """Warn with NothingDropped where all vision tokens came through to the last layer."""
    if any(packed.vision_counts) and state.vision_counts == packed.vision_counts:
        warnings.warn(
            f"{dropper.name} dropped nothing: all {sum(packed.vision_counts)} vision tokens went through all "
            f"{state.layer_idx + 1} layers with {dropper.schedule}",
            NothingDropped,
            stacklevel=3,
        )


def initial_state(packed: PackedInputs) -> PrefillState:
    """The state at the entrance of layer 0."""
    numbers = [mask.cumsum(0) - 1 for mask in packed.vision_mask.split(tuple(packed.seqlens))]
    return PrefillState(
        layer_idx=0,
        hidden_states=packed.inputs_embeds,
        previous=None,
        position_ids=packed.position_ids,
        vision_mask=packed.vision_mask,
        vision_indices=torch.cat(numbers).masked_fill(~packed.vision_mask, -1),
        seqlens=tuple(packed.seqlens),
        vision_counts=packed.vision_counts,
        prompt_vision_counts=packed.vision_counts,
        vision_grids=packed.vision_grids,
        seeds=packed.seeds,
        vision=packed.vision,
    )


def agreed(decoder: Decoder, state: PrefillState) -> PrefillState:
    """The rows that all processes of a decoder go on with: the first's, so that no rounding lets two of them keep others."""
    together = decoder.tensor_parallel
    if together is None:
        return state
    return replace(
        state,
        hidden_states=together.agreed(state.hidden_states),
        position_ids=together.agreed(state.position_ids),
        vision_mask=together.agreed(state.vision_mask),
        vision_indices=together.agreed(state.vision_indices),
        marks=None if state.marks is None else together.agreed(state.marks),
    )


def next_positions(state: PrefillState) -> Tensor:
    """(B,) one more than the largest position id of each sequence, on whichever axis."""
    return torch.stack([part.amax() for part in state.position_ids.split(state.seqlens, dim=-1)]) + 1


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
    hidden_states = decoder.embed_tokens(token_ids)  # (B, D)
    backend = resolve_backend(decoder.attention, hidden_states.device, hidden_states.dtype)
    cos, sin = rotary_table(decoder.config, cache.position_ids.flatten(), hidden_states.dtype)
    tables = zip(cos.split(len(token_ids)), sin.split(len(token_ids)), strict=True)
    for layer_idx, (layer, rotary) in enumerate(zip(decoder.layers, tables, strict=True)):

        def attend(q: Tensor, k: Tensor, v: Tensor, layer_idx: int = layer_idx) -> Tensor:
            cache.append(layer_idx, k, v)
            return attention_with_cache(q, *visible(layer_idx, q), backend)

        hidden_states = layer(hidden_states, rotary, attend)
    cache.advance_on_device()
    return decoder.lm_head(decoder.norm(hidden_states))


class GraphedSteps:
    """`decode_one_token` of one cache as a CUDA graph: launched whole, a token takes the GPU's time and not the launches'.

    Called with token ids (B,), gives logits (B, V), which the next call overwrites. Captured at the first call, and again when
    a full cache has grown. A cache whose slots are chosen for each token (`pruning`) cannot be captured.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; otherwise from the smallest set that holds `top_p` mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, V) -> (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, order = (logits.float() / self.temperature).softmax(-1).sort(descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= self.top_p  # the most likely token is never outside
        drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
        return order.gather(-1, drawn).squeeze(-1)


GREEDY = Sampling()


def decode_tokens(decoder: Decoder, prefilled: Prefilled, sampling: Sampling = GREEDY) -> Iterator[list[int]]:
    """Endless stream of the next token of every sequence; take as many as you need."""
    generator = torch.Generator(prefilled.logits.device).manual_seed(sampling.seed)
    logits, step = prefilled.logits, decode_steps(decoder, prefilled.cache)
    while True:
        token_ids = sampling.choose(logits, generator)
        yield token_ids.tolist()
        logits = step(token_ids)


def decode_until(tokens: Iterator[list[int]], eos_token_ids: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Collect every sequence up to its end-of-sequence token (included) or `max_new_tokens`."""
    sequences: list[list[int]] = []
    for step in islice(tokens, max_new_tokens):
        sequences = sequences or [[] for _ in step]
        for sequence, token in zip(sequences, step, strict=True):
            if not sequence or sequence[-1] not in eos_token_ids:
                sequence.append(token)
        if all(sequence[-1] in eos_token_ids for sequence in sequences):
            break
    return sequences


@dataclass(frozen=True)
class Answer:
    """One generated answer: its text, its token ids (end-of-sequence included), and who survived each drop point."""

    text: str
    token_ids: list[int]
    kept: list[tuple[int, Tensor]]


def generate(
    vlm: "VisionLanguageModel",
    requests: Sequence["Request"],
    dropper: TokenDropper | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """Answer all requests in one packed batch; prompts may differ in length and number of pictures."""
    check_max_new_tokens(max_new_tokens)
    decoder = vlm.model.language_model
    prefilled = prefill(decoder, vlm.prepare(requests), dropper, max_new_tokens=max_new_tokens)
    sequences = decode_until(decode_tokens(decoder, prefilled, sampling), vlm.config.eos_token_ids, max_new_tokens)
    kept = prefilled.kept
    return [
        Answer(vlm.tokenizer.decode(ids).strip(), ids, [(layer, stages[index]) for layer, stages in kept])
        for index, ids in enumerate(sequences)
    ]


def stream(
    vlm: "VisionLanguageModel",
    request: "Request",
    dropper: TokenDropper | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """The answer to one request piece by piece, as it is decoded; the pieces joined are the answer's text.

    A character is held back until all its bytes are there. (An answer that breaks off inside a character may differ from
    generate's text around it: the tokenizer decodes a run of bytes as a whole.)
    """
    check_max_new_tokens(max_new_tokens)
    decoder = vlm.model.language_model
    prefilled = prefill(decoder, vlm.prepare([request]), dropper, max_new_tokens=max_new_tokens)
    ids: list[int] = []
    text = shown = ""
    for (token,) in islice(decode_tokens(decoder, prefilled, sampling), max_new_tokens):
        ids.append(token)
        text = vlm.tokenizer.decode(ids).strip()
        if text != shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else bytes of a character are missing
            yield text[len(shown) :]
            shown = text
        if token in vlm.config.eos_token_ids:
            break
    if text != shown:  # it ended inside a character
        yield text[len(shown) :]


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Raise ValueError for less than one token."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} must be at least 1")
