"""VidCom2: video compression commander, plug-and-play inference acceleration for video LLMs (EMNLP 2025, arXiv 2505.14454).

Before the decoder, a video's tokens are compared with the centre of the video and with the centre of their frame. Frames that
differ more from the video get more tokens, and each frame keeps its most unusual ones.
Source: github.com/xuyang-liu16/VidCom2, token_compressor/vidcom2/vidcom2.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published
from .before_decoder import BeforeDecoder, Picture, best_in_frames
from .schedule import DropSchedule

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the Gaussians that measure similarity
TEMPERATURE = 0.01  # of the softmax over frames


class VidCom2(BeforeDecoder):
    """Keep the most unusual tokens of a video, more in the frames that differ from it. A picture is a video of one frame.

    Deviations from the released code: exactly the asked number stays. Every frame has at least one token, and the rest follows
    the frames' rates by largest remainder; what a frame cannot use goes to the others (in the released code, each frame's
    number is rounded, and the rest of a full frame is lost). Similarities are in float32. LLaVA-OneVision's newline stays, as
    its grid is smaller than any share. LLaVA-Video's newlines stay too and are counted.
    """

    name = "vidcom2"
    published: ClassVar[Mapping[str, Published]] = {
        "R=0.25": Published(DropSchedule({0: 0.25})),
        "R=0.15": Published(DropSchedule({0: 0.15})),
    }

    def choose(self, picture: Picture, count: int) -> Tensor:
        tokens, newlines = picture.frames_and_newlines()
        shared = max(count - len(newlines), 0)
        to_video, to_frame = similarities(picture.features[tokens].float())
        ideal = frame_rates(to_video, shared / tokens.numel()) * tokens.shape[1]
        best = best_in_frames(-(to_video + to_frame), ideal, shared, every_frame=True)
        return torch.cat([newlines[:count], tokens.flatten()[best]])


def similarities(features: Tensor) -> tuple[Tensor, Tensor]:
    """(frames, n) each: how near every token is to the centre of the video and of its frame; features (frames, n, D).

    Only the half of the channels that varies least over the video is used.
    """
    flat = features.flatten(0, 1)
    channels = flat.var(0, correction=0).topk(flat.shape[1] // 2, largest=False).indices
    directions = F.normalize(features[..., channels], dim=-1)
    video = directions.mean((0, 1), keepdim=True)
    frame = directions.mean(1, keepdim=True)
    return gaussians(directions - video), gaussians(directions - frame)


def gaussians(differences: Tensor) -> Tensor:
    """(...,) the sum over WIDTHS of exp(-|x|^2 / (2 width)) for differences x (..., D)."""
    squares = differences.square().sum(-1)
    return torch.stack([(-squares / (2 * width)).exp() for width in WIDTHS]).sum(0)


def frame_rates(to_video: Tensor, rate: float) -> Tensor:
    """(frames,) share of each frame's tokens: `rate` on average, more in frames that are less like the video; at most 1."""
    importance = -to_video.mean(-1)
    extra = ((importance - importance.max()) / TEMPERATURE).softmax(0)
    return (rate * (1 + extra - extra.mean())).clamp(max=1)
