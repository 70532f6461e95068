"""What methods have in common that make fewer vision tokens before the decoder, from what the vision tower leaves."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from .base import PrefillState, TokenDropper, VisionTrace


class BeforeDecoder(TokenDropper):
    """A method that makes fewer tokens of each picture before the decoder, from what the vision tower leaves of it.

    A method overrides `compress_picture`. A sequence's count is shared over its pictures as evenly as their sizes allow.
    Each picture's tokens stand where the picture stood.
    """

    latest_layer = 0
    renumbers = True
    merges = True
    depths = (0.0,)
    leanest = (0.0,)

    def compress_picture(
        self, trace: VisionTrace, features: Tensor, indices: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """What a picture with features (P, D) and `vision_indices` (P,) becomes: (count, D) and (count,); 0 < count < P."""
        raise NotImplementedError(f"{type(self).__name__} must have a compress_picture")

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        rows, features, indices = [], [], []
        for trace, picture, count in self.shared_pictures(state, vision_counts):
            parts = state.hidden_states[picture], state.vision_indices[picture]
            if 0 < count < len(picture):
                parts = self.compress_picture(trace, *parts, count)
            rows.append(picture[:count])  # no matter which of its rows: positions are renumbered
            features.append(parts[0][:count])
            indices.append(parts[1][:count])
        written = torch.cat(rows)
        changed = replace(
            state,
            hidden_states=state.hidden_states.index_copy(0, written, torch.cat(features)),
            vision_indices=state.vision_indices.index_copy(0, written, torch.cat(indices)),
        )
        return changed.take(torch.cat([*state.text_rows(), written]).sort().values, vision_counts)

    def shared_pictures(
        self, state: PrefillState, vision_counts: Sequence[int]
    ) -> Iterator[tuple[VisionTrace, Tensor, int]]:
        """Of each picture its trace, its rows and its share of its sequence's count."""
        sizes = [[prod(grid) for grid in grids] for grids in state.vision_grids]
        in_pictures = [size for held in sizes for size in held]
        in_traces = [len(trace.hidden_states) - trace.num_class_tokens for trace in state.vision]
        if in_pictures != in_traces:
            raise ValueError(
                f"{self.name} needs a trace of each picture from the vision tower (PackedInputs.vision): "
                f"the pictures hold {in_pictures} vision tokens, the traces {in_traces}"
            )
        rows = [part for rows, held in zip(state.vision_rows(), sizes, strict=True) for part in rows.split(held)]
        shares = [share for parts in map(share_evenly, vision_counts, sizes) for share in parts]
        return zip(state.vision, rows, shares, strict=True)


def mean_keys(trace: VisionTrace) -> Tensor:
    """(P, head_dim) keys of the patches, mean over heads, in float32."""
    return trace.keys()[:, trace.num_class_tokens :].float().mean(0)


def share_evenly(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` tokens for pictures of these sizes, none more than its size.

    What is left over goes to the larger ones, so that a video comes before its newline, and to the first of equal ones.
    """
    shares = [0] * len(sizes)
    for done, picture in enumerate(sorted(range(len(sizes)), key=lambda picture: (sizes[picture], -picture))):
        shares[picture] = min(sizes[picture], count // (len(sizes) - done))
        count -= shares[picture]
    return shares
