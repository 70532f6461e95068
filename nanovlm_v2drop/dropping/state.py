"""What a dropping method sees at a drop point: the packed rows of all sequences, and how rows leave.

Shapes: T tokens of all sequences packed, B sequences, D hidden_size, H query heads, K key/value heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..models.attention import sent
from ..models.vision import VisionTrace

MERGED = -2  # in `vision_indices`: a row that several vision tokens were averaged into
Grid = tuple[int, int, int]  # frames, rows, columns


@dataclass
class PrefillState:
    """The rows at the entrance of layer `layer_idx`.

    `seqlens` and all counts are host integers. The number of kept tokens is therefore known beforehand, and a drop point never
    waits for the GPU. Position ids are indexed and never renumbered, unless the method's own paper renumbers them.
    """

    layer_idx: int
    hidden_states: Tensor  # (T, D) input of this layer
    previous: Tensor | None  # (T, D) input of the previous layer; None at layer 0
    position_ids: Tensor  # (T,) or (3, T)
    next_position: Tensor  # (B,) position of the first decoded token
    vision_mask: Tensor  # (T,)
    vision_indices: Tensor  # (T,) number of a vision token among those of its undropped prompt; -1 text, -2 merged
    seqlens: tuple[int, ...]
    vision_counts: tuple[int, ...]  # vision tokens of each sequence now
    prompt_vision_counts: tuple[int, ...]  # vision tokens of each sequence before any drop
    question_counts: tuple[int, ...]  # text tokens behind the last vision token of each sequence
    vision_grids: tuple[tuple[Grid, ...], ...]  # frames, rows and columns of each picture of each sequence
    seeds: tuple[int, ...]  # one number a sequence, the same in every batch
    vision: tuple[VisionTrace, ...] = ()  # one a grid, those of all sequences in order
    marks: Tensor | None = None  # (T,) the method's own numbers, from `begin` or `observe`; they follow their rows
    carried: Mapping[str, Tensor] = field(default_factory=dict)  # (T,) each: further numbers that follow their rows
    deepstack: Tensor | None = None  # (T, S, D) what the tower adds to the rows behind the next S layers
    # (..., own heads, head_dim) -> (..., all heads, head_dim), where processes share the decoder:
    all_heads: Callable[[Tensor], Tensor] = lambda heads: heads
    # Only at a drop point:
    layer_output: Tensor | None = None  # (T, D) of the previous layer, where the tower has added to it since
    queries: Tensor | None = None  # (T, own H, head_dim) of the previous layer, rotated; None unless reads_attention
    keys: Tensor | None = None  # (T, own K, head_dim)
    rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines (T, 1, head_dim)
    project_next: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # rows (R,) -> this layer's queries (R, H,
    # head_dim) of these rows and its keys (T, K, head_dim), rotated; costs these two projections
    final_norm: Callable[[Tensor], Tensor] | None = None  # the norm before lm_head

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First row and end of each sequence."""
        return list(pairwise((0, *accumulate(self.seqlens))))

    @property
    def previous_output(self) -> Tensor:
        """(T, D) what the previous layer itself made: `hidden_states` without what the tower added (deepstack)."""
        return self.hidden_states if self.layer_output is None else self.layer_output

    def advance(self, layer_output: Tensor) -> None:
        """Go on to the next layer's input: the output (T, D) of this layer, and what the tower adds to it."""
        self.previous, self.hidden_states, self.layer_output = self.hidden_states, layer_output, None
        if self.deepstack is not None:
            self.layer_output, self.hidden_states = layer_output, layer_output + self.deepstack[:, 0]
            self.deepstack = self.deepstack[:, 1:] if self.deepstack.shape[1] > 1 else None

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """(T, H, head_dim) and (T, K, head_dim) of the previous layer, rotated; for methods with `reads_attention`."""
        if self.layer_idx == 0:
            raise RuntimeError("no layer before layer 0 has attention: set earliest_layer = 1 and depths above 0")
        if self.queries is None or self.keys is None:
            raise RuntimeError("this method reads the attention of the previous layer; it must set reads_attention = True")
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

    def question_rows(self) -> list[Tensor]:
        """Rows of each sequence's question: its text behind the last vision token, or all its text where none is behind."""
        device = self.hidden_states.device
        behind = zip(self.spans, self.question_counts, self.text_rows(), strict=True)
        return [torch.arange(end - count, end, device=device) if count else text for (_, end), count, text in behind]

    def take(self, keep: Tensor, vision_counts: Sequence[int]) -> "PrefillState":
        """The state with only the rows `keep` (T',), among them `vision_counts` vision tokens of each sequence."""
        changes = zip(self.seqlens, self.vision_counts, vision_counts, strict=True)
        return replace(
            self.without_surroundings(),
            hidden_states=self.hidden_states.index_select(0, keep),  # on CPUs six times faster than indexing with []
            previous=None if self.previous is None else self.previous.index_select(0, keep),
            position_ids=self.position_ids.index_select(-1, keep),
            vision_mask=self.vision_mask.index_select(0, keep),
            vision_indices=self.vision_indices.index_select(0, keep),
            marks=None if self.marks is None else self.marks.index_select(0, keep),
            carried={name: numbers.index_select(0, keep) for name, numbers in self.carried.items()},
            deepstack=None if self.deepstack is None else self.deepstack.index_select(0, keep),
            seqlens=tuple(length - before + after for length, before, after in changes),
            vision_counts=tuple(vision_counts),
        )

    def append_merged(self, merged: Sequence[Tensor], deepstack: Sequence[Tensor] = ()) -> "PrefillState":
        """Put each sequence's averaged tokens (C, D), with their `deepstack` (C, S, D), behind its last vision token.

        That token must exist.
        """
        rows = torch.arange(len(self.hidden_states), device=self.hidden_states.device)
        vision_only = torch.where(self.vision_mask, rows, -1)
        ends = zip(self.spans, merged, strict=True)
        behind = torch.cat([vision_only[start:end].amax().expand(len(new)) for (start, end), new in ends])
        order = torch.cat([rows, behind]).argsort(stable=True)

        def spliced(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old, new.to(old.dtype)]).index_select(0, order)

        def with_zeros(numbers: Tensor) -> Tensor:
            return spliced(numbers, numbers.new_zeros(len(behind)))

        return replace(
            self.without_surroundings(),
            hidden_states=spliced(self.hidden_states, torch.cat(list(merged))),
            previous=None if self.previous is None else spliced(self.previous, torch.cat(list(merged))),
            position_ids=torch.cat([self.position_ids, self.position_ids[..., behind]], dim=-1)[..., order],
            vision_mask=spliced(self.vision_mask, self.vision_mask.new_ones(len(behind))),
            vision_indices=spliced(self.vision_indices, self.vision_indices.new_full((len(behind),), MERGED)),
            marks=None if self.marks is None else with_zeros(self.marks),
            carried={name: with_zeros(numbers) for name, numbers in self.carried.items()},
            deepstack=None if self.deepstack is None else spliced(self.deepstack, torch.cat(list(deepstack))),
            seqlens=tuple(length + len(new) for length, new in zip(self.seqlens, merged, strict=True)),
            vision_counts=tuple(count + len(new) for count, new in zip(self.vision_counts, merged, strict=True)),
        )

    def renumbered(self, changed: Sequence[bool]) -> "PrefillState":
        """The state with positions 0, 1, 2, ... in each sequence that has `changed`.

        Multimodal positions (3, T) are places in a grid and stay. Decoded tokens continue behind the largest position that is
        left.
        """
        device, positions = self.position_ids.device, self.position_ids
        if positions.dim() == 1:
            parts = zip(self.position_ids.split(self.seqlens), changed, strict=True)
            positions = torch.cat([torch.arange(len(own), device=device) if anew else own for own, anew in parts])
        anew, following = sent(torch.tensor(changed), device), next_positions(positions, self.seqlens)
        return replace(self, position_ids=positions, next_position=torch.where(anew, following, self.next_position))

    def without_surroundings(self) -> "PrefillState":
        """The state without the fields that describe the rows of one drop point."""
        return replace(self, layer_output=None, queries=None, keys=None, rotary=None, project_next=None, final_norm=None)


def next_positions(position_ids: Tensor, seqlens: Sequence[int]) -> Tensor:
    """(B,) one more than the largest position of each sequence, on any axis of (T,) or (3, T) positions."""
    return torch.stack([part.amax() for part in position_ids.split(tuple(seqlens), dim=-1)]) + 1
