"""A decoder without a vision tower, whose prompts name the spans of text that may be dropped.

Shapes: T tokens of all sequences packed, D hidden_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .attention import sent
from .config import LanguageModelConfig
from .decoder import Decoder
from .vlm import PackedInputs, text_behind


@dataclass(frozen=True)
class TextPrompt:
    """Token ids, and the `spans` (first token, end) of them that may be dropped: in order, without overlap, none empty.

    The prefill loop treats their tokens as it treats vision tokens. All other tokens are text, which never leaves. The text
    behind the last span is the question, for methods that read one.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for an empty prompt, and for spans that are out of range, out of order or at the prompt's end."""
        if not self.token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        end_before = 0
        for start, end in self.spans:
            if not end_before <= start < end < len(self.token_ids):
                raise ValueError(
                    f"the spans {self.spans} of a prompt of {len(self.token_ids)} tokens must be in order, not empty, and end "
                    "before the last token, which is read for the answer"
                )
            end_before = end

    @property
    def droppable(self) -> list[bool]:
        """Of each token, whether it may be dropped."""
        inside = {token for start, end in self.spans for token in range(start, end)}
        return [token in inside for token in range(len(self.token_ids))]


class LanguageModel(nn.Module):
    """A decoder alone, under the name that it has in a vision-language model, so that the same code loads and runs both."""

    def __init__(self, config: LanguageModelConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.language_model = Decoder(config.text_config, attention)

    def pack(self, prompts: Sequence[TextPrompt], seeds: tuple[int, ...]) -> PackedInputs:
        """Embed prompts as one packed batch; the tokens of their spans are the vision tokens of the prefill loop."""
        embed_tokens, masks = self.language_model.embed_tokens, [prompt.droppable for prompt in prompts]
        device = embed_tokens.weight.device
        return PackedInputs(
            embed_tokens(sent(torch.tensor([token for prompt in prompts for token in prompt.token_ids]), device)),
            sent(torch.cat([torch.arange(len(mask)) for mask in masks]), device),
            sent(torch.tensor([droppable for mask in masks for droppable in mask]), device),
            tuple(map(len, masks)),
            tuple(map(sum, masks)),
            seeds,
            tuple(tuple((1, 1, end - start) for start, end in prompt.spans) for prompt in prompts),
            question_counts=tuple(map(text_behind, masks)),
        )
