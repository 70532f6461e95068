"""V2Drop: variation-aware vision token dropping (CVPR 2026, arXiv 2509.01552).

Section 3.3: at a drop layer L, the vision tokens that layer L - 1 changed least leave the sequence. The change is the input of
layer L minus the input of layer L - 1: the residual stream, before any norm. No attention matrix is read.
Source: github.com/xuyang-liu16/V2Drop, llava/model/language_model/V2Drop.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PrefillState, Published, TokenDropper
from .schedule import DropSchedule

METRICS = ("l2", "l1", "cosine")

# LLaVA-1.5-7B: 32 layers, 576 vision tokens. Mean tokens a layer: 202.8, 193.75, 131.0 and 66.7.
PUBLISHED_SCHEDULES = {
    "released-code": DropSchedule({3: 0.5, 17: 0.5, 22: 0.0}),
    "paper-192": DropSchedule({3: 0.5, 17: 0.3, 22: 0.0}),
    "paper-128": DropSchedule({3: 0.28, 17: 0.25, 22: 0.0}),
    "paper-64": DropSchedule({3: 0.05, 17: 0.05, 22: 0.0}),
}


class V2Drop(TokenDropper):
    """Drop the vision tokens that the last layer changed least.

    `metric`: "l2" (the paper's), "l1", or "cosine" (the metric of the released code until March 2026). `with_deepstack`: what
    Qwen3-VL's tower adds to the vision tokens behind the first layers counts as change too. By default, it does not, because
    the decoder has not made it.
    Deviations from the released code: every sample ranks its own tokens (in the released code, sample 0 decides for the whole
    batch); the vision span comes from the token ids (in the released code, it is rows 35 to 610); norms are accumulated in
    float32.
    """

    name = "v2drop"
    published: ClassVar[Mapping[str, Published]] = {
        **{setting: Published(schedule) for setting, schedule in PUBLISHED_SCHEDULES.items()},
        "released-qwen2-vl": Published(DropSchedule({3: 0.25, 16: 0.05, 22: 0.0}), num_layers=28),
    }
    earliest_layer = 1  # no layer exists before layer 0

    def __init__(self, schedule: DropSchedule, metric: str = "l2", with_deepstack: bool = False, **options: Any) -> None:
        super().__init__(schedule, **options)
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; choose one of: {', '.join(METRICS)}")
        self.metric, self.with_deepstack = metric, with_deepstack

    def score(self, state: PrefillState) -> Tensor:
        assert state.previous is not None  # prefill refuses a schedule that drops at layer 0
        now = state.hidden_states if self.with_deepstack else state.previous_output
        if self.metric == "cosine":
            return -F.cosine_similarity(now.float(), state.previous.float(), dim=-1)
        order = 2 if self.metric == "l2" else 1
        change = now - state.previous
        return torch.linalg.vector_norm(change, order, dim=-1, dtype=torch.promote_types(change.dtype, torch.float32))
