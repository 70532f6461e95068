"""The prefill loop with its drop points.

Shapes: T tokens of all sequences packed, B sequences, D hidden_size, K key/value heads, V vocabulary.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..dropping.base import NotANumber, PrefillState, TokenDropper
from ..dropping.budget import asked_budget
from ..dropping.contract import check_kept, is_own
from ..dropping.state import next_positions
from ..models.attention import attention, reads_heads_first, resolve_backend
from ..models.decoder import Decoder, DecoderLayer, Rotary, rotary_table
from ..models.kv_cache import KVCache
from ..models.vlm import PackedInputs

MAX_NEW_TOKENS = 64
ROWS = "rows of the layer before the drop"  # in `PrefillState.carried`


class NotFinite(NotANumber):
    """What the decoder computed is NaN or infinite; the message names the dtype and what to do."""


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


@dataclass(frozen=True)
class SharedPrefix:
    """Prompts at the entrances of some layers (0 among them) before anything has left, and the cache of the layers so far.

    Any number of `prefill` runs of the same prompts go on from here, each at the last of these layers before which its dropper
    does nothing. They decode into the same memory, so a run must be decoded before the next one is prefilled.
    """

    states: Mapping[int, PrefillState]
    cache: KVCache

    def continued(self, begun: PrefillState, dropper: TokenDropper | None) -> tuple[PrefillState, KVCache]:
        """The state of a run that the dropper has begun, where the run leaves the others, and its cache."""
        if begun.hidden_states is not self.states[0].hidden_states:  # the dropper has changed the rows before layer 0
            return begun, self.cache.first_layers(0)
        first, read = first_layer(dropper), frozenset() if dropper is None else dropper.layers_read
        own = self.states[max(layer for layer in self.states if first is None or layer <= first)]
        if own.layer_idx - 1 in read and own.queries is None:  # it was made for droppers that do not read this attention
            own = self.states[0]
        reads = own.layer_idx - 1 in read
        after = replace(
            begun,
            layer_idx=own.layer_idx,
            hidden_states=own.hidden_states,
            previous=own.previous,
            layer_output=own.layer_output,
            deepstack=own.deepstack,
            queries=own.queries if reads else None,
            keys=own.keys if reads else None,
        )
        return after, self.cache.first_layers(own.layer_idx)


def first_layer(dropper: TokenDropper | None) -> int | None:
    """The first layer that a dropper acts in: it drops there, or needs more than queries and keys of the layer before."""
    if dropper is None:
        return None
    behind_read = (layer + 1 for layer in dropper.layers_read)
    return min([*dropper.schedule, *dropper.layers_observed, *behind_read], default=None)


@torch.no_grad()
def share_prefix(
    decoder: Decoder,
    packed: PackedInputs,
    droppers: Sequence[TokenDropper | None],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> SharedPrefix:
    """Run packed prompts once through the layers that are the same for all `droppers` (None for no dropping)."""
    state, cache = enter(decoder, packed), new_cache(decoder, packed, max_new_tokens)
    rotary, states = rotary_of(decoder, state), {0: replace(state)}
    stops = {layer for layer in map(first_layer, droppers) if layer is not None}
    read = frozenset[int]().union(*(dropper.layers_read for dropper in droppers if dropper is not None))
    for layer_idx in range(min(max(stops, default=0), len(decoder.layers))):
        state.layer_idx = layer_idx
        run_layer(decoder, state, rotary, cache, reads=layer_idx in read)
        if layer_idx + 1 in stops:
            states[layer_idx + 1] = replace(state, layer_idx=layer_idx + 1)
    return SharedPrefix(states, cache)


@torch.no_grad()
def prefill(
    decoder: Decoder,
    packed: PackedInputs,
    dropper: TokenDropper | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    prefix: SharedPrefix | None = None,
    warns: bool = True,
) -> Prefilled:
    """Run packed prompts (T, D) through every layer once and fill the cache; vision tokens leave at the dropper's drop points.

    The layers that these prompts' `prefix` has run are not run again; the cache then has room for the prefix's
    `max_new_tokens`. Raises ValueError for a schedule that cannot act on this decoder; warns where nothing was dropped from a
    picture, unless `warns` is False.
    """
    if prefix is None:
        prefix = SharedPrefix({0: enter(decoder, packed)}, new_cache(decoder, packed, max_new_tokens))
    state, cache = prefix.continued(begin(decoder, prefix.states[0], dropper), dropper)
    rotary, read = rotary_of(decoder, state), frozenset() if dropper is None else dropper.layers_read
    positions, survivors = [state.next_position] * state.layer_idx, list[tuple[int, tuple[Tensor, ...]]]()
    for layer_idx in range(state.layer_idx, len(decoder.layers)):
        state.layer_idx = layer_idx
        if dropper is not None and layer_idx in dropper.schedule:
            state = drop(decoder, dropper, state, rotary, cache)
            rotary = rotary_of(decoder, state)
            survivors.append((layer_idx, state.vision_indices.split(state.seqlens)))
        positions.append(state.next_position)
        run_layer(decoder, state, rotary, cache, dropper, reads=layer_idx in read)
    cache.finish(torch.stack(positions), None if dropper is None else dropper.decode_pruning(state))
    if warns:
        warn_if_nothing_dropped(dropper, packed, state)
    return Prefilled(decoder.lm_head(decoder.norm(state.hidden_states[state.last_rows()])), cache, survivors)


def run_layer(
    decoder: Decoder,
    state: PrefillState,
    rotary: Rotary,
    cache: KVCache,
    dropper: TokenDropper | None = None,
    *,
    reads: bool = False,
) -> None:
    """Take the state through its layer, which fills the cache; with `reads`, the state gets the layer's queries and keys."""
    backend = resolve_backend(decoder.attention, state.hidden_states.device, decoder.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.fill(k, v, state.seqlens)
        state.queries, state.keys = (q, k) if reads else (None, None)
        return attention(q, k, v, state.seqlens, backend)

    shows = dropper is not None and state.layer_idx in dropper.layers_observed
    show = partial(dropper.observe, state) if dropper is not None and shows else None
    layer = decoder.layers[state.layer_idx]
    state.advance(layer(state.hidden_states, rotary, attend, show))


def new_cache(decoder: Decoder, packed: PackedInputs, max_new_tokens: int) -> KVCache:
    """An empty cache in the dtype of the decoder's caches and in the memory order that its attention reads."""
    backend = resolve_backend(decoder.attention, packed.inputs_embeds.device, decoder.dtype)
    is_int8 = decoder.kv_cache_dtype == "int8"
    return KVCache(max_new_tokens, is_int8 or reads_heads_first(backend), decoder.kv_cache_dtype)


def rotary_of(decoder: Decoder, state: PrefillState) -> Rotary:
    """Cosines and sines of the rows alive. Frequencies that follow the length go by where each sequence continues.

    That is behind the whole prompt, unless a method renumbers what it keeps.
    """
    if not decoder.config.rope_follows_length:
        return rotary_table(decoder.config, state.position_ids, decoder.dtype)
    parts = zip(state.next_position, state.seqlens, strict=True)
    lengths = torch.cat([position.expand(rows) for position, rows in parts])
    return rotary_table(decoder.config, state.position_ids, decoder.dtype, lengths)


def enter(decoder: Decoder, packed: PackedInputs) -> PrefillState:
    """The state at the entrance of layer 0, which is the same for all droppers."""
    hidden_states = decoder.widened(packed.inputs_embeds)
    return agreed(decoder, replace(initial_state(packed), hidden_states=hidden_states, all_heads=decoder.all_heads))


def begin(decoder: Decoder, entered: PrefillState, dropper: TokenDropper | None) -> PrefillState:
    """The state at the entrance of layer 0, which the dropper has looked at; raises ValueError as `prefill`."""
    state = replace(entered)
    if dropper is None:
        return state
    asked_budget(dropper, None, None)
    dropper.check(decoder.config.num_hidden_layers)
    return dropper.begin(state)


def drop(
    decoder: Decoder, dropper: TokenDropper, state: PrefillState, rotary: Rotary, cache: KVCache
) -> PrefillState:
    """The state after one drop point, at the entrance of the same layer, without the fields that only the dropper reads.

    With the dropper's `cut_cache`, the dropped rows also leave the caches of the layers so far. Raises NotFinite where the
    method ranks by numbers that are NaN, ContractBroken where it keeps wrong rows.
    """
    state.rotary, state.final_norm = rotary, decoder.norm
    layer = cast(DecoderLayer, decoder.layers[state.layer_idx])
    state.project_next = partial(decoder.row_queries_and_keys, layer, state.hidden_states, rotary)
    if dropper.cut_cache:
        rows = torch.arange(len(state.hidden_states), device=state.hidden_states.device)
        state.carried = {**state.carried, ROWS: rows}
    try:
        after = dropper(state)
    except NotANumber as error:
        raise NotFinite(f"{error}; {advice(decoder.dtype)}") from error
    if not is_own(type(dropper)):
        check_kept(dropper, state, after)
    after = agreed(decoder, after.without_surroundings())
    if dropper.cut_cache:
        cache.keep_rows(after.carried[ROWS], state.seqlens, after.seqlens)
    return after


def advice(dtype: torch.dtype) -> str:
    """What to do where activations are not finite."""
    name = str(dtype).removeprefix("torch.")
    if dtype in (torch.float32, torch.float64):
        return f"{name} holds any activation of a sound model: the weights may be damaged, or the method divides by zero"
    wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
    return f"activations beyond {name} are infinite: use another dtype, --dtype {wider}"


def warn_if_nothing_dropped(dropper: TokenDropper | None, packed: PackedInputs, state: PrefillState) -> None:
    """Warn with NothingDropped where a dropper let all vision tokens through to the last layer."""
    if dropper is not None and any(packed.vision_counts) and state.vision_counts == packed.vision_counts:
        warnings.warn(
            f"{dropper.name} dropped nothing: all {sum(packed.vision_counts)} vision tokens went through all "
            f"{state.layer_idx + 1} layers with {dropper.schedule}",
            NothingDropped,
            stacklevel=4,  # the caller of `prefill`, behind torch.no_grad
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
        next_position=next_positions(packed.position_ids, packed.seqlens),
        vision_counts=packed.vision_counts,
        prompt_vision_counts=packed.vision_counts,
        question_counts=packed.question_counts,
        vision_grids=packed.vision_grids,
        seeds=packed.seeds,
        vision=packed.vision,
        deepstack=packed.deepstack,
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
        next_position=together.agreed(state.next_position),
        vision_mask=together.agreed(state.vision_mask),
        vision_indices=together.agreed(state.vision_indices),
        marks=None if state.marks is None else together.agreed(state.marks),
        deepstack=None if state.deepstack is None else together.agreed(state.deepstack),
        carried={name: together.agreed(numbers) for name, numbers in state.carried.items()},
    )
