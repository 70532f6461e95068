"""The CLIP vision tower: pixel_values -> patch features.

Shapes: N pictures, P patches of one picture, D hidden_size.

Parameter names are the official ones, `pre_layrnorm` included. Only the blocks that LLaVA reads are built: it takes the
hidden state before the last block, so that block and the norm behind it never run.
Source: transformers models/clip/modeling_clip.py.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig

ACTIVATIONS = {
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda values: F.gelu(values, approximate="tanh"),
}


class CLIPEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.num_patches + 1, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (N, P, D)
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight  # (N, 1 + P, D)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (self.heads(projection(hidden_states)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def class_attention(self, hidden_states: Tensor) -> Tensor:
        """Softmax attention of the class token to the patches, (N, heads, P); what it pays to itself is left out."""
        q, k = self.heads(self.q_proj(hidden_states[:, :1])), self.heads(self.k_proj(hidden_states))
        weights = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        return weights.softmax(-1)[:, :, 0, 1:]

    def heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, 1 + P, head_dim)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states))
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(num_layers))

    @property
    def last_block(self) -> VisionLayer:
        return cast(VisionLayer, self.layers[-1])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the last block."""
        before = hidden_states
        for layer in self.layers:
            before, hidden_states = hidden_states, layer(hidden_states)
        return before, hidden_states


class CLIPVisionTower(nn.Module):
    """`num_layers` blocks of CLIP; without the argument, all of them."""

    def __init__(self, config: VisionConfig, num_layers: int | None = None) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
        self.config = config
        self.embeddings = CLIPEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config, config.num_hidden_layers if num_layers is None else num_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) -> (N, P, D); the class token is dropped (LLaVA's "default" strategy)."""
        return self.encode(pixel_values)[1][:, 1:]

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, image_size, image_size) -> input and output of the last block, (N, 1 + P, D) each, class token first."""
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[-2:] != (size, size):
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} must be (N, 3, {size}, {size})")
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))

    def class_attention(self, block_input: Tensor) -> Tensor:
        """(N, heads, P): attention of the class token to the patches in the last block, given its input (N, 1 + P, D)."""
        block = self.encoder.last_block
        return block.self_attn.class_attention(block.layer_norm1(block_input))

    def keys(self, block_input: Tensor) -> Tensor:
        """(N, heads, 1 + P, head_dim): keys of the last block."""
        block = self.encoder.last_block
        return block.self_attn.heads(block.self_attn.k_proj(block.layer_norm1(block_input)))
