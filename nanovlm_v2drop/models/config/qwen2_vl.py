"""Qwen2-VL."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .settings import from_fields, require_divisible
from .text import QWEN2_EOS_TOKEN_IDS
from .vlm import VLMConfig

# The same of Qwen2VLTextConfig.
QWEN2_VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Qwen2-VL's own vision tower; `hidden_size` is the decoder's width, `embed_dim` the tower's."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: int = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        require_divisible("embed_dim", self.embed_dim, "4 * num_heads (two axes of rotated pairs)", 4 * self.num_heads)


@dataclass(frozen=True)
class Qwen2VLConfig(VLMConfig):
    """Qwen2-VL: its own tower on pictures of any size, Qwen2 with multimodal positions."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    vision_token_names: ClassVar[tuple[str, ...]] = ("<|image_pad|>", "<|video_pad|>")
    image_token_id: int = 151655
    video_token_id: int | None = 151656
    eos_token_ids: tuple[int, ...] = tuple(QWEN2_EOS_TOKEN_IDS)
    vision_config: Qwen2VLVisionConfig = field(default_factory=Qwen2VLVisionConfig)

    def __post_init__(self) -> None:
        if self.vision_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"vision_config.hidden_size {self.vision_config.hidden_size} must be the decoder's "
                f"hidden_size {self.text_config.hidden_size}"
            )
        if self.text_config.mrope_section is None:
            raise ValueError("Qwen2-VL's rope_scaling must have an mrope_section, three numbers; is config.json complete?")

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        vision = raw.get("vision_config", {})
        kind = vision.get("model_type", "qwen2_vl")
        return [("vision_config.model_type", kind, ("qwen2_vl", "qwen2_vl_vision"))]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The hub's file is flat and spells in_channels `in_chans`; newer versions nest the decoder."""
        vision = raw.get("vision_config", {})
        return {
            "vision_config": from_fields(Qwen2VLVisionConfig, {"in_channels": vision.get("in_chans"), **vision}),
            "image_token_id": raw.get("image_token_id", cls.image_token_id),
            "video_token_id": raw.get("video_token_id", cls.video_token_id),
        }

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        """As Qwen2VLTextConfig's, which are the sizes of the 72B; files that only say what differs leave them out."""
        return QWEN2_VL_DEFAULTS
