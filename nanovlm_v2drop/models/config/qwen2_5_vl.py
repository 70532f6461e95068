"""Qwen2.5-VL."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from .qwen2_vl import Qwen2VLConfig, QwenVisionConfig
from .settings import ListOf, OneOf, Pixels, Whole, Width, require_divisible


@dataclass(frozen=True)
class Qwen2_5_VLVisionConfig(QwenVisionConfig):
    """Qwen2.5-VL's vision tower; `hidden_size` is the tower's width, `out_hidden_size` the decoder's.

    `window_size`: side of an attention window in pixels. `fullatt_block_indexes`: the blocks, counted from 0, whose attention
    sees a whole frame. `tokens_per_second`: how far the positions of two frames lie apart that are a second apart. The defaults
    are those of transformers' class; the released files give every size, among them 1280 and 2 tokens a second.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_5_vl_vision")
    hidden_size: Width = 3584
    out_hidden_size: Width = 3584
    intermediate_size: Width = 3420
    hidden_act: Annotated[str, OneOf("silu")] = "silu"
    window_size: Pixels = 112
    fullatt_block_indexes: Annotated[tuple[int, ...], ListOf(Whole(0, 1023), 0, 1024)] = (7, 15, 23, 31)
    tokens_per_second: Annotated[int, Whole(1, 10000)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisible("hidden_size", self.hidden_size, "4 * num_heads (two axes of rotated pairs)", 4 * self.num_heads)
        if self.window_side < 1:
            raise ValueError(
                f"window_size {self.window_size} must be at least the {self.patch_size * self.spatial_merge_size} pixels of a "
                "vision token (patch_size * spatial_merge_size)"
            )

    @property
    def embed_dim(self) -> int:
        return self.hidden_size

    @property
    def window_side(self) -> int:
        """Vision tokens along one side of a window."""
        return self.window_size // self.spatial_merge_size // self.patch_size


@dataclass(frozen=True)
class Qwen2_5_VLConfig(Qwen2VLConfig):
    """Qwen2.5-VL: Qwen2-VL with windows in the tower and a video's positions in seconds."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    text_model_type: ClassVar[str] = "qwen2_5_vl"
    vision_class: ClassVar[type[QwenVisionConfig]] = Qwen2_5_VLVisionConfig
    vision_config: Qwen2_5_VLVisionConfig = field(default_factory=Qwen2_5_VLVisionConfig)
