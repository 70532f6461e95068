"""CDPruner: beyond attention or similarity, maximizing conditional diversity (NeurIPS 2025, arXiv 2506.10967).

Before the decoder, tokens are chosen that are relevant to the question and differ from each other: the greedy choice of a
determinantal point process with the kernel relevance_i * cosine(i, j) * relevance_j of the projected features.
Source: github.com/Theia-4869/CDPruner, llava/model/llava_arch.py and multimodal_encoder/clip_encoder.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Published
from .before_decoder import BeforeDecoder, Picture
from .schedule import CountSchedule

SMALLEST_RESIDUAL = 1e-6  # of the largest one: below it, a token is a combination of the chosen ones


class CDPruner(BeforeDecoder):
    """Keep tokens that are relevant to the question and differ from each other.

    The relevance of a token is its mean cosine with the embeddings of the question's text tokens in the decoder, scaled to 0 to
    1 over the pictures of the prompt. The authors' LLaVA takes the similarity of CLIP's own image and text towers instead
    (`clip_relevance`). LLaVA checkpoints hold neither CLIP's text tower nor its projections, so this file follows the variant
    without CLIP, as shipped in OpenVINO GenAI. Deviations from the released code: similarities are in float32. A chosen token
    is never chosen again, so the count is met even where the features have a lower rank (in the released code, fewer tokens are
    kept). Equal relevance everywhere counts as 1.
    """

    name = "cdpruner"
    published: ClassVar[Mapping[str, Published]] = {
        setting: Published(CountSchedule({0: int(setting)})) for setting in ("64", "32", "128", "192")
    }

    def choose(self, picture: Picture, count: int) -> Tensor:
        of_all = question_relevance(picture.prompt_features, picture.question)
        own = question_relevance(picture.features, picture.question)
        return self.diverse(picture.features, scaled(own, of_all), count)

    @staticmethod
    def diverse(features: Tensor, relevance: Tensor, count: int) -> Tensor:
        """(count,) tokens, ascending: the greedy choice for features (P, D) and their relevance (P,)."""
        return greedy_choice(F.normalize(features.float(), dim=-1) * relevance.float()[:, None], count).sort().values


def question_relevance(features: Tensor, question: Tensor) -> Tensor:
    """(P,) mean cosine of each feature (P, D) with the text embeddings (Q, D), in float32."""
    return F.normalize(features.float(), dim=-1) @ F.normalize(question.float(), dim=-1).mean(0)


def clip_relevance(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """(P,) relevance of the released code, from CLIP's projected patches (P, C) and text pieces (M, C).

    The cosine of CLIP's patches with a text is inverted: patches that show the text have lower ones. All tiles of a picture are
    scaled together.
    """
    inverted = -question_relevance(image_embeds, text_embeds)
    return (inverted - inverted.min() + 1e-6) / (inverted.max() - inverted.min())


def scaled(relevance: Tensor, of_all: Tensor) -> Tensor:
    """Relevance (P,) on a scale where the smallest `of_all` is 0 and the largest 1; all 1 where these are equal."""
    lowest, highest = of_all.aminmax()
    return torch.where(highest > lowest, (relevance - lowest) / (highest - lowest), 1.0).clamp(0, 1)


def greedy_choice(vectors: Tensor, count: int) -> Tensor:
    """(count,) rows of vectors (P, D) in the order in which the greedy choice by determinant takes them.

    Each step takes the row with the largest residual, and removes its direction from the residuals of the others.
    """
    residual = vectors.square().sum(-1)
    smallest = residual.max() * SMALLEST_RESIDUAL
    factors, chosen = vectors.new_zeros(count, len(vectors)), []
    for step in range(count):
        newest = residual.argmax()[None]
        chosen.append(newest)
        own, products = residual.index_select(0, newest), vectors @ vectors.index_select(0, newest)[0]
        removed = products - factors.index_select(1, newest)[:, 0] @ factors
        factor = torch.where(own > smallest, removed * own.clamp(min=smallest).rsqrt(), 0.0)
        factors[step] = factor
        residual = (residual - factor.square()).index_fill(0, newest, -torch.inf)
    return torch.cat(chosen)
