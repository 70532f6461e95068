"""The ragged key/value cache: each layer has its own length, because dropping shortens later layers.

Shapes: L layers, B sequences, T prompt tokens packed, H query heads, K key/value heads, S slots of a cache.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import add, sub

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .attention import CacheSeqlens, sent
from .kv_cache_int8 import dequantised, quantised

KV_CACHE_DTYPES = ("auto", "int8")  # the dtype that attention computes in, or int8 with a scale for each head and token

# Chooses the cache slots that a new token sees: (layer_idx, q (B, H, head_dim), keys (B, S, K, head_dim), filled slots of each
# sequence) -> the visible slots of each sequence, or None for all slots
DecodePruning = Callable[[int, Tensor, Tensor, Sequence[int]], Sequence[Tensor] | None]


class KVCache:
    """Keys and values of each layer, allocated at that layer's own length plus `max_new_tokens`.

    A layer after a drop point has fewer rows than a layer before it, so dropping saves memory. `seqlens[layer_idx]` holds the
    filled slots of each sequence as host integers. `slots` (L, B) holds the same on the device, where the next token is
    written, and `lengths` (L, B) int32 is one more: the number of slots that the next token sees. `position_ids` (L, B) is the
    next token's position in each layer. It continues from the undropped prompt, unless a method renumbers the kept tokens.
    `pruning` is None, or the function that chooses the slots that a new token sees. `heads_first` selects the memory order, (B,
    K, S, head_dim) or (B, S, K, head_dim); the shape is (B, S, K, head_dim) in both cases. `dtype` is one of KV_CACHE_DTYPES.
    With int8, keys and values are rows of kv_cache_int8.py: the scale is behind the head_dim values.
    """

    def __init__(self, max_new_tokens: int, heads_first: bool, dtype: str = KV_CACHE_DTYPES[0]) -> None:
        self.slots = self.lengths = self.sequences = self.position_ids = torch.empty(0)
        self.max_new_tokens, self.heads_first, self.dtype = max_new_tokens, heads_first, dtype
        self.pruning: DecodePruning | None = None
        self.keys: list[Tensor] = []  # (B, S, K, head_dim) each
        self.values: list[Tensor] = []
        self.seqlens: list[tuple[int, ...]] = []

    @property
    def is_int8(self) -> bool:
        return self.dtype == "int8"

    @property
    def nbytes(self) -> int:
        """Bytes of the filled slots, in int8 with their scales."""
        return sum(self.nbytes_of(index) for index in range(len(self.seqlens[0])))

    def nbytes_of(self, index: int) -> int:
        """Bytes of the slots that one sequence fills."""
        return 2 * sum(lengths[index] * keys[0, 0].nbytes for lengths, keys in zip(self.seqlens, self.keys, strict=True))

    def fill(self, k: Tensor, v: Tensor, seqlens: tuple[int, ...]) -> None:
        """Add the next layer with the packed keys and values (T, K, head_dim) of its prompt tokens."""
        keys, values = (quantised(heads) if self.is_int8 else heads for heads in (k, v))
        self.fill_rows(keys, values, seqlens)

    def fill_rows(self, keys: Tensor, values: Tensor, seqlens: tuple[int, ...]) -> None:
        """Add the next layer with packed rows in the form that is stored."""
        self.keys.append(self.padded(keys, seqlens))
        self.values.append(self.padded(values, seqlens))
        self.seqlens.append(seqlens)

    def first_layers(self, count: int) -> "KVCache":
        """A cache that begins with the first `count` layers of this one, in the same memory. Only one of both may decode."""
        first = KVCache(self.max_new_tokens, self.heads_first, self.dtype)
        first.keys, first.values, first.seqlens = self.keys[:count], self.values[:count], self.seqlens[:count]
        return first

    def padded(self, packed: Tensor, seqlens: tuple[int, ...]) -> Tensor:
        """Packed rows (T, K, head_dim) as slots (B, S, K, head_dim), with room for `max_new_tokens` more."""
        cache = self.allocate(packed, len(seqlens), max(seqlens) + self.max_new_tokens)
        for slots, rows in zip(cache, packed.split(seqlens), strict=True):
            slots[: len(rows)] = rows
            slots[len(rows) :] = 0  # attention multiplies a masked slot by zero, and 0 * NaN is NaN
        return cache

    def keep_rows(self, rows: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Cut every layer so far to the packed `rows` of sequences that had `before` rows each and now have `after`."""
        held = list(zip(self.keys, self.values, strict=True))
        self.keys, self.values, self.seqlens = [], [], []
        starts = accumulate(before, initial=0)
        slots = [part - start for part, start in zip(rows.split(after), starts, strict=False)]
        for keys, values in held:
            k, v = (torch.cat([cache[index, own] for index, own in enumerate(slots)]) for cache in (keys, values))
            self.fill_rows(k, v, after)

    def followed_by(
        self, layer_idx: int, k: Tensor, v: Tensor, seqlens: Sequence[int]
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """The keys and values of a layer and behind them more of them, k and v (T, K, head_dim), packed; and their numbers."""
        held = self.seqlens[layer_idx]
        keys, values = (
            behind([self.read(rows, new.dtype) for rows in filled(cache, held)], new.split(tuple(seqlens)))
            for cache, new in ((self.keys[layer_idx], k), (self.values[layer_idx], v))
        )
        return keys, values, tuple(map(add, held, seqlens))

    def read(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored rows as keys or values (..., head_dim)."""
        return dequantised(rows, dtype) if self.is_int8 else rows

    def extend(self, later: "KVCache") -> None:
        """Put the rows of `later`, whose positions begin at zero, behind the rows of each layer."""
        for layer_idx, (held, seqlens) in enumerate(zip(self.seqlens, later.seqlens, strict=True)):
            together = tuple(map(add, held, seqlens))
            for caches, added in ((self.keys, later.keys), (self.values, later.values)):
                rows = behind(filled(caches[layer_idx], held), filled(added[layer_idx], seqlens))
                caches[layer_idx] = self.padded(rows, together)
            self.seqlens[layer_idx] = together
        self.finish(self.position_ids + later.position_ids, self.pruning)

    def allocate(self, like: Tensor, batch: int, slots: int) -> Tensor:
        """Memory (B, S, K, head_dim) for heads like those of `like`."""
        num_key_value_heads, head_dim = like.shape[-2:]
        if self.heads_first:
            return like.new_empty(batch, num_key_value_heads, slots, head_dim).transpose(1, 2)
        return like.new_empty(batch, slots, num_key_value_heads, head_dim)

    def finish(self, position_ids: Tensor, pruning: DecodePruning | None = None) -> None:
        """After the last layer: set the positions at which decoding continues, `position_ids` (L, B), and its `pruning`."""
        self.position_ids, self.pruning = position_ids, pruning
        self.slots = sent(torch.tensor(self.seqlens), position_ids.device)
        self.lengths = (self.slots + 1).int()
        self.sequences = torch.arange(position_ids.shape[1], device=position_ids.device)

    @property
    def is_full(self) -> bool:
        return any(max(lengths) == keys.shape[1] for lengths, keys in zip(self.seqlens, self.keys, strict=True))

    def grow(self) -> None:
        """Allocate `max_new_tokens` more slots in every layer."""
        for caches in (self.keys, self.values):
            for layer_idx, cache in enumerate(caches):
                batch, slots = cache.shape[:2]
                caches[layer_idx] = self.allocate(cache, batch, slots + max(self.max_new_tokens, 1))
                caches[layer_idx][:, :slots], caches[layer_idx][:, slots:] = cache, 0

    def append(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Write one new token a sequence, k and v (B, K, head_dim), into the next slots of a layer that has room."""
        rows = quantised(torch.stack([k, v])) if self.is_int8 else (k, v)
        for caches, new in zip((self.keys, self.values), rows, strict=True):
            caches[layer_idx].index_put_((self.sequences, self.slots[layer_idx]), new)

    def advance(self, count: int = 1) -> None:
        """Count `count` more tokens in every layer on the host; a negative count removes them."""
        self.seqlens = [tuple(length + count for length in lengths) for lengths in self.seqlens]

    def advance_on_device(self, count: int = 1) -> None:
        """The same on the device, in place, so that every replay of a CUDA graph does it."""
        self.slots += count
        self.lengths += count
        self.position_ids += count

    def crop(self, count: int | Sequence[int]) -> None:
        """Remove the last `count` text tokens of every sequence, or of each sequence its own number, from all layers.

        Raises ValueError for a number that is negative or above the tokens of a sequence.
        """
        counts = [count] * len(self.sequences) if isinstance(count, int) else list(count)
        shortest = [min(lengths) for lengths in zip(*self.seqlens, strict=True)]
        if any(not 0 <= own <= length for own, length in zip(counts, shortest, strict=True)):
            raise ValueError(f"cannot remove {counts} tokens from sequences of {shortest} tokens")
        self.seqlens = [tuple(map(sub, lengths, counts)) for lengths in self.seqlens]
        removed = sent(torch.tensor(counts), self.slots.device)
        self.slots -= removed
        self.lengths -= removed.int()
        self.position_ids -= removed

    def visible_on_device(self, layer_idx: int, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All slots of a layer, and the filled ones (B,) on the device: for a CUDA graph, whose shapes never change."""
        return self.keys[layer_idx], self.values[layer_idx], self.lengths[layer_idx]

    def visible(self, layer_idx: int, q: Tensor) -> tuple[Tensor, Tensor, CacheSeqlens]:
        """The stored rows (B, S, K, head_dim) that the new token's queries q (B, H, head_dim) see, and the filled slots."""
        if self.pruning is None and not self.heads_first:  # these kernels read the lengths on the device
            return self.visible_on_device(layer_idx, q)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        seqlens = tuple(length + 1 for length in self.seqlens[layer_idx])  # the new token's own slot is filled already
        slots = None if self.pruning is None else self.pruning(layer_idx, q, self.read(keys, q.dtype), seqlens)
        if slots is None:
            return keys, values, seqlens
        index = pad_sequence(list(slots), batch_first=True)
        sequences = self.sequences[:, None]
        return keys[sequences, index], values[sequences, index], tuple(map(len, slots))


def filled(cache: Tensor, seqlens: Sequence[int]) -> list[Tensor]:
    """The filled slots of each sequence of a cache (B, S, K, ...)."""
    return [slots[:count] for slots, count in zip(cache, seqlens, strict=True)]


def behind(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """For each sequence the rows of `first` and then those of `second`, packed."""
    return torch.cat([rows for pair in zip(first, second, strict=True) for rows in pair])


def check_kv_cache_dtype(name: str) -> None:
    """Raise ValueError for a name that is not in KV_CACHE_DTYPES."""
    if name not in KV_CACHE_DTYPES:
        raise ValueError(f"unknown kv_cache_dtype {name!r}; choose one of: {', '.join(KV_CACHE_DTYPES)}")
