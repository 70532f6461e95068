"""The CLIP and SigLIP vision towers: pixel_values -> patch features.

Shapes: N pictures (or tiles of one, or frames of a video), P patches of one picture, D hidden_size.

Both towers have the same blocks and different embeddings: CLIP puts a class token before the patches and a norm after the
embeddings, SigLIP has neither. Parameter names are the official ones, including `pre_layrnorm`. Only the blocks that LLaVA
reads are built. No LLaVA reads a hidden state after `post_layernorm`, so that norm does not exist here. Sources: transformers
models/clip/modeling_clip.py and models/siglip/modeling_siglip.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention, resolve_backend, softmax_weights
from .config import VisionConfig
from .linear import products

ACTIVATIONS = {
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda values: F.gelu(values, approximate="tanh"),
}
# Of one dtype, 1 to 4 MB: values of this number stay in a CPU's cache from block to block.
VALUES_AT_ONCE = 2**20


@dataclass(frozen=True)
class VisionTrace:
    """The vision tower's results for one picture, for methods that choose tokens before the decoder.

    `hidden_states` (C + P, V): the states that become tokens, after C = `num_class_tokens` (0 or 1) class tokens. For CLIP,
    they are the tower's output and `project` is the projector (..., V) -> (..., D). Where tokens are made after the tower
    (tiles, pooled frames, merged patches), they are the features themselves and `project` changes nothing.
    `received_attention()` (heads, P) is the attention that each patch receives in the last block that ran: from the class
    token, or the mean over all patches where there is none. `keys()` (heads, C + P, head_dim) are that block's keys. Both are
    computed only when they are called.
    """

    hidden_states: Tensor
    received_attention: Callable[[], Tensor]
    keys: Callable[[], Tensor]
    project: Callable[[Tensor], Tensor]
    num_class_tokens: int = 0


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


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        # A picture whose side is not a multiple of the patch size, such as 384 / 14, loses pixels at its right and lower edges.
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, stride=config.patch_size, padding="valid"
        )
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (N, P, D)
        return patches + self.position_embedding.weight


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, backend: str) -> Tensor:
        count, tokens, _ = hidden_states.shape
        projected = products(hidden_states.flatten(0, 1), self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (packed.unflatten(-1, (self.num_heads, -1)) for packed in projected)  # (N * tokens, heads, head_dim)
        attended = attention(q, k, v, (tokens,) * count, backend, causal=False)
        return self.out_proj(attended.reshape(hidden_states.shape))

    def class_attention(self, hidden_states: Tensor) -> Tensor:
        """Softmax attention of the class token to the patches, (N, heads, P), without its attention to itself."""
        q, k = self.heads(self.q_proj(hidden_states[:, :1])), self.heads(self.k_proj(hidden_states))
        return softmax_weights(q @ k.transpose(-1, -2), q.shape[-1])[:, :, 0, 1:]

    def mean_attention(self, hidden_states: Tensor) -> Tensor:
        """Softmax attention that each token receives, (N, heads, P): the mean over all query tokens."""
        # One picture at a time: the weights of a whole video would take a gigabyte.
        return torch.cat([self._mean_attention(picture) for picture in hidden_states.split(1)])

    def _mean_attention(self, hidden_states: Tensor) -> Tensor:
        q, k = self.heads(self.q_proj(hidden_states)), self.heads(self.k_proj(hidden_states))
        return softmax_weights(q @ k.transpose(-1, -2), q.shape[-1]).mean(-2)  # of (1, heads, P, P)

    def heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, tokens, head_dim)


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

    def forward(self, hidden_states: Tensor, backend: str) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), backend)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(num_layers))

    @property
    def last_block(self) -> VisionLayer:
        return cast(VisionLayer, self.layers[-1])

    def forward(self, hidden_states: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        """Input and output of the last block, (N, tokens, D) each."""
        pieces = hidden_states.split(pictures_at_once(hidden_states))
        if len(pieces) > 1:
            befores, afters = zip(*(self(piece, backend) for piece in pieces), strict=True)
            return torch.cat(befores), torch.cat(afters)
        before = hidden_states
        for layer in self.layers:
            before, hidden_states = hidden_states, layer(hidden_states, backend)
        return before, hidden_states


def pictures_at_once(hidden_states: Tensor) -> int:
    """How many of the pictures (N, tokens, D) go through the blocks together: all, but on a CPU few, which need less memory."""
    count, *of_one = hidden_states.shape
    return max(1, VALUES_AT_ONCE // math.prod(of_one)) if hidden_states.device.type == "cpu" else max(1, count)


class VisionTower(nn.Module):
    """The common part of CLIP and SigLIP: embeddings, then `num_layers` blocks (by default all).

    `attention` is the name of a back end, or "auto"; see attention.resolve_backend.
    Raises ValueError for an unknown activation.
    """

    num_class_tokens: ClassVar[int]

    def __init__(
        self, config: VisionConfig, embeddings: nn.Module, num_layers: int | None = None, attention: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.embeddings = embeddings
        self.encoder = VisionEncoder(config, config.num_hidden_layers if num_layers is None else num_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) -> (N, P, D), without the class token."""
        return self.encode(pixel_values)[1][:, self.num_class_tokens :]

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the last block, (N, num_class_tokens + P, D) each, class token first.

        Raises ValueError unless pixel_values are (N, 3, image_size, image_size).
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[-2:] != (size, size):
            raise ValueError(f"pixel_values {tuple(pixel_values.shape)} must be (N, 3, {size}, {size})")
        embedded = self.embed(pixel_values)
        return self.encoder(embedded, resolve_backend(self.attention, embedded.device, embedded.dtype))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Input of the first block, (N, num_class_tokens + P, D)."""
        return self.embeddings(pixel_values)

    def received_attention(self, block_input: Tensor) -> Tensor:
        """(N, heads, P) in float32: softmax attention that each patch receives in the last block, from the block's input."""
        raise NotImplementedError

    def keys(self, block_input: Tensor) -> Tensor:
        """(N, heads, num_class_tokens + P, head_dim): keys of the last block, from its input."""
        block = self.encoder.last_block
        return block.self_attn.heads(block.self_attn.k_proj(block.layer_norm1(block_input)))


class CLIPVisionTower(VisionTower):
    """CLIP: a class token before the patches, and a norm before the blocks. LLaVA-1.5 reads it."""

    num_class_tokens = 1

    def __init__(self, config: VisionConfig, num_layers: int | None = None, attention: str = "auto") -> None:
        super().__init__(config, CLIPEmbeddings(config), num_layers, attention)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixel_values))

    def received_attention(self, block_input: Tensor) -> Tensor:
        """(N, heads, P): attention of the class token to the patches in the last block, from its input (N, 1 + P, D)."""
        block = self.encoder.last_block
        return block.self_attn.class_attention(block.layer_norm1(block_input))


class SiglipVisionTower(VisionTower):
    """SigLIP: patches without a class token. LLaVA-OneVision reads the state after the last block, before `post_layernorm`."""

    num_class_tokens = 0

    def __init__(self, config: VisionConfig, num_layers: int | None = None, attention: str = "auto") -> None:
        super().__init__(config, SiglipEmbeddings(config), num_layers, attention)

    def received_attention(self, block_input: Tensor) -> Tensor:
        """(N, heads, P): the mean attention that a patch receives from all patches in the last block, from its input.

        This is VisionZip's rule for towers without a class token.
        """
        block = self.encoder.last_block
        return block.self_attn.mean_attention(block.layer_norm1(block_input))
