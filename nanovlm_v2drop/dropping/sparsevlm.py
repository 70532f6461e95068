"""SparseVLM: visual token sparsification (ICML 2025, arXiv 2410.04417), version 1 of its code.

Before layer 0, the text tokens after the picture whose embeddings match its tokens best become raters. At a drop point, the
vision tokens that received most attention from the raters in the previous layer are kept: a softmax over all keys, averaged
over raters and heads. The best of the other tokens are averaged into a few new tokens, and position ids are renumbered without
gaps. Source: github.com/Gumpest/SparseVLMs, llava/model/language_model/modelling_sparse_llama.py, score.py and utils.py. In
that code, tokens leave the output of layers 2, 6 and 15, which is the input of layers 3, 7 and 16.
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
    """The number of pruned tokens that are averaged: the best 30 percent, plus one."""
    return 3 * pruned // 10 + 1


def cluster_count(pruned: int) -> int:
    """The number of new tokens: one for ten averaged tokens, plus one."""
    return recycled_count(pruned) // 10 + 1 if pruned else 0


def split_count(current: int, total: int) -> tuple[int, int]:
    """The numbers of `current` tokens that stay as they are, and of new tokens made of the others; `total` together.

    The number of new tokens follows the released code. Where two splits fit, the one with more originals is taken. A total that
    is too small for a split consists of one original and fewer new tokens.
    """
    fitting = (kept for kept in range(total, 0, -1) if kept + cluster_count(current - kept) <= total)
    originals = next(fitting, min(1, total))
    return originals, total - originals


class RecyclingSchedule(CountSchedule):
    """Layer -> number of tokens that stay as they are. The averaged tokens are added to it."""

    def kept_count(self, layer_idx: int, current: int) -> int:
        originals = super().kept_count(layer_idx, current)
        return originals + cluster_count(current - originals)


class RatedByText(TokenDropper):
    """The common part of both versions: the raters, and their attention in the layer before a drop point."""

    earliest_layer = 1  # no attention exists before layer 0
    reads_attention = True
    depths = (3 / 32, 7 / 32, 16 / 32)
    leanest = (0.0, 0.5, 0.55)  # about the later stages of the published settings

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
                # All text rows are computed, because the host does not know which of them are raters.
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
        """(R, 1) or (R, T): the weights of the text rows' attention in the sum."""
        assert state.marks is not None  # `begin` set them
        raters = state.marks[text]
        return (raters / raters.sum())[:, None]

    def mean_over_heads(self, rated: Tensor, vision_mask: Tensor) -> Tensor:
        """(T,) from the raters' attention (H, T)."""
        return rated.mean(0)


class SparseVLM(RatedByText):
    """Drop the tokens that receive least attention from the raters, and average the best of them into a few new tokens.

    The new tokens stand behind the last vision token. What Qwen3-VL's tower still has to add to them is averaged like them.
    Deviations from the released code:
    - Only the text rows of attention are computed. The released code computes all rows at the drop layers.
    - Every sequence has its own raters and ranking. The released code runs with batch 1 only.
    - With several pictures, the text after the last one rates, and all their tokens are ranked and averaged together.
    - Where no text token is above the mean, the last one is the rater.
    - Equal densities are ordered by rank (in the released code, by random noise) and compared as logarithms.
    - Where two splits fit a total, the one with more originals is taken.
    - Where a single token would be recycled, nothing changes. The released code moves it behind the others.
    - Multimodal position ids (Qwen2-VL) keep their values.
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
        kept, merged, levels = [], [], []
        for vision, text, (originals, clusters) in zip(state.vision_rows(), state.text_rows(), splits, strict=True):
            ranked = vision[scores[vision].argsort(descending=True, stable=True)]
            pruned = ranked[originals:]
            kept.append(torch.cat([text, ranked[:originals]]).sort().values)
            recycled = pruned[: recycled_count(len(pruned))]
            members = clusters_of(state.hidden_states[recycled], clusters)
            merged.append(cluster_means(members, state.hidden_states[recycled]))
            if state.deepstack is not None:
                means = cluster_means(members, state.deepstack[recycled].flatten(1))
                levels.append(means.unflatten(1, state.deepstack.shape[1:]))
        return state.take(torch.cat(kept), [originals for originals, _ in splits]).append_merged(merged, levels)


def text_raters(vision: Tensor, text: Tensor, behind: Tensor) -> Tensor:
    """(R,) 1 for the text tokens (R, D) that match the vision tokens (N, D) better than the mean of those that are `behind`."""
    products = (vision.float() @ text.float().T).masked_fill(~behind, -torch.inf)
    fit = products.softmax(-1).mean(0)
    # False for all where no text is behind (0 / 0) or all match equally, as a single token does.
    raters = behind & (fit > fit.sum() / behind.sum())
    last = torch.arange(len(text), device=text.device) == len(text) - 1
    return torch.where(raters.any(), raters, last).float()


def cluster_means(members: Tensor, values: Tensor) -> Tensor:
    """(count, C) in float32: the mean of the values (R, C) of each cluster, by `clusters_of`."""
    return members @ values.float() / (members.sum(1, keepdim=True) + 1e-6)


def clusters_of(tokens: Tensor, count: int) -> Tensor:
    """(count, R) 1 where a token (R, D) is in a cluster, else 0; in the order of the centers."""
    tokens = tokens.float()
    if count == 0:
        return tokens.new_zeros(0, len(tokens))
    # cdist uses a matrix product by default, which loses digits and gives a diagonal that is not zero.
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") * tokens.shape[-1] ** -0.5
    centers, clusters = density_peaks(distances, count), torch.arange(count, device=tokens.device)
    nearest = distances[centers].argmin(0)
    nearest[centers] = clusters
    return (nearest == clusters[:, None]).float()


def density_peaks(distances: Tensor, count: int) -> Tensor:
    """(count,) tokens with the highest product of density and distance to a denser token, best first.

    The product is computed in logarithms, because the densities exp(-distance squared) of a real decoder's states can
    underflow. Two nearest neighbours can have equal densities; the first then counts as denser, so that not both become
    centers.
    """
    density = -distances.topk(count, largest=False).values.square().mean(1)
    place = density.argsort(descending=True, stable=True).argsort()
    apart = torch.where(place < place[:, None], distances, distances.max()).amin(1)
    return (density + apart.log()).topk(count).indices
