"""The seam between prefill and a dropping method: what a method may see, and what every method has in common.

Shapes: T tokens of all sequences packed, B sequences, P patches of one picture, D hidden_size, H query heads, K key/value
heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..models.attention import sent
from ..models.kv_cache import DecodePruning
from ..models.vision import VisionTrace
from .schedule import LEANEST_RATIOS, PAPER_DEPTHS, PAPER_LAYERS, DropSchedule, layers_at_depths

MERGED = -2  # in `vision_indices`: a row that several vision tokens were averaged into


@dataclass
class PrefillState:
    """Everything at the entrance of layer `layer_idx`.

    `seqlens` and `vision_counts` are host integers: how many tokens stay is known beforehand, so a drop point never waits
    for the GPU. Position ids are indexed, never renumbered, unless the method's own paper renumbers.
    """

    layer_idx: int
    hidden_states: Tensor  # (T, D) input of this layer
    previous: Tensor | None  # (T, D) input of the layer before; None at layer 0
    position_ids: Tensor  # (T,) or (3, T)
    vision_mask: Tensor  # (T,)
    vision_indices: Tensor  # (T,) number of a vision token among those of its prompt, before any drop; -1 text, -2 merged
    seqlens: tuple[int, ...]
    vision_counts: tuple[int, ...]  # vision tokens now, one number a sequence
    prompt_vision_counts: tuple[int, ...]  # vision tokens before any drop
    vision_grids: tuple[tuple[tuple[int, int, int], ...], ...]  # frames, rows and columns, by picture and sequence
    seeds: tuple[int, ...]  # one number a sequence, the same in every batch
    vision: tuple[VisionTrace, ...] = ()  # one a grid, those of all sequences in order
    marks: Tensor | None = None  # (T,) what the method's `begin` noted of each row; it stays beside its row
    # (..., own heads, head_dim) -> (..., all heads, head_dim), where the decoder is split over processes:
    all_heads: Callable[[Tensor], Tensor] = lambda heads: heads
    # Only at a drop point:
    queries: Tensor | None = None  # (T, own H, head_dim) of the layer before, rotated; None unless the method reads attention
    keys: Tensor | None = None  # (T, own K, head_dim)
    rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines (T, 1, head_dim)
    project_next: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # rows (R,) -> this layer's queries (R, H,
    # head_dim) of these rows and its keys (T, K, head_dim), rotated; costs these two projections
    final_norm: Callable[[Tensor], Tensor] | None = None  # the norm before the head

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each sequence."""
        return list(pairwise((0, *accumulate(self.seqlens))))

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """(T, H, head_dim) and (T, K, head_dim) of the layer before, rotated; for methods that declare `reads_attention`."""
        if self.queries is None or self.keys is None:
            raise RuntimeError("this method reads the attention of the layer before; it must set reads_attention = True")
        return self.all_heads(self.queries), self.all_heads(self.keys)

    def last_rows(self) -> Tensor:
        """(B,) the row of each sequence's last token."""
        return sent(torch.tensor([end - 1 for _, end in self.spans]), self.hidden_states.device)

    def vision_rows(self) -> list[Tensor]:
        """Rows of each sequence's vision tokens, in order."""
        return [
            start + (~self.vision_mask[start:end]).int().argsort(stable=True)[:count]
            for (start, end), count in zip(self.spans, self.vision_counts, strict=True)
        ]

    def text_rows(self) -> list[Tensor]:
        """Rows of each sequence's text tokens, in order."""
        return [
            start + self.vision_mask[start:end].int().argsort(stable=True)[: end - start - count]
            for (start, end), count in zip(self.spans, self.vision_counts, strict=True)
        ]

    def take(self, keep: Tensor, vision_counts: Sequence[int]) -> "PrefillState":
        """Only the rows `keep` (T',), which leave `vision_counts` vision tokens in each sequence."""
        changes = zip(self.seqlens, self.vision_counts, vision_counts, strict=True)
        return replace(
            self.without_surroundings(),
            hidden_states=self.hidden_states.index_select(0, keep),  # on CPUs six times as fast as indexing with []
            previous=None if self.previous is None else self.previous.index_select(0, keep),
            position_ids=self.position_ids.index_select(-1, keep),
            vision_mask=self.vision_mask.index_select(0, keep),
            vision_indices=self.vision_indices.index_select(0, keep),
            marks=None if self.marks is None else self.marks.index_select(0, keep),
            seqlens=tuple(length - before + after for length, before, after in changes),
            vision_counts=tuple(vision_counts),
        )

    def append_merged(self, merged: Sequence[Tensor]) -> "PrefillState":
        """With each sequence's averaged tokens (C, D) put behind its last vision token, of which it needs one."""
        rows = torch.arange(len(self.hidden_states), device=self.hidden_states.device)
        vision_only = torch.where(self.vision_mask, rows, -1)
        last = [vision_only[start:end].amax().expand(len(new)) for (start, end), new in zip(self.spans, merged, strict=True)]
        behind = torch.cat(last)
        order = torch.cat([rows, behind]).argsort(stable=True)
        new_rows = torch.cat(list(merged)).to(self.hidden_states.dtype)

        def spliced(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new], dim=0).index_select(0, order)

        return replace(
            self.without_surroundings(),
            hidden_states=spliced(self.hidden_states, new_rows),
            previous=None if self.previous is None else spliced(self.previous, new_rows),
            position_ids=torch.cat([self.position_ids, self.position_ids[..., behind]], dim=-1)[..., order],
            vision_mask=spliced(self.vision_mask, self.vision_mask.new_ones(len(behind))),
            vision_indices=spliced(self.vision_indices, self.vision_indices.new_full((len(behind),), MERGED)),
            marks=None if self.marks is None else spliced(self.marks, self.marks.new_zeros(len(behind))),
            seqlens=tuple(length + len(new) for length, new in zip(self.seqlens, merged, strict=True)),
            vision_counts=tuple(count + len(new) for count, new in zip(self.vision_counts, merged, strict=True)),
        )

    def renumbered(self) -> "PrefillState":
        """With positions 0, 1, 2, ... in each sequence. Multimodal positions (3, T) stay: they are places in a grid."""
        if self.position_ids.dim() > 1:
            return self
        device = self.position_ids.device
        return replace(self, position_ids=torch.cat([torch.arange(length, device=device) for length in self.seqlens]))

    def without_surroundings(self) -> "PrefillState":
        """Without what belongs to the rows of one drop point only."""
        return replace(self, queries=None, keys=None, rotary=None, project_next=None, final_norm=None)


class Published(NamedTuple):
    """A setting of the authors' released code, for the 576 vision tokens of LLaVA-1.5-7B where counts are meant."""

    schedule: DropSchedule
    options: Mapping[str, Any] = MappingProxyType({})  # further arguments of the method
    num_layers: int = PAPER_LAYERS  # of the decoder that the schedule's layers are of


class NotANumber(RuntimeError):
    """A method scored a vision token NaN; the message names it."""


class TokenDropper:
    """A dropping method: the schedule, the per-sequence top-k, the return to reading order, and text never leaves.

    A method overrides `score`; one that does not rank overrides `select`, one that changes the rows it keeps `compress`.
    """

    name: ClassVar[str]
    published: ClassVar[Mapping[str, Published]] = {}  # the first is what `official` takes
    earliest_layer: ClassVar[int] = 0
    latest_layer: ClassVar[int | None] = None
    reads_attention: ClassVar[bool] = False  # needs queries and keys of the layer before each drop point
    renumbers: ClassVar[bool] = False  # closes the gaps in the position ids
    merges: ClassVar[bool] = False  # averages tokens, so that what stays is not what was there
    seeded: ClassVar[bool] = False  # draws at random: takes `seed`
    depths: ClassVar[tuple[float, ...]] = PAPER_DEPTHS  # where it drops, as shares of the decoder's layers
    leanest: ClassVar[tuple[float, ...]] = LEANEST_RATIOS  # the least that it keeps there; see DropSchedule.for_mean_tokens
    minimum: ClassVar[int] = 1

    def __init__(self, schedule: DropSchedule) -> None:
        """Raises TypeError for a schedule of another type, such as a number or a dictionary."""
        if not isinstance(schedule, DropSchedule):
            raise TypeError(
                f"{type(self).__name__} takes a DropSchedule, not {schedule!r}: DropSchedule({{3: 0.5}}) keeps half of the "
                "vision tokens from layer 3 on, and schedule_for(...) finds the schedule of a mean number of tokens"
            )
        self.schedule = schedule

    @property
    def layers_read(self) -> frozenset[int]:
        """The layers whose attention it ranks by: those before its drop points, where it does."""
        return frozenset(layer - 1 for layer in self.schedule) if self.reads_attention else frozenset()

    @classmethod
    def official(cls, setting: str | None = None, **options: Any) -> "TokenDropper":
        """The method as its authors' released code runs it: a name in `published`, None for the first there.

        `options` are the method's own and take the place of those of the setting.
        """
        if not cls.published:
            raise NotImplementedError(f"{cls.__name__} has no released code to follow; give it a DropSchedule")
        if setting is not None and setting not in cls.published:
            raise ValueError(f"{cls.name} has no published setting {setting!r}; it has: {', '.join(cls.published)}")
        schedule, published, _ = cls.published[setting or next(iter(cls.published))]
        return cls(schedule, **{**published, **options})

    @classmethod
    def schedule_for(
        cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1
    ) -> DropSchedule:
        """Where and how much to drop for a mean of vision tokens a layer; raises OutOfReach with the method's floor.

        `frames` of the prompt's video, for methods that keep whole ones.
        """
        layers = layers_at_depths(num_layers, cls.depths)
        return DropSchedule.for_mean_tokens(
            mean_tokens, num_vision_tokens, num_layers, layers=layers, leanest=cls.leanest, minimum=cls.minimum
        )

    def score(self, state: PrefillState) -> Tensor:
        """(T,) one number a token, higher = keep; the numbers of text tokens are not looked at."""
        raise NotImplementedError(f"{type(self).__name__} must have a score, or a select or compress of its own")

    def begin(self, state: PrefillState) -> PrefillState:
        """Look at the input of layer 0, before any drop; may set `marks`, one number a row that stays beside its row."""
        return state

    def __call__(self, state: PrefillState) -> PrefillState:
        """The state after this drop point. Where nothing leaves, it is the very same object."""
        counts = self.kept_counts(state)
        if counts == state.vision_counts:
            return state
        after = self.compress(state, counts)
        return after.renumbered() if self.renumbers else after

    def kept_counts(self, state: PrefillState) -> tuple[int, ...]:
        """Vision tokens of each sequence that stay at this drop point."""
        return self.schedule.kept_counts(state.layer_idx, state.vision_counts)

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        """The state with `vision_counts` vision tokens in each sequence."""
        return state.take(self.select(state, vision_counts), vision_counts)

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        """(T',) rows that stay, in reading order: all text, and the `vision_counts` best vision tokens of each sequence."""
        scores, kept = self.finite_scores(state).masked_fill(~state.vision_mask, torch.inf), []
        for (start, end), before, after in zip(state.spans, state.vision_counts, vision_counts, strict=True):
            best = scores[start:end].topk(end - start - before + after, sorted=False).indices
            kept.append(best.sort().values + start)
        return torch.cat(kept)

    def finite_scores(self, state: PrefillState) -> Tensor:
        """(T,) float32, so that no vision token can push a text token out of the top k.

        Raises ValueError for a wrong shape, NotANumber for NaN at a vision token (off the CPU RuntimeError, at the next wait).
        """
        scores: Any = self.score(state)
        if not isinstance(scores, Tensor) or scores.shape != state.vision_mask.shape:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            wanted = tuple(state.vision_mask.shape)
            raise ValueError(f"the score of {self.name} must be one number for each token, text too: {wanted}, not {found}")
        check_numbers(self.name, scores.masked_fill(~state.vision_mask, 0.0))
        return scores.float().nan_to_num()

    def decode_pruning(self, state: PrefillState) -> DecodePruning | None:
        """What chooses the cache slots that a decoded token sees, given the end of prefill; None where it sees them all."""
        return None


def check_numbers(name: str, ranked: Tensor) -> None:
    """Raise NotANumber where what a method ranks vision tokens by holds NaN; off the CPU a RuntimeError, at the next wait."""
    message = f"{name} scored a vision token NaN: it divides by zero, or activations overflow"
    are_numbers = ranked.isnan().any().logical_not()
    if ranked.device.type == "cpu" and not are_numbers:
        raise NotANumber(message)
    torch._assert_async(are_numbers, message)
