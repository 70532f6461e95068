"""ToMe-style: token merging, your ViT but faster (ICLR 2023, arXiv 2210.09461), once behind the vision tower.

Bipartite soft matching: a picture's tokens fall by turns into two sets; each token of the first finds the token of the second
whose key is most similar, and the most similar pairs become one token each, the average of all patches in it. This is repeated
until the count is met. The original merges in every block of the tower; this is the reference that stands for it where the
tower stays as it is, so its numbers are not those of the original.
Source: github.com/facebookresearch/ToMe, tome/merge.py and tome/patch/timm.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.vision import VisionTrace
from .base import Published, check_numbers
from .before_decoder import BeforeDecoder, mean_keys
from .schedule import CountSchedule


class ToMe(BeforeDecoder):
    """Merge the patches of a picture that are most alike.

    A merged token stands in the place of its member of the second set: it has that patch's number in `vision_indices` and, on
    Qwen2-VL, its position.
    Deviations from the released code: tokens merge on the tower's output, before the projector (there, a few in every block,
    between attention and MLP, and attention weighs a token by its size); in later rounds a token's key is the mean of its
    patches' keys (there, the next block's own); tokens stay in reading order (there, what is left of the first set comes before
    the second); the class token, which LLaVA drops, takes no part (there, it is protected). Keys are averaged over heads, as
    there; where tokens are made behind the projector, the features themselves are averaged.
    """

    name = "tome"
    published: ClassVar[Mapping[str, Published]] = {  # its authors ran no LLaVA: what later papers compare it at
        setting: Published(CountSchedule({0: int(setting)})) for setting in ("64", "128", "192")
    }

    def compress_picture(
        self, trace: VisionTrace, features: Tensor, indices: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys = mean_keys(trace)
        check_numbers(self.name, keys)
        left, home = bipartite_soft_matching(keys, count)
        patches = trace.hidden_states[trace.num_class_tokens :]
        merged = trace.project(average(patches.float(), left, home).to(patches.dtype)).to(features.dtype)
        # Which tokens are averages only the device knows: all are projected, and those of one patch stay bit for bit.
        is_average = (home == left[:, None]).sum(-1, keepdim=True) > 1
        return torch.where(is_average, merged, features[left]), indices[left], left


def bipartite_soft_matching(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge patches with keys (P, C) until `count` are left: (count,) those left, and (P,) the one that each became part of."""
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
    """(count, C): mean of the values (P, C) of all patches in a token, which weighs every merged token by its size."""
    member = (home == left[:, None]).float()
    return member @ values / member.sum(-1, keepdim=True)
