"""The common part of methods that make fewer vision tokens before the decoder.

Shapes: P tokens of one picture or video, n vision tokens of its prompt, Q tokens of its question, D hidden_size, S levels of
deepstack.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.attention import joined
from ..models.vision import VisionTrace
from .base import PrefillState, TokenDropper, check_numbers
from .state import Grid

FIRST = 1e9  # above any priority in `best_in_frames`


@dataclass(frozen=True)
class Picture:
    """One picture or video at the entrance of the decoder, with its surroundings.

    `prompt_features`: the features of all pictures of its prompt, without single newline tokens. `question`: the embeddings of
    the text behind the last picture, or of all text where none is behind. `has_newlines`: the last column of its grid holds
    newline tokens (LLaVA-Video). Decoders with plain positions get square frames, so a video with one more column has them.
    """

    trace: VisionTrace
    grid: Grid
    features: Tensor  # (P, D)
    indices: Tensor  # (P,) numbers among the prompt's vision tokens
    prompt_features: Tensor  # (n, D)
    question: Tensor  # (Q, D)
    has_newlines: bool = False
    deepstack: Tensor | None = None  # (P, S, D)

    def deepstack_by(self, reduce: Callable[[Tensor], Tensor]) -> Tensor | None:
        """(count, S, D) what the tower adds to the new tokens, given how their features come from those of the patches.

        `reduce`: values (P, C) of the patches -> values (count, C) of the tokens, for any C.
        """
        if self.deepstack is None:
            return None
        return reduce(self.deepstack.flatten(1)).unflatten(1, self.deepstack.shape[1:]).to(self.deepstack.dtype)

    def frames_and_newlines(self) -> tuple[Tensor, Tensor]:
        """The places of its tokens (frames, tokens of a frame), and those of its newline column (newlines,)."""
        places = torch.arange(len(self.features), device=self.features.device).view(self.grid)
        if not self.has_newlines:
            return places.flatten(1), places.flatten()[:0]
        return places[..., :-1].flatten(1), places[..., -1].flatten()


class Reduced(NamedTuple):
    """The tokens that replace a picture.

    `features` (count, D), `indices` (count,) as `vision_indices`, and the patch (count,) at whose place each token stands.
    `deepstack` (count, S, D): what the tower adds to them behind the decoder's first layers, by `Picture.deepstack_by`.
    """

    features: Tensor
    indices: Tensor
    places: Tensor
    deepstack: Tensor | None = None


class BeforeDecoder(TokenDropper):
    """A method that makes fewer tokens of each picture before the decoder.

    A method overrides `choose`, or `compress_picture` if it makes new tokens. A sequence's count is shared over its pictures as
    evenly as their sizes allow. Each picture's tokens stand at the place of the picture. Positions are renumbered, as in the
    authors' LLaVA, whose decoder receives fewer tokens. Where positions are places in a grid (Qwen2-VL), each token has the
    position of its patch, and the tokens of a picture stand in the order of their patches. Methods choose by the features that
    the decoder reads first. What the tower adds to the tokens behind the first layers (Qwen3-VL's deepstack) stays with a kept
    token, and is combined for a new one as its features are.
    """

    latest_layer = 0
    renumbers = True
    depths = (0.0,)
    leanest = (0.0,)

    def choose(self, picture: Picture, count: int) -> Tensor:
        """(count,) the tokens of a picture that stay, as numbers below P; 0 < count < P."""
        raise NotImplementedError(f"{type(self).__name__} must have a choose or a compress_picture")

    def compress_picture(self, picture: Picture, count: int) -> Reduced:
        """The tokens that replace a picture; 0 < count < P. Raises ValueError where `choose` gives no `count` numbers."""
        places = self.choose(picture, count)
        if places.shape != (count,) or places.dtype == torch.bool:
            found = f"{tuple(places.shape)} of {places.dtype}"
            raise ValueError(f"the choose of {self.name} must give the numbers of {count} tokens, ({count},), not {found}")
        places = places.sort().values
        deepstack = picture.deepstack_by(lambda values: values[places])
        return Reduced(picture.features[places], picture.indices[places], places, deepstack)

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        text = torch.cat(state.text_rows())
        of_text = None if state.deepstack is None else state.deepstack[text]
        tokens = [Reduced(state.hidden_states[text], state.vision_indices[text], text, of_text)]
        for rows, pictures, shares in self.shared_pictures(state, vision_counts):
            triples = zip(rows, pictures, shares, strict=True)
            tokens += [self.tokens_of(state, own, picture, share) for own, picture, share in triples]
        features, indices, keep = (torch.cat(parts) for parts in list(zip(*tokens, strict=True))[:3])
        keep, order = keep.sort(stable=True)
        levels = [each.deepstack for each in tokens if each.deepstack is not None]
        return replace(
            state.take(keep, vision_counts),
            hidden_states=features.index_select(0, order),
            vision_indices=indices.index_select(0, order),
            deepstack=torch.cat(levels).index_select(0, order) if levels else None,
        )

    def tokens_of(self, state: PrefillState, rows: Tensor, picture: Picture, count: int) -> Reduced:
        """The `count` tokens of a picture at `rows` (P,); `places` are rows of the prompt."""
        places = torch.arange(len(rows), device=rows.device)
        reduced = Reduced(picture.features, picture.indices, places, picture.deepstack)
        if 0 < count < len(rows):
            check_numbers(self.name, picture.features)
            reduced = self.compress_picture(picture, count)
        places, order = reduced.places[:count].sort(stable=True)  # two can be equal: a class token has a patch's place
        if state.position_ids.dim() == 1:
            order = torch.arange(count, device=order.device)
        levels = None if reduced.deepstack is None else reduced.deepstack[order]
        return Reduced(reduced.features[order], reduced.indices[order], rows[places], levels)

    def shared_pictures(
        self, state: PrefillState, vision_counts: Sequence[int]
    ) -> Iterator[tuple[Sequence[Tensor], list[Picture], list[int]]]:
        """Of each sequence the rows of its pictures, the pictures, and their shares of the sequence's count."""
        self.check_traces(state)
        traces, is_plain = iter(state.vision), state.position_ids.dim() == 1
        questions = [state.hidden_states[rows] for rows in state.question_rows()]
        for vision, grids, question, count in zip(
            state.vision_rows(), state.vision_grids, questions, vision_counts, strict=True
        ):
            if not grids:
                continue
            sizes = [prod(grid) for grid in grids]
            rows = vision.split(sizes)
            features, indices = state.hidden_states[vision].split(sizes), state.vision_indices[vision].split(sizes)
            together = joined([own for own in features if len(own) > 1] or features)
            levels = [None if state.deepstack is None else state.deepstack[own] for own in rows]
            pictures = [
                Picture(next(traces), grid, own, numbers, together, question, is_plain and has_newline_column(grid), level)
                for grid, own, numbers, level in zip(grids, features, indices, levels, strict=True)
            ]
            yield rows, pictures, share_evenly(count, sizes)

    def check_traces(self, state: PrefillState) -> None:
        """Raise ValueError unless there is a trace of each picture."""
        in_pictures = [prod(grid) for grids in state.vision_grids for grid in grids]
        in_traces = [len(trace.hidden_states) - trace.num_class_tokens for trace in state.vision]
        if in_pictures != in_traces:
            raise ValueError(
                f"{self.name} needs a trace of each picture from the vision tower (PackedInputs.vision): "
                f"the pictures hold {in_pictures} vision tokens, the traces {in_traces}"
            )


def best_in_frames(scores: Tensor, ideal: Tensor, count: int, *, every_frame: bool = False) -> Tensor:
    """(count,) the best tokens of all frames, numbered through, with `ideal` (frames,) tokens of each frame as a guide.

    Scores (frames, n). The token of rank j in a frame that deserves x tokens has the priority x - j. Taking the largest
    priorities rounds all x by largest remainder, and fills no frame further than its size. With `every_frame`, the best token
    of each frame comes first. Tokens with a score of minus infinity come last.
    """
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    priority = (ideal[:, None] - rank).double().masked_fill(scores == -torch.inf, -torch.inf)
    priority = torch.where((rank == 0) & every_frame, priority + FIRST, priority)
    return priority.flatten().topk(count).indices


def has_newline_column(grid: Grid) -> bool:
    """Whether a video, whose frames are square, has one more column."""
    frames, rows, columns = grid
    return frames > 1 and columns == rows + 1


def mean_keys(trace: VisionTrace) -> Tensor:
    """(P, head_dim) keys of the patches, averaged over heads, in float32."""
    return trace.keys()[:, trace.num_class_tokens :].float().mean(0)


def share_evenly(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` tokens for pictures of these sizes, none more than its size.

    The rest of the division goes to the larger pictures, so that a video comes before its newline, and to the first of equal
    ones.
    """
    shares = [0] * len(sizes)
    for done, picture in enumerate(sorted(range(len(sizes)), key=lambda picture: (sizes[picture], -picture))):
        shares[picture] = min(sizes[picture], count // (len(sizes) - done))
        count -= shares[picture]
    return shares
