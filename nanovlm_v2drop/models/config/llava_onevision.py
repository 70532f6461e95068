"""LLaVA-OneVision and LLaVA-Video."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .llava import llava_settings
from .llava_next import LlavaNextConfig, read_pinpoints
from .settings import from_fields
from .text import QWEN2_DEFAULTS, QWEN2_EOS_TOKEN_IDS
from .vision import SIGLIP_DEFAULTS, SiglipVisionConfig, VisionConfig


@dataclass(frozen=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """LLaVA-OneVision: SigLIP, projector, Qwen2; pictures in tiles, several pictures, video. LLaVA-Video differs on video only.

    The released towers have 26 blocks, one less than SigLIP, and all of them run. `mm_spatial_pool_mode`: how a frame is
    halved, "bilinear" or "average"; `mm_newline_position`: a newline behind the video ("one_token") or every row ("grid").
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision", "llava_qwen")
    image_token_id: int = 151646
    video_token_id: int | None = 151647
    eos_token_ids: tuple[int, ...] = tuple(QWEN2_EOS_TOKEN_IDS)
    vision_config: VisionConfig = field(default_factory=lambda: SiglipVisionConfig(num_hidden_layers=26))
    vision_feature_layer: int = -1
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))
    vision_aspect_ratio: str = "anyres_max_9"
    mm_spatial_pool_mode: str = "bilinear"
    mm_newline_position: str = "one_token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.fullmatch(r"anyres_max_\d+", self.vision_aspect_ratio) is None:
            raise ValueError(f"vision_aspect_ratio {self.vision_aspect_ratio!r} is not supported; known: anyres_max_N")

    @property
    def video_layout(self) -> tuple[str, str]:
        """How frames become tokens, as arrange.arrange_video takes it."""
        return self.mm_spatial_pool_mode, self.mm_newline_position

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many."""
        return int(self.vision_aspect_ratio.rpartition("_")[2])

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        return [
            *llava_settings(raw, "siglip_vision_model", "full"),
            ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "spatial_unpad"), ("spatial_unpad",)),
            ("mm_newline_position", raw.get("mm_newline_position", cls.mm_newline_position), ("one_token", "grid")),
            ("mm_spatial_pool_mode", raw.get("mm_spatial_pool_mode", cls.mm_spatial_pool_mode), ("bilinear", "average")),
            ("mm_spatial_pool_stride", raw.get("mm_spatial_pool_stride", 2), (2,)),
            ("add_faster_video", raw.get("add_faster_video", False), (False, None)),
        ]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """llava-hf's file is nested; lmms-lab's flat one says nothing of the tower, which is always the same."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {
            "image_token_id": raw.get("image_token_index", raw.get("image_token_id")),
            "video_token_id": raw.get("video_token_index", raw.get("video_token_id")),
            "vision_aspect_ratio": raw.get("vision_aspect_ratio", raw.get("image_aspect_ratio")),
            "vision_feature_layer": raw.get("vision_feature_layer"),
            "image_grid_pinpoints": read_pinpoints(raw.get("image_grid_pinpoints")),
            "mm_spatial_pool_mode": raw.get("mm_spatial_pool_mode"),
            "mm_newline_position": raw.get("mm_newline_position"),
        }
        fields = {name: defaults[name] if value is None else value for name, value in given.items()}
        tower = {**SIGLIP_DEFAULTS, **raw["vision_config"]} if "vision_config" in raw else {"num_hidden_layers": 26}
        return {**fields, "vision_config": from_fields(SiglipVisionConfig, tower)}

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        """As Qwen2Config's, whose key/value heads do not follow the attention heads."""
        return {**QWEN2_DEFAULTS, "num_key_value_heads": 32}

    @classmethod
    def default_eos(cls) -> int | list[int]:
        return QWEN2_EOS_TOKEN_IDS
