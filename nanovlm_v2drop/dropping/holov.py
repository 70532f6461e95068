"""HoloV: don't just chase highlighted tokens in MLLMs, holistic context retention (NeurIPS 2025, arXiv 2510.02912).

Before the decoder, a picture is cut into 16 runs of tokens in reading order. Every run keeps a number of tokens in proportion
to its score, namely those with most attention from the class token. Source: github.com/obananas/HoloV, llava/model/utils.py,
llava_arch.py and clip_encoder.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Published, check_numbers
from .before_decoder import BeforeDecoder, Picture, Reduced
from .schedule import CountSchedule, DropSchedule
from .state import MERGED

RUNS = 16
ATTENTION_SCALE, VARIANCE_WEIGHT = 1000, 0.09


class HoloV(BeforeDecoder):
    """Keep the tokens with most attention from the class token in each of 16 runs, more in a run with more attention.

    The released code adds the variance of a token's similarities to its attention, but rescales it to the mean attention of the
    run before it averages. So the variance cancels: a run's score is 1090 times its mean attention, and the features do not
    matter. This file computes that score from attention alone. `released`: as in the released code, a run with a budget above
    its size does not pass the rest on. Zero vectors fill the count at the end, and a run that keeps some of its tokens has them
    in order of falling attention. Without `released`, the other runs get the rest and tokens stay in reading order. Deviations
    from the released code: attention is in float32; every sequence of a batch has its own ranking.
    """

    name = "holov"
    published: ClassVar[Mapping[str, Published]] = {
        setting: Published(CountSchedule({0: int(setting)}), {"released": True}) for setting in ("64", "128", "192")
    }

    def __init__(self, schedule: DropSchedule, released: bool = False, **options: Any) -> None:
        super().__init__(schedule, **options)
        self.released = released

    def compress_picture(self, picture: Picture, count: int) -> Reduced:
        if not self.released:
            return super().compress_picture(picture, count)
        runs = Runs(self.attention(picture))
        budgets = runs.budgets(count)
        is_kept = runs.ranks < budgets[runs.run_of]
        whole = budgets >= runs.sizes
        place_in_run = torch.where(whole[runs.run_of], runs.place_in_run, runs.ranks)
        order = torch.where(is_kept, runs.run_of * len(is_kept) + place_in_run, len(is_kept) ** 2)
        places = order.argsort(stable=True)[:count]
        is_kept = is_kept[places]
        indices = torch.where(is_kept, picture.indices[places], MERGED)
        deepstack = picture.deepstack_by(lambda values: values[places] * is_kept[:, None])
        return Reduced(picture.features[places] * is_kept[:, None], indices, places, deepstack)

    def choose(self, picture: Picture, count: int) -> Tensor:
        runs = Runs(self.attention(picture))
        # A run's tokens have the priorities budget, budget - 1, ... The first ones fill the budgets, and what a run cannot use
        # goes to the next tokens of the others, heaviest run first.
        priority = (runs.budgets(count)[runs.run_of] - runs.ranks).double() + runs.weights.double()[runs.run_of] / 2
        return priority.topk(count).indices

    def attention(self, picture: Picture) -> Tensor:
        """(P,) attention that each token receives, averaged over heads, in float32."""
        attention = picture.trace.received_attention().float().mean(0)
        check_numbers(self.name, attention)
        return attention


class Runs:
    """The runs of a picture: of each token its run, its place there, and its rank by attention (P,); of each run its weight."""

    def __init__(self, attention: Tensor) -> None:
        tokens, device = len(attention), attention.device
        count = min(RUNS, tokens)
        sizes = [tokens // count + (run < tokens % count) for run in range(count)]  # the first runs are one longer
        runs = torch.arange(count, device=device)
        self.sizes = tokens // count + (runs < tokens % count).long()
        self.run_of = torch.cat([run.expand(size) for run, size in zip(runs, sizes, strict=True)])
        self.place_in_run = torch.cat([torch.arange(size, device=device) for size in sizes])
        parts = attention.split(sizes)
        self.ranks = torch.cat([part.argsort(descending=True, stable=True).argsort() for part in parts])
        # A run of one token keeps its plain attention, as in the released code.
        scores = [own.mean() * (ATTENTION_SCALE * (1 + VARIANCE_WEIGHT) if len(own) > 1 else 1) for own in parts]
        self.weights = torch.stack(scores) / (torch.stack(scores).sum() + 1e-6)

    def budgets(self, count: int) -> Tensor:
        """(runs,) the tokens of each run: its share of `count`, rounded down, and one more for the heaviest runs."""
        shares = (self.weights * count).floor().long()
        rank = self.weights.argsort(descending=True, stable=True).argsort()
        return shares + (rank < count - shares.sum()).long()
