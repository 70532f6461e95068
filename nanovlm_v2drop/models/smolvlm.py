"""SmolVLM, and nanoVLM, which is made of the same parts: SigLIP with its last norm, pixel shuffle, one projection, LLaMA.

Source: transformers models/smolvlm/modeling_smolvlm.py.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .attention import sent
from .config import SiglipVisionConfig, SmolVLMConfig
from .decoder import Decoder
from .vision import SiglipEmbeddings, SiglipVisionTower, VisionTower
from .vlm import VLM, Encoded, VisionInput, traces_of


class SmolVLMEmbeddings(SiglipEmbeddings):
    """SigLIP's, with the position of a patch found by its coordinates between 0 and 1, as the model was trained."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.positions = patch_positions(config.grid_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (N, P, D)
        if self.positions == list(range(len(self.positions))):
            return patches + self.position_embedding.weight
        return patches + self.position_embedding(sent(torch.tensor(self.positions), patches.device))


def patch_positions(side: int) -> list[int]:
    """The row of the position embeddings for each patch of a square of `side` x `side` patches.

    In float32, a coordinate may fall just below its boundary. So with 19, 25, 29, 31 and some more patches on a side, a few
    patches share the position of their neighbour. With the 27 and 32 of the released models, the order is the plain one.
    """
    with torch.device("cpu"):
        boundaries = torch.arange(1 / side, 1.0, 1 / side)
        coordinates = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
        steps = torch.bucketize(coordinates, boundaries, right=True)
        return (steps[:, None] * side + steps).flatten().tolist()


class SmolVLMVisionTower(SiglipVisionTower):
    """SigLIP with the norm behind its last block."""

    def __init__(self, config: SiglipVisionConfig, embeddings: nn.Module, attention: str = "auto") -> None:
        VisionTower.__init__(self, config, embeddings, attention=attention)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the last block, and its output behind the norm, (N, P, V) each; raises ValueError as `VisionTower`."""
        block_input, output = super().encode(pixel_values)
        return block_input, self.post_layernorm(output)


class Connector(nn.Module):
    """Pixel shuffle and one projection: the features of a square of patches become one vision token."""

    def __init__(self, vision_size: int, text_size: int, scale_factor: int) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.proj = nn.Linear(vision_size * scale_factor**2, text_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, V) -> (N, P / scale_factor ** 2, D)"""
        return self.proj(self.squares(features).flatten(2))

    def squares(self, values: Tensor) -> Tensor:
        """(N, P, C) -> (N, P / scale_factor ** 2, scale_factor ** 2, C): patches that become one token, side by side."""
        scale = self.scale_factor
        side = round(values.shape[1] ** 0.5) // scale
        cells = values.unflatten(1, (side, scale, side, scale))
        return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SmolVLMModel(VLM):
    """SmolVLM: pictures in tiles, and frames of videos, each a square of vision tokens with text between them."""

    config: SmolVLMConfig
    embeddings: ClassVar[type[SiglipEmbeddings]] = SmolVLMEmbeddings

    def __init__(self, config: SmolVLMConfig, attention: str = "auto") -> None:
        super().__init__()
        self.config = config
        vision, text = config.vision_config, config.text_config
        self.vision_tower = SmolVLMVisionTower(vision, self.embeddings(vision), attention)
        self.connector = Connector(vision.hidden_size, text.hidden_size, config.scale_factor)
        self.language_model = Decoder(text, attention)

    def encode(self, media: Sequence[VisionInput]) -> list[Encoded]:
        block_inputs, outputs = self.vision_tower.encode(self.on_device(torch.cat([each.pixel_values for each in media])))
        features = self.connector(outputs)
        sizes = [len(medium.pixel_values) for medium in media]
        parts = zip(media, block_inputs.split(sizes), features.split(sizes), strict=True)
        return [self.traced(*part) for part in parts]

    def traced(self, medium: VisionInput, block_input: Tensor, features: Tensor) -> Encoded:
        """One picture or video, from the input (tiles, P, V) of the tower's last block and the features (tiles, n, D)."""

        def merged(values: Tensor) -> Tensor:
            """(tiles, heads, P, C) -> (heads, tokens of all tiles, C): the mean over the patches of a token."""
            heads = values.shape[1]
            squares = self.connector.squares(values.transpose(1, 2).flatten(2))  # (tiles, n, patches of a token, heads * C)
            return squares.mean(2).unflatten(-1, (heads, -1)).flatten(0, 1).transpose(0, 1)

        def attention() -> Tensor:
            return merged(self.vision_tower.received_attention(block_input)[..., None])[..., 0]

        def keys() -> Tensor:
            return merged(self.vision_tower.keys(block_input))

        tokens = features.flatten(0, 1)
        return Encoded(tokens, traces_of(medium, tokens, attention, keys))


class NanoVLMModel(SmolVLMModel):
    """nanoVLM: the same parts, with SigLIP's own positions. Source: github.com/huggingface/nanoVLM, models/."""

    embeddings = SiglipEmbeddings
