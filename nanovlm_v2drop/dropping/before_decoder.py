"""What methods have in common that make fewer vision tokens before the decoder, from what the vision tower leaves."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from ..models.vision import VisionTrace
from .base import PrefillState, TokenDropper, check_numbers


class BeforeDecoder(TokenDropper):
    """A method that makes fewer tokens of each picture before the decoder, from what the vision tower leaves of it.

    A method overrides `compress_picture`. A sequence's count is shared over its pictures as evenly as their sizes allow.
    Each picture's tokens stand where the picture stood. Positions are counted anew, as for the authors' LLaVA, whose decoder
    gets fewer tokens and knows no others. Where they are places in a grid (Qwen2-VL), each token has that of its patch, and
    the tokens of a picture are in the order of their patches.
    """

    latest_layer = 0
    renumbers = True
    merges = True
    depths = (0.0,)
    leanest = (0.0,)

    def compress_picture(
        self, trace: VisionTrace, features: Tensor, indices: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a picture with features (P, D) and `vision_indices` (P,) becomes; 0 < count < P.

        Returns features (count, D), `vision_indices` (count,), and (count,) the patch in whose place each token stands.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a compress_picture")

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        text = torch.cat(state.text_rows())
        tokens = [(text, state.hidden_states[text], state.vision_indices[text])]
        tokens += [self.tokens_of(state, *picture) for picture in self.shared_pictures(state, vision_counts)]
        rows, features, indices = map(torch.cat, zip(*tokens, strict=True))
        keep, order = rows.sort(stable=True)
        return replace(
            state.take(keep, vision_counts),
            hidden_states=features.index_select(0, order),
            vision_indices=indices.index_select(0, order),
        )

    def tokens_of(
        self, state: PrefillState, trace: VisionTrace, picture: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a picture at rows (P,): the rows (count,) in which its tokens stand, their features and their `vision_indices`."""
        features, indices = state.hidden_states[picture], state.vision_indices[picture]
        places = torch.arange(len(picture), device=picture.device)
        if 0 < count < len(picture):
            check_numbers(self.name, features)
            features, indices, places = self.compress_picture(trace, features, indices, count)
        places, order = places[:count].sort(stable=True)  # two may be equal: a class token has a patch's place
        if state.position_ids.dim() > 1:
            features, indices = features[order], indices[order]
        return picture[places], features[:count], indices[:count]

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
