"""The projector, and the splice: token ids and vision features become one packed sequence of embeddings.

Shapes: T tokens of all sequences packed, B sequences, N pictures, P patches of one picture, D hidden_size of the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VLMConfig
from .decoder import Decoder
from .dropping.base import VisionTrace
from .vision import CLIPVisionTower


@dataclass
class PackedInputs:
    """What prefill reads: B prompts one behind the other, without padding.

    inputs_embeds (T, D); position_ids (T,) or (3, T); vision_mask (T,) True for vision tokens; seqlens: B host integers
    that sum to T. May be left out: `vision_counts` (vision tokens of each prompt), `vision_grids` (frames, rows and columns
    of each picture of each prompt; without it a prompt's vision tokens are one row), `seeds` (one number a prompt, the same
    in every batch: what Random draws from), and `vision` (one a picture), which methods that choose tokens before the
    decoder read.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    vision_mask: Tensor
    seqlens: Sequence[int]
    vision_counts: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    vision_grids: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    vision: tuple[VisionTrace, ...] = ()

    def __post_init__(self) -> None:
        self.seqlens = tuple(int(length) for length in self.seqlens)
        self.check_lengths()
        if not self.vision_counts:  # counted here, once, so that no drop point has to ask the GPU
            self.vision_counts = tuple(int(part.sum()) for part in self.vision_mask.split(self.seqlens))
        self.seeds = self.seeds or (0,) * len(self.seqlens)
        self.vision_grids = self.vision_grids or tuple(((1, 1, count),) if count else () for count in self.vision_counts)
        self.check_grids()

    def check_lengths(self) -> None:
        """Raise ValueError unless every field speaks of the same T tokens."""
        lengths = {
            "sum(seqlens)": sum(self.seqlens),
            "inputs_embeds": self.inputs_embeds.shape[0],
            "position_ids": self.position_ids.shape[-1],
            "vision_mask": self.vision_mask.shape[0],
        }
        if len(set(lengths.values())) > 1 or not self.seqlens or min(self.seqlens) < 1:
            raise ValueError(f"packed inputs disagree on the number of tokens: {lengths}, seqlens {self.seqlens}")


    def check_grids(self) -> None:
        """Raise ValueError unless the grids of each prompt hold its vision tokens."""
        held = tuple(sum(prod(grid) for grid in grids) for grids in self.vision_grids)
        if held != self.vision_counts:
            raise ValueError(f"vision grids {self.vision_grids} hold {held} tokens, the prompts {self.vision_counts}")


class Projector(nn.Module):
    """LLaVA-1.5's mlp2x_gelu: from the tower's width to the decoder's. The GELU is the erf one."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class LlavaModel(nn.Module):
    """LLaVA-1.5: CLIP tower, projector, LLaMA decoder. Source: transformers models/llava/modeling_llava.py."""

    def __init__(self, config: VLMConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTower(config.vision_config, config.vision_layers_run)
        self.multi_modal_projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Decoder(config.text_config, attention)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) -> (N, P, D)"""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def trace(self, block_input: Tensor, hidden_states: Tensor) -> VisionTrace:
        """Of one picture, from the input and output (1 + P, V) of the tower's last block."""
        tower, single = self.vision_tower, block_input[None]
        return VisionTrace(
            hidden_states,
            lambda: tower.class_attention(single)[0],
            lambda: tower.keys(single)[0],
            self.multi_modal_projector,
        )

    def pack(self, prompts: Sequence[Sequence[int]], pixel_values: Tensor | None, seeds: tuple[int, ...]) -> PackedInputs:
        """Embed the prompts' token ids and put the vision features where the image tokens stand, in reading order.

        `prompts`: one list of token ids a sequence, every image token already repeated once a patch. `pixel_values`
        (N, 3, image_size, image_size): the pictures of all prompts in order, or None where there are none.
        Raises ValueError where image tokens and features do not match in number.
        """
        embed_tokens = self.language_model.embed_tokens
        seqlens = tuple(len(prompt) for prompt in prompts)
        flat = [token for prompt in prompts for token in prompt]
        image_token = self.config.image_token_id
        vision_counts = tuple(sum(token == image_token for token in prompt) for prompt in prompts)
        is_vision = [token == image_token for token in flat]
        # The image token's own id may lie outside the embedding table (the original LLaVA vocabulary has no row for it).
        input_ids = torch.tensor([0 if vision else token for token, vision in zip(flat, is_vision, strict=True)])
        inputs_embeds = embed_tokens(input_ids.to(embed_tokens.weight.device))
        traces: tuple[VisionTrace, ...] = ()
        if pixel_values is not None:
            block_inputs, outputs = self.vision_tower.encode(pixel_values)
            traces = tuple(map(self.trace, block_inputs, outputs))
            features = self.multi_modal_projector(outputs[:, 1:]).flatten(0, 1)  # (N * P, D)
            check_counts(sum(vision_counts), len(features))
            rows = torch.tensor([row for row, vision in enumerate(is_vision) if vision], device=features.device)
            inputs_embeds = inputs_embeds.index_copy(0, rows, features.to(inputs_embeds.dtype))
        else:
            check_counts(sum(vision_counts), 0)
        device = inputs_embeds.device
        position_ids = torch.cat([torch.arange(length) for length in seqlens]).to(device)
        grid = (1, self.config.vision_config.grid_size, self.config.vision_config.grid_size)
        grids = tuple((grid,) * (count // prod(grid)) for count in vision_counts)
        mask = torch.tensor(is_vision, device=device)
        return PackedInputs(inputs_embeds, position_ids, mask, seqlens, vision_counts, seeds, grids, traces)


def check_counts(num_placeholders: int, num_features: int) -> None:
    """Raise ValueError unless every image token has its feature."""
    if num_placeholders != num_features:
        raise ValueError(
            f"the prompts hold {num_placeholders} image tokens but the pictures give {num_features} vision features; "
            "repeat each image token once a patch (encode_prompt does) and pass every picture"
        )
