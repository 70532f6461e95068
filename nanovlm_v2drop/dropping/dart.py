"""DART: stop looking for important tokens, duplication matters more (EMNLP 2025, arXiv 2502.11494).

At the input of layer K a few pivots are chosen: the image tokens and the text tokens behind the picture whose keys in layer
K - 1 are longest. One after another they take the image tokens that are least like them, by the cosine of hidden states behind
the model's final norm. What no pivot took says again what is there already, and leaves. Position ids are kept.
Source: github.com/ZichenWen1/DART, llava/model/language_model/modeling_llama_self.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PrefillState, Published, TokenDropper, check_numbers
from .schedule import CountSchedule, DropSchedule

IMAGE_PIVOTS, TEXT_PIVOTS = 4, 4
PIVOTS = IMAGE_PIVOTS + TEXT_PIVOTS
PIVOT_ORDERS = ("rank", "released")


class EqualPicks(DropSchedule):
    """Layer -> share of the vision tokens that the pivots take, rounded so that all take equally many; image pivots on top."""

    def kept_count(self, layer_idx: int, current: int) -> int:
        return min(current, IMAGE_PIVOTS + PIVOTS * int(current * self[layer_idx] / PIVOTS))


def published_count(max_num_trunction: int) -> Published:
    """A setting of the LLaVA scripts, which name what the pivots take together; the image pivots come on top."""
    taken = PIVOTS * (max_num_trunction // PIVOTS)
    return Published(CountSchedule({2: IMAGE_PIVOTS + taken}), MappingProxyType({"pivot_order": "released"}))


class DART(TokenDropper):
    """Drop the vision tokens that repeat what is kept.

    `pivot_order` matters, since what one pivot takes the next cannot. "rank": image pivots, then text pivots, longest key
    first. "released": as a Python set of their rows happens to list them, mostly by row modulo 32, so that a longer system
    prompt changes what is kept.
    Deviations from the released code: every sample has its own pivots (there, batch 1 only). Any number may be kept: the
    first pivots take one token more than the last, and up to four kept tokens are the image pivots alone. A picture with
    fewer than four text tokens behind it fails there; here image pivots take again in the place of the missing ones. All
    pictures of a prompt are one pool, and its text is what stands behind the last of them.
    """

    name = "dart"
    published: ClassVar[Mapping[str, Published]] = {
        "128": published_count(128),  # the default of the LLaVA scripts; 132 kept
        "192": published_count(192),
        "64": published_count(64),
        "reduction 0.778": Published(EqualPicks({2: 1 - 0.778}), MappingProxyType({"pivot_order": "released"})),
    }
    earliest_layer = 1  # layer 0 has no keys before it
    reads_attention = True
    depths = (2 / 32,)
    leanest = (0.0,)

    def __init__(self, schedule: DropSchedule, pivot_order: str = "rank") -> None:
        super().__init__(schedule)
        if pivot_order not in PIVOT_ORDERS:
            raise ValueError(f"unknown pivot order {pivot_order!r}; choose one of: {', '.join(PIVOT_ORDERS)}")
        self.pivot_order = pivot_order

    def select(self, state: PrefillState, vision_counts: Sequence[int]) -> Tensor:
        assert state.final_norm is not None
        norms = key_norms(state).split(state.seqlens)
        features = F.normalize(state.final_norm(state.hidden_states).float(), dim=-1).split(state.seqlens)
        kept = []
        rows = zip(state.spans, state.vision_rows(), state.text_rows(), vision_counts, norms, features, strict=True)
        for (start, _), vision, text, count, own_norms, own_features in rows:
            chosen = self.choose(vision - start, own_norms, own_features, count)
            kept.append(torch.cat([text, chosen + start]).sort().values)
        return torch.cat(kept)

    def choose(self, vision: Tensor, norms: Tensor, features: Tensor, count: int) -> Tensor:
        """`count` of the rows `vision` of one sequence, given its key norms (T,) and hidden states of length 1 (T, D)."""
        check_numbers(self.name, norms[vision])
        image_pivots = vision[norms[vision].topk(min(IMAGE_PIVOTS, count)).indices]
        if count <= IMAGE_PIVOTS:
            return image_pivots
        pivots = self.ordered(torch.cat([image_pivots, text_pivots(vision, norms, image_pivots)]))
        candidates = torch.zeros_like(norms, dtype=torch.bool).index_fill(0, vision, True).index_fill(0, image_pivots, False)
        similarities = features[pivots] @ features.T
        check_numbers(self.name, similarities[:, vision])
        return torch.cat([image_pivots, *take_in_turn(similarities, candidates, count - IMAGE_PIVOTS)])

    def ordered(self, pivots: Tensor) -> Tensor:
        if self.pivot_order == "rank":
            return pivots
        # Only the interpreter knows how a set lists its numbers, so they come to the host: the one wait for the GPU.
        rows = pivots.tolist()
        return pivots.new_tensor(sorted(rows, key=list(set(rows)).index))


def key_norms(state: PrefillState) -> Tensor:
    """(T,) L1 norm of each token's key in the layer before, all heads together."""
    _, keys = state.queries_and_keys()
    return torch.linalg.vector_norm(keys.flatten(1), 1, dim=-1, dtype=torch.promote_types(keys.dtype, torch.float32))


def text_pivots(vision: Tensor, norms: Tensor, image_pivots: Tensor) -> Tensor:
    """(4,) text rows behind the last vision row, longest key first; image pivots where there are fewer."""
    behind = torch.arange(len(norms), device=norms.device) > vision[-1]
    best = norms.masked_fill(~behind, -torch.inf).topk(TEXT_PIVOTS)
    return torch.where(best.values > -torch.inf, best.indices, image_pivots)


def take_in_turn(similarities: Tensor, candidates: Tensor, count: int) -> list[Tensor]:
    """Rows that each pivot takes of those left in `candidates` (T,), least like it first; similarities (pivots, T)."""
    taken = []
    for turn, similarity in enumerate(similarities):
        share = count // len(similarities) + (turn < count % len(similarities))
        rows = similarity.masked_fill(~candidates, torch.inf).topk(share, largest=False).indices
        candidates = candidates.index_fill(0, rows, False)
        taken.append(rows)
    return taken
