"""VisionZip: longer is better but not necessary in vision language models (CVPR 2025, arXiv 2412.04467).

Before the decoder, the class token and the patches that receive most attention from it in the vision tower are kept. A few
evenly spaced ones of the other patches become contextual tokens: each adds the mean of the patches whose keys are most similar
to its own. This happens on the tower's output, before the projector.
Source: github.com/dvlab-research/VisionZip, visionzip/main.py, visionzip/clip_encoder.py and visionzip/utils.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published, check_numbers
from .before_decoder import BeforeDecoder, Picture, Reduced, mean_keys
from .schedule import CountSchedule, DropSchedule
from .state import MERGED


class VisionZip(BeforeDecoder):
    """Keep the patches that receive most attention from the class token, and summarise the others in a few contextual tokens.

    A picture becomes: the class token, the kept patches in reading order, the contextual tokens. `contextual_share` is the
    share of the contextual tokens; the authors' 10 of 64, 20 of 128 and 30 of 192 are all 5 / 32. On Qwen2-VL, a contextual
    token has the place of the patch that the others join, and stands in reading order among the kept patches. Deviations from
    the released code: keys, similarities and means are in float32 (in the released code, in half precision). Only the class
    token's row of attention is computed (in the released code, every block writes its whole matrix). The count is per sequence
    (in the released code, per picture). A picture with one token left keeps its best patch (in the released code, the class
    token). Towers without a class token rank by the mean attention that a patch receives from all patches, as in the paper.
    Where tokens are made after the projector (LLaVA-OneVision's tiles and frames, Qwen2-VL's merged patches), attention and
    keys are arranged like the features, and the features themselves are summarised.
    """

    name = "visionzip"
    merges = True
    published: ClassVar[Mapping[str, Published]] = {
        "64": Published(CountSchedule({0: 64})),  # main.py's example: the class token, 53 patches, 10 contextual tokens
        "128": Published(CountSchedule({0: 128})),  # 1 + 107 + 20
        "192": Published(CountSchedule({0: 192})),  # 1 + 161 + 30
    }

    def __init__(self, schedule: DropSchedule, contextual_share: float = 5 / 32, **options: Any) -> None:
        super().__init__(schedule, **options)
        if not 0.0 <= contextual_share < 1.0:
            raise ValueError(f"contextual_share {contextual_share} must be in [0, 1)")
        self.contextual_share = contextual_share

    def compress_picture(self, picture: Picture, count: int) -> Reduced:
        trace, features, indices = picture.trace, picture.features, picture.indices
        num_class, num_patches, num_contextual = self.split(count, trace.num_class_tokens)
        attention, patches = trace.received_attention(), trace.hidden_states[trace.num_class_tokens :]
        check_numbers(self.name, attention)
        ranked = attention.sum(0).argsort(descending=True, stable=True)
        kept, others = ranked[:num_patches].sort().values, ranked[num_patches:].sort().values
        targets = evenly_spaced(len(others), num_contextual)
        combine = partial(contextual_tokens, keys=mean_keys(trace)[others], targets=targets)
        contextual = combine(patches[others].float())
        made = trace.project(torch.cat([trace.hidden_states[:num_class], contextual.to(patches.dtype)])).to(features.dtype)
        tokens = [made[:num_class], features[kept], made[num_class:]]
        places = [kept.new_zeros(num_class), kept, others[targets]]
        deepstack = picture.deepstack_by(
            lambda values: F.pad(torch.cat([values[kept], combine(values[others].float())]), (0, 0, num_class, 0))
        )
        indices = F.pad(indices[kept], (num_class, num_contextual), value=MERGED)
        return Reduced(torch.cat(tokens), indices, torch.cat(places), deepstack)

    def split(self, count: int, num_class_tokens: int) -> tuple[int, int, int]:
        """The numbers of class tokens, patches and contextual tokens among `count` tokens; at least one is a patch."""
        num_class = min(num_class_tokens, count - 1)
        num_contextual = min(int(count * self.contextual_share), count - 1 - num_class)
        return num_class, count - num_class - num_contextual, num_contextual


def evenly_spaced(length: int, count: int) -> slice:
    """`count` evenly spaced places of 0, 1, ..., length - 1, from 0 on."""
    step = length // max(count, 1)
    return slice(0, step * count, step)


def contextual_tokens(hidden_states: Tensor, keys: Tensor, targets: slice) -> Tensor:
    """(count, V): the `targets` of hidden_states (R, V), each plus the mean of the rows whose keys (R, C) are nearest to it."""
    count = len(hidden_states[targets])
    if count == 0:
        return hidden_states[targets]
    directions = F.normalize(keys, dim=-1)
    nearest = (directions @ directions[targets].T).argmax(-1, keepdim=True)
    joins = (nearest == torch.arange(count, device=keys.device)).float()  # (R, count)
    joins[targets] = 0  # a target is not part of a mean
    means = joins.T @ hidden_states / joins.sum(0).clamp(min=1)[:, None]
    return hidden_states[targets] + means
