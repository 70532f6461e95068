"""Qwen2-VL, and what its successors share with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .settings import (
    JSON_OBJECT,
    TOKEN_ID,
    Checked,
    Depth,
    Heads,
    Kind,
    OneOf,
    Pixels,
    Whole,
    Width,
    checked,
    from_fields,
    or_null,
    require_divisible,
)
from .text import QWEN2, same_arithmetic
from .vision import Activation
from .vlm import VLMConfig

# What the tower's section may say besides the fields of its class.
VISION_SETTINGS: dict[str, Kind] = {"in_chans": OneOf(3), "rope_parameters": or_null(JSON_OBJECT)}
VISION_ROPE_SETTINGS: dict[str, Kind] = {"rope_theta": OneOf(10000.0, 10000)}


@dataclass(frozen=True)
class QwenVisionConfig(Checked):
    """What the towers of all Qwen-VL families have in common.

    `embed_dim` is the tower's width, `intermediate_size` that of its MLP, `out_hidden_size` the decoder's. config.json names
    them differently in each family.
    """

    model_types: ClassVar[tuple[str, ...]]  # what the section's `model_type` may be
    out_name: ClassVar[str] = "out_hidden_size"  # the decoder's width in config.json
    depth: Depth = 32
    num_heads: Heads = 16
    in_channels: Annotated[int, Whole(1, 16)] = 3
    patch_size: Pixels = 14
    spatial_merge_size: Annotated[int, Whole(1, 16)] = 2
    temporal_patch_size: Annotated[int, Whole(1, 16)] = 2

    @property
    def embed_dim(self) -> int:
        raise NotImplementedError

    @property
    def intermediate_size(self) -> int:
        raise NotImplementedError

    @property
    def out_hidden_size(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Qwen2VLVisionConfig(QwenVisionConfig):
    """Qwen2-VL's own vision tower; `hidden_size` is the decoder's width, `embed_dim` the tower's."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_vl_vision")
    out_name: ClassVar[str] = "hidden_size"
    embed_dim: Width = 1280
    hidden_size: Width = 3584
    hidden_act: Activation = "quick_gelu"
    mlp_ratio: Annotated[int, Whole(1, 64)] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisible("embed_dim", self.embed_dim, "4 * num_heads (two axes of rotated pairs)", 4 * self.num_heads)

    @property
    def intermediate_size(self) -> int:
        return self.embed_dim * self.mlp_ratio

    @property
    def out_hidden_size(self) -> int:
        return self.hidden_size


@dataclass(frozen=True)
class Qwen2VLConfig(VLMConfig):
    """Qwen2-VL: its own tower on pictures of any size, Qwen2 with multimodal positions."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    text_model_type: ClassVar[str] = "qwen2_vl"
    vision_token_names: ClassVar[tuple[str, ...]] = ("<|image_pad|>", "<|video_pad|>")
    vision_class: ClassVar[type[QwenVisionConfig]] = Qwen2VLVisionConfig
    image_token_id: int = 151655
    video_token_id: int | None = 151656
    eos_token_ids: tuple[int, ...] = QWEN2["eos_token_id"]
    vision_config: QwenVisionConfig = field(default_factory=Qwen2VLVisionConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        out_name, out = self.vision_config.out_name, self.vision_config.out_hidden_size
        if out != self.text_config.hidden_size:
            raise ValueError(f"vision_config.{out_name} {out} must be the decoder's hidden_size {self.text_config.hidden_size}")
        if self.text_config.mrope_section is None:
            raise ValueError("rope_scaling must have an mrope_section, three numbers; is config.json complete?")

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "VLMConfig":
        """From the parsed config.json of this family, whose decoder is always of the same kind."""
        kinds: dict[str, Kind] = {"model_type": same_arithmetic(cls.text_model_type)}
        checked(checked(raw, {"text_config": JSON_OBJECT}).get("text_config", {}), kinds, "text_config.")
        return super().read(raw)

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """The hub's file is flat; newer versions of transformers nest the decoder."""
        return {"vision_config": JSON_OBJECT, "image_token_id": TOKEN_ID, "video_token_id": or_null(TOKEN_ID)}

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The tower, whose in_channels the hub's file spells `in_chans`, and the vision tokens."""
        vision = given.get("vision_config", {})
        kinds: dict[str, Kind] = {"model_type": OneOf(*cls.vision_class.model_types), **VISION_SETTINGS}
        extra = checked(vision, kinds, "vision_config.")
        checked(extra.get("rope_parameters") or {}, VISION_ROPE_SETTINGS, "vision_config.rope_parameters.")
        renamed = {"in_channels": extra["in_chans"]} if "in_chans" in extra else {}
        return {
            "vision_config": from_fields(cls.vision_class, {**renamed, **vision}, "vision_config."),
            "image_token_id": given.get("image_token_id", cls.image_token_id),
            "video_token_id": given.get("video_token_id", cls.video_token_id),
        }
