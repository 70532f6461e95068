"""ToMe-style: token merging, your ViT but faster (ICLR 2023, arXiv 2210.09461), once behind the vision tower.

Bipartite soft matching: a picture's tokens are dealt alternately into two sets. Each token of the first set finds the token of
the second set with the most similar key, and the most similar pairs become one token each, the average of all its patches. This
repeats until the count is met. The original merges in every block of the vision tower. Here the tower is unchanged and tokens
merge once after it, so the results differ from those of the original.
Source: github.com/facebookresearch/ToMe, tome/merge.py and tome/patch/timm.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published, check_numbers
from .before_decoder import BeforeDecoder, Picture, Reduced, mean_keys
from .schedule import CountSchedule


class ToMe(BeforeDecoder):
    """Merge the most similar patches of a picture.

    A merged token takes the place of its member of the second set: that patch's number in `vision_indices` and, on Qwen2-VL,
    its position.
    Deviations from the released code:
    - Tokens merge on the tower's output, before the projector. The released code merges a few in every block, between attention
      and MLP, and its attention weighs a token by its size.
    - In later rounds, a token's key is the mean of its patches' keys. The released code uses the keys of the next block.
    - Tokens stay in reading order. The released code puts the rest of the first set before the second set.
    - The class token, which LLaVA drops, takes no part. The released code protects it.
    Keys are averaged over heads, as in the released code. Where tokens are made after the projector, features are averaged.
    """

    name = "tome"
    merges = True
    published: ClassVar[Mapping[str, Published]] = {  # the counts of later papers: its authors did not run LLaVA
        setting: Published(CountSchedule({0: int(setting)})) for setting in ("64", "128", "192")
    }

    def compress_picture(self, picture: Picture, count: int) -> Reduced:
        trace, keys = picture.trace, mean_keys(picture.trace)
        check_numbers(self.name, keys)
        left, home = bipartite_soft_matching(keys, count)
        patches = trace.hidden_states[trace.num_class_tokens :]
        merged = trace.project(average(patches.float(), left, home).to(patches.dtype)).to(picture.features.dtype)
        # The host does not know which tokens are averages: all are projected, and tokens of one patch keep their features.
        is_average = (home == left[:, None]).sum(-1, keepdim=True) > 1
        features = torch.where(is_average, merged, picture.features[left])
        deepstack = picture.deepstack_by(
            lambda values: torch.where(is_average, average(values.float(), left, home).to(values.dtype), values[left])
        )
        return Reduced(features, picture.indices[left], left, deepstack)


def bipartite_soft_matching(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge patches with keys (P, C) until `count` remain: (count,) the remaining ones, and (P,) the one each is part of."""
    patches = torch.arange(len(keys), device=keys.device)
    left, home = patches, patches
    while len(left) > count:
        num_merged = min(len(left) - count, len(left) // 2)
        directions = F.normalize(average(keys, left, home), dim=-1)
        similarity, partner = (directions[::2] @ directions[1::2].T).max(-1)
        order = similarity.argsort(descending=True, stable=True)
        going, staying = order[:num_merged], order[num_merged:]
        home = patches.index_copy(0, left[::2][going], left[1::2][partner[going]])[home]
        left = torch.cat([left[::2][staying], left[1::2]]).sort().values
    return left, home


def average(values: Tensor, left: Tensor, home: Tensor) -> Tensor:
    """(count, C): the mean of the values (P, C) of all patches in a token, so a merged token counts with its size."""
    member = (home == left[:, None]).float()
    return member @ values / member.sum(-1, keepdim=True)
