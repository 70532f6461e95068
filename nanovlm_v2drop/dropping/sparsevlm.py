"""SparseVLM: visual token sparsification (ICML 2025, arXiv 2410.04417), version 1 of its code.

Before layer 0 the text tokens behind the picture whose embeddings fit its tokens best become raters. At a drop point the vision
tokens stay that the raters attended to most in the layer before: softmax over all keys, mean over raters and heads. The best of
the others are averaged into a few new tokens, and the gaps in the position ids are closed.
Source: github.com/Gumpest/SparseVLMs, llava/model/language_model/modelling_sparse_llama.py, score.py and utils.py. Tokens leave
the output of layers 2, 6 and 15 there, that is the input of 3, 7 and 16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..models.attention import attention_weights
from .base import PrefillState, Published, TokenDropper
from .schedule import CountSchedule


def recycled_count(pruned: int) -> int:
    """How many of the pruned tokens are averaged: the best 30 percent, and one more."""
    return 3 * pruned // 10 + 1


def cluster_count(pruned: int) -> int:
    """Into how many new tokens: one for each ten of them, and one more."""
    return recycled_count(pruned) // 10 + 1 if pruned else 0


def split_count(current: int, total: int) -> tuple[int, int]:
    """Of `current` tokens, how many stay as they are and how many new ones are made of the others, `total` together.

    The new ones are as many as in the released code; where two splits fit, the one with more originals. A total too small for
    them is one original and fewer new ones.
    """
    fitting = (kept for kept in range(total, 0, -1) if kept + cluster_count(current - kept) <= total)
    originals = next(fitting, min(1, total))
    return originals, total - originals


class RecyclingSchedule(CountSchedule):
    """Layer -> number of tokens that stay as they are; the averaged ones come on top."""

    def kept_count(self, layer_idx: int, current: int) -> int:
        originals = super().kept_count(layer_idx, current)
        return originals + cluster_count(current - originals)


class RatedByText(TokenDropper):
    """What both versions share: the raters, and their attention in the layer before a drop point."""

    earliest_layer = 1  # layer 0 has no attention before it
    reads_attention = True
    depths = (3 / 32, 7 / 32, 16 / 32)
    leanest = (0.0, 0.5, 0.55)  # later stages of the published settings, roughly

    def begin(self, state: PrefillState) -> PrefillState:
        """`marks`: 1 for raters, 0 for all others."""
        marks = torch.zeros(len(state.hidden_states), device=state.hidden_states.device)
        for vision, text in zip(state.vision_rows(), state.text_rows(), strict=True):
            if len(vision):
                marks[text] = text_raters(state.hidden_states[vision], state.hidden_states[text], text > vision[-1])
        return replace(state, marks=marks)

    def score(self, state: PrefillState) -> Tensor:
        (queries, keys), scores = state.queries_and_keys(), []
        for text, (start, end), vision_count in zip(state.text_rows(), state.spans, state.vision_counts, strict=True):
            if vision_count:
                # All text rows: how many of them rate is known on the device only.
                attention = attention_weights(queries[text], keys[start:end], text - start)  # (H, R, T)
                scores.append(self.sequence_score(attention, state, text, start, end))
            else:
                scores.append(torch.zeros(end - start, device=keys.device))
        return torch.cat(scores)

    def sequence_score(self, attention: Tensor, state: PrefillState, text: Tensor, start: int, end: int) -> Tensor:
        """(T,) of one sequence, from the attention (H, R, T) of its text rows."""
        rated = (attention * self.rater_weights(state, text, start, end)).sum(1)
        return self.mean_over_heads(rated, state.vision_mask[start:end])

    def rater_weights(self, state: PrefillState, text: Tensor, start: int, end: int) -> Tensor:
        """(R, 1) or (R, T), what each text row's attention is multiplied with to be summed."""
        assert state.marks is not None  # `begin` set them
        raters = state.marks[text]
        return (raters / raters.sum())[:, None]

    def mean_over_heads(self, rated: Tensor, vision_mask: Tensor) -> Tensor:
        """(T,) from the raters' attention (H, T)."""
        return rated.mean(0)


class SparseVLM(RatedByText):
    """Drop what the raters look at least, and average the best of it into a few new tokens behind the last vision token.

    Deviations from the released code: only text rows of attention are computed (there, all rows at the drop layers); every
    sequence has its own raters and ranking (there, batches of one); with several pictures the text behind the last one rates,
    and all their tokens are ranked and averaged together; where no text token is above the mean, the last one rates; equal
    densities are told apart by rank (there, by random noise) and compared as logarithms; a total of kept and new tokens that
    two splits fit is split in favour of the kept; where a single token would be recycled, nothing changes (there, it moves
    behind the others); values of multimodal position ids (Qwen2-VL) are kept.
    """

    name = "sparsevlm"
    published: ClassVar[Mapping[str, Published]] = {
        "192": Published(RecyclingSchedule({3: 300, 7: 200, 16: 110})),
        "128": Published(RecyclingSchedule({3: 303, 7: 110, 16: 36})),
        "96": Published(RecyclingSchedule({3: 238, 7: 48, 16: 26})),
        "64": Published(RecyclingSchedule({3: 66, 7: 30, 16: 17})),
    }
    renumbers = True
    merges = True

    def compress(self, state: PrefillState, vision_counts: Sequence[int]) -> PrefillState:
        scores = self.finite_scores(state)
        splits = [split_count(*counts) for counts in zip(state.vision_counts, vision_counts, strict=True)]
        kept, merged = [], []
        for vision, text, (originals, clusters) in zip(state.vision_rows(), state.text_rows(), splits, strict=True):
            ranked = vision[scores[vision].argsort(descending=True, stable=True)]
            pruned = ranked[originals:]
            kept.append(torch.cat([text, ranked[:originals]]).sort().values)
            merged.append(merge_clusters(state.hidden_states[pruned[: recycled_count(len(pruned))]], clusters))
        return state.take(torch.cat(kept), [originals for originals, _ in splits]).append_merged(merged)


def text_raters(vision: Tensor, text: Tensor, behind: Tensor) -> Tensor:
    """(R,) 1 for the text tokens (R, D) that fit the vision tokens (N, D) better than the mean of those that are `behind`."""
    products = (vision.float() @ text.float().T).masked_fill(~behind, -torch.inf)
    fit = products.softmax(-1).mean(0)
    # False everywhere where nothing is behind (0 / 0) or all fit alike, as a single token does.
    raters = behind & (fit > fit.sum() / behind.sum())
    last = torch.arange(len(text), device=text.device) == len(text) - 1
    return torch.where(raters.any(), raters, last).float()


def merge_clusters(tokens: Tensor, count: int) -> Tensor:
    """(R, D) -> (count, D) in float32: the mean of each cluster, in order of the centers."""
    tokens = tokens.float()
    if count == 0:
        return tokens[:0]
    # The matrix product that cdist takes by default loses digits, and its diagonal is not zero.
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") * tokens.shape[-1] ** -0.5
    centers, clusters = density_peaks(distances, count), torch.arange(count, device=tokens.device)
    nearest = distances[centers].argmin(0)
    nearest[centers] = clusters
    members = (nearest == clusters[:, None]).float()  # (count, R)
    return members @ tokens / (members.sum(1, keepdim=True) + 1e-6)


def density_peaks(distances: Tensor, count: int) -> Tensor:
    """(count,) tokens of highest density times distance to a denser token, best first.

    As logarithms: the densities exp(-distance squared) of a real decoder's states may underflow. Of equals, as nearest
    neighbours are where two distances count, the first is the denser: else both would be centers.
    """
    density = -distances.topk(count, largest=False).values.square().mean(1)
    place = density.argsort(descending=True, stable=True).argsort()
    apart = torch.where(place < place[:, None], distances, distances.max()).amin(1)
    return (density + apart.log()).topk(count).indices
