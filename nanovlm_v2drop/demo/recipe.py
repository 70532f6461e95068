"""What a demo's training consists of: sizes and rates, and what differs between pictures and clips."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from ..models.config import VLMConfig
from .data import InstructBatches, World, normalised


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of one training run."""

    tower_steps: int = 2500
    tower_batch: int = 64
    tower_rate: float = 1.5e-3
    instruct_steps: int = 2000
    instruct_batch: int = 32
    muon_rate: float = 4e-3
    adam_rate: float = 1.5e-3
    weight_decay: float = 0.02
    late_weight_decay: float = 1.5  # from late_step on; it shrinks weights that no answer needs
    late_step: int = 1250
    stop_step: int = 2000  # an earlier step exports what the model has learnt by then
    text_tokens: int = 136  # tokens for all questions about one picture or clip
    seed: int = 0


@dataclass(frozen=True)
class Demo:
    """What differs between the two demos.

    `media_features` turns the output of the frozen tower for one batch into vision tokens, in the decoder's order. With
    `warm`, training starts from the weights of demo.
    """

    world: World
    make_tokenizer: Callable[[], Tokenizer]
    make_config: Callable[[Tokenizer], VLMConfig]
    make_model: Callable[[Any], Any]
    media_features: Callable[[Any, Tensor], Tensor]
    export: Callable[[Any, Tokenizer, Path], None]
    vision_tokens: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    recipe: Recipe
    warm: bool = False

    def pixel_values(self, pictures: Tensor) -> Tensor:
        """(N, 144, 144, 3) or (N, F, 144, 144, 3) uint8 -> (N or N * F, 3, 144, 144) float32"""
        return normalised(pictures.reshape(-1, *pictures.shape[-3:]), self.image_mean, self.image_std)

    def instruct_batches(self, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> InstructBatches:
        eos_token = self.make_config(tokenizer).eos_token_ids[0]
        return InstructBatches(
            self.world,
            tokenizer,
            eos_token=eos_token,
            vision_tokens=self.vision_tokens,
            batch=recipe.instruct_batch,
            text_tokens=recipe.text_tokens,
            seed=seed,
        )


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """The vocabulary's size, rounded up to a multiple of 64."""
    return -(-tokenizer.get_vocab_size() // 64) * 64
