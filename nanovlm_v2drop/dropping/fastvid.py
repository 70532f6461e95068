"""FastVID: dynamic density pruning for fast video large language models (NeurIPS 2025).

Before the decoder, a video is cut into segments of similar frames. Each segment keeps context anchors, the density peaks of
every fourth frame, and salient tokens of all frames. The other tokens of a segment are averaged into their nearest anchor.
Position ids are kept. Source: github.com/LunarShen/FastVID, modeling_qwen2.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published, check_numbers
from .before_decoder import BeforeDecoder, Picture, Reduced, best_in_frames
from .schedule import DropSchedule

CUTS, SIMILAR = 7, 0.9  # cuts at the least similar neighbouring frames, and at all that are less similar than this
ANCHOR_SHARE, ANCHOR_STEP = 0.4, 4  # of the kept tokens, and of the frames of a segment
NEIGHBOURS = 4
OWN_WEIGHT = 0.6  # smallest weight of an anchor in its average


class FastVID(BeforeDecoder):
    """Keep density peaks of every fourth frame, into which other tokens are averaged, and salient tokens of all frames.

    Deviations from the released code: salience is the attention that a patch receives in the tower's last block (in the
    released code, that of SigLIP's pooling head, which LLaVA checkpoints do not hold). Frames are compared by the mean of their
    features. Exactly the asked number stays, shared between frames by largest remainder. Equal densities are not told apart by
    noise. The released code has no outputs here to compare with, so this file follows a description of it.
    """

    name = "fastvid"
    merges = True
    renumbers = False
    published: ClassVar[Mapping[str, Published]] = {"r=0.10": Published(DropSchedule({0: 0.10}))}

    def compress_picture(self, picture: Picture, count: int) -> Reduced:
        tokens, newlines = picture.frames_and_newlines()
        shared = max(count - len(newlines), 0)
        num_anchors = int(shared * ANCHOR_SHARE)
        features = picture.features[tokens].float()  # (frames, n, D)
        segments, has_anchors = segments_of(features)
        anchors = anchors_of(features, has_anchors, num_anchors)
        salience = picture.trace.received_attention().float().mean(0)[tokens]
        check_numbers(self.name, salience)
        salience = salience.flatten().index_fill(0, anchors, -torch.inf).view_as(salience)
        even = torch.full((len(tokens),), (shared - num_anchors) / len(tokens), device=tokens.device)
        salient = best_in_frames(salience, even, shared - num_anchors)
        joins = joins_of(features, segments, anchors, salient)
        places = torch.cat([newlines[:count], tokens.flatten()[salient], tokens.flatten()[anchors]])
        ordered, order = places.sort()

        def reduce(values: Tensor) -> Tensor:
            averaged = averages(values[tokens].flatten(0, 1).float(), anchors, joins)
            return torch.cat([values[places[: count - num_anchors]], averaged.to(values.dtype)])[order]

        return Reduced(reduce(picture.features), picture.indices[ordered], ordered, picture.deepstack_by(reduce))


def segments_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """(frames,) number of each frame's segment, and whether the frame holds anchors; features (frames, n, D)."""
    frames = features.mean(1)
    similarity = F.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    is_cut = (similarity.argsort().argsort() < CUTS) | (similarity < SIMILAR)
    starts = F.pad(is_cut, (1, 0), value=True)
    places = torch.arange(len(features), device=features.device)
    first = torch.where(starts, places, 0).cummax(0).values
    return starts.cumsum(0), (places - first) % ANCHOR_STEP == 0


def anchors_of(features: Tensor, has_anchors: Tensor, count: int) -> Tensor:
    """(count,) density peaks of the frames that hold anchors, numbered through, as many of each."""
    scores = peak_scores(features)
    lowest = scores.min() - 1  # other frames give tokens only where these frames have too few
    scores = torch.where(has_anchors[:, None], scores, lowest - torch.arange(scores.shape[1], device=scores.device))
    ideal = torch.where(has_anchors, count / has_anchors.sum(), -features.shape[1])
    return best_in_frames(scores, ideal, count)


def peak_scores(features: Tensor) -> Tensor:
    """(frames, n) logarithm of a token's density in its frame times its distance to a denser token; features (frames, n, D)."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") * features.shape[-1] ** -0.5
    density = -distances.topk(min(NEIGHBOURS, features.shape[1]), largest=False).values.square().mean(-1)
    is_denser = density[:, None, :] > density[:, :, None]
    apart = torch.where(is_denser, distances, distances.amax((1, 2), keepdim=True)).amin(-1)
    return density + apart.clamp(min=torch.finfo(apart.dtype).tiny).log()


def joins_of(features: Tensor, segments: Tensor, anchors: Tensor, salient: Tensor) -> Tensor:
    """(tokens, A) 1 where a token joins an anchor: the nearest one of its segment, if the token is not kept itself."""
    flat = features.flatten(0, 1)
    own, segment = flat[anchors], segments.repeat_interleave(features.shape[1])
    if not len(anchors):
        return flat[:, :0]
    is_kept = torch.zeros_like(segment, dtype=torch.bool).index_fill(0, torch.cat([anchors, salient]), True)
    similarity = F.normalize(flat, dim=-1) @ F.normalize(own, dim=-1).T
    similarity = similarity.masked_fill(segment[:, None] != segment[anchors], -torch.inf)
    nearest = similarity.max(-1)
    joins = (nearest.indices[:, None] == torch.arange(len(anchors), device=anchors.device)).float()
    return joins * (~is_kept & (nearest.values > -torch.inf))[:, None]


def averages(values: Tensor, anchors: Tensor, joins: Tensor) -> Tensor:
    """(A, C) the values of the anchors, each with the mean of the tokens (tokens, C) that join it."""
    own = values[anchors]
    count = joins.sum(0)[:, None]
    weight = torch.where(count > 0, (1 / (count + 1)).clamp(min=OWN_WEIGHT), 1.0)
    return weight * own + (1 - weight) * (joins.T @ values) / count.clamp(min=1)
