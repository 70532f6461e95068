"""Qwen3-VL."""

from dataclasses import dataclass, field
from math import isqrt
from typing import Annotated, ClassVar

from .qwen2_vl import Qwen2VLConfig, QwenVisionConfig
from .settings import ListOf, Pixels, Whole, Width, require_divisible
from .vision import Activation

AROUND_VISION = ("<|vision_start|>", "<|vision_end|>")


@dataclass(frozen=True)
class Qwen3VLVisionConfig(QwenVisionConfig):
    """Qwen3-VL's vision tower; `hidden_size` is the tower's width, `out_hidden_size` the decoder's.

    `num_position_embeddings`: learned positions of a square of patches; they are interpolated to each picture's grid.
    `deepstack_visual_indexes`: the blocks, counted from 0, whose outputs are added to the vision tokens behind the decoder's
    first layers, one block a layer. The defaults are those of transformers' class.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_vision")
    depth: int = 27
    hidden_size: Width = 1152
    out_hidden_size: Width = 3584
    intermediate_size: Width = 4304
    hidden_act: Activation = "gelu_pytorch_tanh"
    patch_size: Pixels = 16
    num_position_embeddings: Annotated[int, Whole(1, 2**24)] = 2304
    deepstack_visual_indexes: Annotated[tuple[int, ...], ListOf(Whole(0, 1023), 0, 64)] = (8, 16, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisible("hidden_size", self.hidden_size, "4 * num_heads (two axes of rotated pairs)", 4 * self.num_heads)
        if self.position_side**2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings {self.num_position_embeddings} must be a square number, such as 48 * 48")
        blocks = self.deepstack_visual_indexes
        if list(blocks) != sorted(set(blocks)) or any(block >= self.depth for block in blocks):
            raise ValueError(f"deepstack_visual_indexes {blocks} must be rising numbers below the depth {self.depth}")

    @property
    def embed_dim(self) -> int:
        return self.hidden_size

    @property
    def position_side(self) -> int:
        """Learned positions along one side of the square."""
        return isqrt(self.num_position_embeddings)


@dataclass(frozen=True)
class Qwen3VLConfig(Qwen2VLConfig):
    """Qwen3-VL: tower features for the decoder's first layers, and each pair of frames of a video behind its time in words."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    text_model_type: ClassVar[str] = "qwen3_vl"
    vision_class: ClassVar[type[QwenVisionConfig]] = Qwen3VLVisionConfig
    vision_config: Qwen3VLVisionConfig = field(default_factory=Qwen3VLVisionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks, layers = len(self.vision_config.deepstack_visual_indexes), self.text_config.num_hidden_layers
        if blocks > layers:
            raise ValueError(
                f"vision_config.deepstack_visual_indexes names {blocks} blocks, one a layer; the decoder has {layers} layers"
            )

    @property
    def marks(self) -> dict[str, int]:
        """As everywhere, but the text of a video also takes the place of the tokens before and behind its mark."""
        image, *video = super().marks.items()
        return dict([image, *((mark.join(AROUND_VISION), token) for mark, token in video)])
