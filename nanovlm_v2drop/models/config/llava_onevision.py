"""LLaVA-OneVision and LLaVA-Video."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .llava import llava_settings, read_tower
from .llava_next import LlavaNextConfig, read_pinpoints
from .settings import TOKEN_ID, Kind, OneOf, Text, or_null
from .text import QWEN2
from .vision import SIGLIP_DEFAULTS, SiglipVisionConfig, VisionConfig

ASPECT_RATIO = Text(r"anyres_max_[1-9]\d{0,3}", "a text like 'anyres_max_9'")
POOL_MODE = OneOf("bilinear", "average")
NEWLINE_POSITION = OneOf("one_token", "grid")


def released_tower() -> SiglipVisionConfig:
    """SigLIP without its last block, of which all blocks run."""
    return SiglipVisionConfig(num_hidden_layers=26)


@dataclass(frozen=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """LLaVA-OneVision: SigLIP, projector, Qwen2; pictures in tiles, several pictures, video. LLaVA-Video differs on video only.

    `vision_aspect_ratio`: "anyres_max_9" limits the vision tokens of a picture to those of 9 tiles. `mm_spatial_pool_mode`: how
    a frame is halved, "bilinear" or "average". `mm_newline_position`: a newline behind the video ("one_token") or behind every
    row of every frame ("grid").
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision", "llava_qwen")
    text_model_type: ClassVar[str] = "qwen2"
    image_token_id: int = 151646
    video_token_id: int | None = 151647
    eos_token_ids: tuple[int, ...] = QWEN2["eos_token_id"]
    vision_config: VisionConfig = field(default_factory=released_tower)
    vision_feature_layer: int = -1
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))
    vision_aspect_ratio: Annotated[str, ASPECT_RATIO] = "anyres_max_9"
    mm_spatial_pool_mode: Annotated[str, POOL_MODE] = "bilinear"
    mm_newline_position: Annotated[str, NEWLINE_POSITION] = "one_token"

    @property
    def video_layout(self) -> tuple[str, str]:
        """How frames become tokens, as arrange.arrange_video takes it."""
        return self.mm_spatial_pool_mode, self.mm_newline_position

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many."""
        return int(self.vision_aspect_ratio.rpartition("_")[2])

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """llava-hf's file is nested; lmms-lab's is flat and says nothing of the tower, which is always the same."""
        return {
            **super().settings(),
            **llava_settings("full"),
            "video_token_index": or_null(TOKEN_ID),
            "video_token_id": or_null(TOKEN_ID),
            "vision_aspect_ratio": ASPECT_RATIO,
            "image_aspect_ratio": ASPECT_RATIO,
            "mm_vision_select_layer": OneOf(-2),  # of SigLIP's 27 blocks
            "mm_patch_merge_type": OneOf("spatial_unpad"),
            "mm_newline_position": NEWLINE_POSITION,
            "mm_spatial_pool_mode": POOL_MODE,
            "mm_spatial_pool_stride": or_null(OneOf(2)),
            "add_faster_video": or_null(OneOf(False)),
        }

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The tower, the vision tokens, the layer that is read, and how pictures and videos become tokens."""
        spellings = {
            "image_token_id": ("image_token_index", "image_token_id"),
            "video_token_id": ("video_token_index", "video_token_id"),
            "vision_aspect_ratio": ("vision_aspect_ratio", "image_aspect_ratio"),
            "vision_feature_layer": ("vision_feature_layer",),
            "mm_spatial_pool_mode": ("mm_spatial_pool_mode",),
            "mm_newline_position": ("mm_newline_position",),
        }
        found = {field: [given[name] for name in names if given.get(name) is not None] for field, names in spellings.items()}
        tower = read_tower(given, SiglipVisionConfig, SIGLIP_DEFAULTS, "siglip_vision_model", released_tower)
        fields = {name: values[0] for name, values in found.items() if values}
        return {"vision_config": tower, **fields, **read_pinpoints(given)}
