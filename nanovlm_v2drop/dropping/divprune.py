"""DivPrune: diversity-based visual token pruning for large multimodal models (CVPR 2025, arXiv 2503.02175).

Before the decoder, the kept tokens are those that are farthest from each other: every new token is the one whose smallest
distance to the chosen ones is largest (max-min diversity). A distance is 1 minus the cosine of the projected features.
Written from the paper; the authors' code (github.com/vbdi/divprune) has a non-commercial licence.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published
from .before_decoder import BeforeDecoder, Picture
from .schedule import CountSchedule

BLOCK = 1024  # rows of similarities in memory at once


class DivPrune(BeforeDecoder):
    """Keep the tokens that differ most from each other.

    The first token is the one whose nearest other token is farthest. Only the smallest distance of each token to the chosen
    ones is stored, so memory grows with the number of tokens and not with its square. Deviations from the released code:
    distances are in float32 (in the released code, in the model's dtype; bfloat16 changes up to half of the kept tokens). A
    chosen token is never chosen again (in the released code, equal tokens can be). Every picture and every sequence is reduced
    (in the released code, batch item 0 with the picture at row 35).
    """

    name = "divprune"
    published: ClassVar[Mapping[str, Published]] = {
        "0.098": Published(CountSchedule({0: 56})),  # the default of its scripts: round(0.098 * 576)
        "64": Published(CountSchedule({0: 64})),
        "128": Published(CountSchedule({0: 128})),
        "192": Published(CountSchedule({0: 192})),
    }

    def choose(self, picture: Picture, count: int) -> Tensor:
        return farthest_points(F.normalize(picture.features.float(), dim=-1), count)


def farthest_points(directions: Tensor, count: int) -> Tensor:
    """(count,) rows of directions (P, D), which have length 1, in the order in which they are chosen."""
    distance = 1 - nearest_similarity(directions)
    chosen = [distance.argmax()[None]]
    distance = torch.full_like(distance, torch.inf)
    for _ in range(count - 1):
        to_newest = 1 - (directions @ directions.index_select(0, chosen[-1]).T)[:, 0]
        distance = torch.minimum(distance, to_newest).index_fill(0, chosen[-1], -torch.inf)
        chosen.append(distance.argmax()[None])
    return torch.cat(chosen)


def nearest_similarity(directions: Tensor) -> Tensor:
    """(P,) the largest cosine of each row of directions (P, D) with another row."""
    largest = []
    for start in range(0, len(directions), BLOCK):
        similarities = directions[start : start + BLOCK] @ directions.T
        similarities.diagonal(start).fill_(-torch.inf)
        largest.append(similarities.amax(-1))
    return torch.cat(largest)
