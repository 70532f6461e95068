"""The common part of methods that make fewer vision tokens before the decoder.

Shapes: P tokens of one picture or video, n vision tokens of its prompt, Q tokens of its question, D hidden_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

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

    def frames_and_newlines(self) -> tuple[Tensor, Tensor]:
        """The places of its tokens (frames, tokens of a frame), and those of its newline column (newlines,)."""
        places = torch.arange(len(self.features), device=self.features.device).view(self.grid)
        if not self.has_newlines:
            return places.flatten(1), places.flatten()[:0]
        return places[..., :-1].flatten(1), places[..., -1].flatten()

class BeforeDecoder(TokenDropper):
    """A method that makes fewer tokens of each picture before the decoder.

    A method overrides `choose`, or `compress_picture` if it makes new tokens. A sequence's count is shared over its pictures as
    evenly as their sizes allow. Each picture's tokens stand at the place of the picture. Positions are renumbered, as in the
    authors' LLaVA, whose decoder receives fewer tokens. Where positions are places in a grid (Qwen2-VL), each token has the
    position of its patch, and the tokens of a picture stand in the order of their patches.
    """

    latest_layer = 0
    renumbers = True
    depths = (0.0,)
    leanest = (0.0,)

    def choose(self, picture: Picture, count: int) -> Tensor:
        """(count,) the tokens of a picture that stay, as numbers below P; 0 < count < P."""
        raise NotImplementedError(f"{type(self).__name__} must have a choose or a compress_picture")

    def compress_picture(self, picture: Picture, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that replace a picture; 0 < count < P.

        Returns features (count, D), `vision_indices` (count,), and the patch (count,) at whose place each token stands.
        """
        places = self.choose(picture, count).sort().values
        return picture.features[places], picture.indices[places], places

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        text = torch.cat(state.text_rows())
        tokens = [(text, state.hidden_states[text], state.vision_indices[text])]
        for rows, pictures, shares in self.shared_pictures(state, vision_counts):
            triples = zip(rows, pictures, shares, strict=True)
            tokens += [self.tokens_of(state, own, picture, share) for own, picture, share in triples]
        keep, features, indices = map(torch.cat, zip(*tokens, strict=True))
        keep, order = keep.sort(stable=True)
        return replace(
            state.take(keep, vision_counts),
            hidden_states=features.index_select(0, order),
            vision_indices=indices.index_select(0, order),
        )

    def tokens_of(self, state: PrefillState, rows: Tensor, picture: Picture, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a picture at `rows` (P,): the rows (count,) of its new tokens, their features and their `vision_indices`."""
        features, indices = picture.features, picture.indices
        places = torch.arange(len(rows), device=rows.device)
        if 0 < count < len(rows):
            check_numbers(self.name, features)
            features, indices, places = self.compress_picture(picture, count)
        places, order = places[:count].sort(stable=True)  # two can be equal: a class token has a patch's place
        if state.position_ids.dim() > 1:
            features, indices = features[order], indices[order]
        return rows[places], features[:count], indices[:count]

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
            pictures = [
                Picture(next(traces), grid, own, numbers, together, question, is_plain and has_newline_column(grid))
                for grid, own, numbers in zip(grids, features, indices, strict=True)
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
