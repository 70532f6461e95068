"""DART: stop looking for important tokens, duplication matters more (EMNLP 2025, arXiv 2502.11494).

At the input of layer K a few tokens are chosen as pivots: the image tokens, and the text tokens after the picture, whose keys
in layer K - 1 have the largest norm. One after another, the pivots take the image tokens that are least similar to them. The
similarity is the cosine of the hidden states after the model's final norm. The tokens that no pivot took are duplicates of kept
ones and leave. Position ids are kept.
Source: github.com/ZichenWen1/DART, llava/model/language_model/modeling_llama_self.py.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PrefillState, Published, TokenDropper, check_numbers
from .schedule import CountSchedule, DropSchedule

IMAGE_PIVOTS, TEXT_PIVOTS = 4, 4
PIVOTS = IMAGE_PIVOTS + TEXT_PIVOTS
PIVOT_ORDERS = ("rank", "released")


class EqualPicks(DropSchedule):
    """Layer -> share of the vision tokens that the pivots take. All pivots take equally many; the image pivots are added."""

    def kept_count(self, layer_idx: int, current: int) -> int:
        return min(current, IMAGE_PIVOTS + PIVOTS * int(current * self[layer_idx] / PIVOTS))


def published_count(max_num_trunction: int) -> Published:
    """A setting of the LLaVA scripts. They name the number that the pivots take together; the image pivots are added."""
    taken = PIVOTS * (max_num_trunction // PIVOTS)
    return Published(CountSchedule({2: IMAGE_PIVOTS + taken}), MappingProxyType({"pivot_order": "released"}))


class DART(TokenDropper):
    """Drop the vision tokens that duplicate kept ones.

    `pivot_order` changes the result, because a token taken by one pivot is not available to the next. "rank": image pivots,
    then text pivots, largest key norm first. "released": the order in which a Python set lists their rows, mostly by row
    modulo 32. With "released", a longer system prompt therefore changes the kept tokens.
    Deviations from the released code: every sample has its own pivots (the released code runs with batch 1 only). Any number
    of tokens can be kept: the first pivots may take one token more than the last ones, and four tokens or fewer are image
    pivots alone. The released code fails where fewer than four text tokens follow the picture; here, image pivots take a second
    turn in place of the missing ones. All pictures of a prompt form one pool, and the text after the last picture is its text.
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

    def __init__(self, schedule: DropSchedule, pivot_order: str = "rank", **options: Any) -> None:
        super().__init__(schedule, **options)
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
        # The order of a Python set is known on the host only, so this setting waits for the GPU once.
        rows = pivots.tolist()
        return pivots.new_tensor(sorted(rows, key=list(set(rows)).index))


def key_norms(state: PrefillState) -> Tensor:
    """(T,) L1 norm of each token's key in the previous layer, over all heads."""
    _, keys = state.queries_and_keys()
    return torch.linalg.vector_norm(keys.flatten(1), 1, dim=-1, dtype=torch.promote_types(keys.dtype, torch.float32))


def text_pivots(vision: Tensor, norms: Tensor, image_pivots: Tensor) -> Tensor:
    """(4,) text rows after the last vision row, largest key norm first. Image pivots replace missing text rows."""
    behind = torch.arange(len(norms), device=norms.device) > vision[-1]
    best = norms.masked_fill(~behind, -torch.inf).topk(TEXT_PIVOTS)
    return torch.where(best.values > -torch.inf, best.indices, image_pivots)


def take_in_turn(similarities: Tensor, candidates: Tensor, count: int) -> list[Tensor]:
    """The rows that each pivot takes from `candidates` (T,), least similar first; similarities (pivots, T)."""
    taken = []
    for turn, similarity in enumerate(similarities):
        share = count // len(similarities) + (turn < count % len(similarities))
        rows = similarity.masked_fill(~candidates, torch.inf).topk(share, largest=False).indices
        candidates = candidates.index_fill(0, rows, False)
        taken.append(rows)
    return taken
