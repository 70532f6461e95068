"""TransPrune: token transition pruning for efficient large vision-language models (CVPR 2026, arXiv 2507.20630).

A token's transition value in a layer is how much attention and MLP turn and lengthen it: the softmax over all tokens of 1 minus
the cosine between the module's input and output, times the ratio of their lengths. The values of the layers before a drop point
add up. The score is this sum plus the attention that the token receives from the question in the next layer. Position ids are
renumbered without gaps after each drop, and decoded tokens continue from each layer's own length.
Source: github.com/liaolea/TransPrune, llava/model/modeling_llama_transprune.py.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.attention import attention_weights
from ..models.decoder import ModuleOutputs
from .base import PrefillState, Published, TokenDropper
from .schedule import DropSchedule, PromptShares

EPSILON = 1e-8


class TransPrune(TokenDropper):
    """Drop the vision tokens with the smallest transitions and least attention from the question.

    Transitions are summed from the layer before the first drop point to the layer before the last one; `marks` holds the sums.
    Deviations from the released code: batches are packed (in the released code, batch 1 only); only the question's rows of
    attention are computed; grouped-query attention works. The question is the text behind the last picture.
    """

    name = "transprune"
    published: ClassVar[Mapping[str, Published]] = {
        "0.875/0.625/0.125": Published(PromptShares({7: 0.875, 9: 0.625, 12: 0.125})),
    }
    earliest_layer = 1  # no module output exists before layer 0
    renumbers = True
    depths = (7 / 32, 9 / 32, 12 / 32)
    leanest = (0.0, 0.714, 0.2)  # the later stages of the published setting

    @property
    def layers_observed(self) -> frozenset[int]:
        return frozenset(layers_summed(self.schedule))

    def begin(self, state: PrefillState) -> PrefillState:
        state.marks = torch.zeros(len(state.hidden_states), device=state.hidden_states.device)
        return state

    def observe(self, state: PrefillState, outputs: ModuleOutputs) -> None:
        assert state.marks is not None  # `begin` set them
        values = transition(*outputs[:2], state.seqlens) + transition(*outputs[2:], state.seqlens)
        own = enumerate(values.split(state.seqlens))  # each prompt of a batch can have its own drop points
        counted = [part * (state.layer_idx in layers_summed(self.schedule.of(index))) for index, part in own]
        state.marks = state.marks + torch.cat(counted)

    def score(self, state: PrefillState) -> Tensor:
        assert state.marks is not None
        return self.normed(state.marks, state) + self.normed(self.question_attention(state), state)

    def normed(self, numbers: Tensor, state: PrefillState) -> Tensor:
        """(T,) numbers divided by their sum over each sequence's vision tokens."""
        of_vision = numbers.masked_fill(~state.vision_mask, 0.0).split(state.seqlens)
        return torch.cat([own / (own.sum() + EPSILON) for own in of_vision])

    def question_attention(self, state: PrefillState) -> Tensor:
        """(T,) attention from the question's rows in this layer, averaged over rows and heads."""
        assert state.project_next is not None
        questions = state.question_rows()
        queries, keys = state.project_next(torch.cat(questions))
        parts = zip(queries.split([len(rows) for rows in questions]), questions, state.spans, strict=True)
        return torch.cat([
            attention_weights(own, keys[start:end], rows - start).mean((0, 1)) for own, rows, (start, end) in parts
        ])  # fmt: skip


def layers_summed(schedule: DropSchedule) -> range:
    """The layer before the first drop point to the layer before the last one."""
    layers = list(schedule)
    return range(layers[0] - 1, layers[-1]) if layers else range(0)


def transition(inputs: Tensor, outputs: Tensor, seqlens: tuple[int, ...]) -> Tensor:
    """(T,) the transition values of one module, from its inputs and outputs (T, D); the softmax is over each sequence."""
    inputs, outputs = inputs.float(), outputs.float()
    turn = 1 - F.cosine_similarity(inputs, outputs, dim=-1)
    ratio = outputs.norm(dim=-1) / inputs.norm(dim=-1)
    return torch.cat([own.softmax(0) for own in turn.split(seqlens)]) * ratio
