"""LLaVA-1.5."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .settings import JSON_OBJECT, TOKEN_ID, Kind, OneOf, Whole, checked, from_fields
from .vision import CLIP_DEFAULTS, VisionConfig
from .vlm import VLMConfig

FEATURE_LAYER = Whole(-1025, 1024)  # one number; the lists of other models mean another projector


@dataclass(frozen=True)
class LlavaConfig(VLMConfig):
    """LLaVA-1.5: CLIP, projector, LLaMA."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "llava_llama")
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    vision_feature_layer: Annotated[int, FEATURE_LAYER] = -2

    def __post_init__(self) -> None:
        super().__post_init__()
        depth = self.vision_config.num_hidden_layers
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer} is outside a tower of {depth} layers")
        if self.text_config.mrope_section is not None:
            section = self.text_config.mrope_section
            raise ValueError(f"text_config.mrope_section {section} is not supported; positions have one axis in every LLaVA")

    @property
    def vision_layers_run(self) -> int:
        """Blocks before the feature layer; hidden state 0 is the embedding, so -2 leaves the last block out."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """llava-hf's file is nested, liuhaotian's is flat with `mm_` settings."""
        return {
            **llava_settings("default"),
            "mm_vision_select_layer": FEATURE_LAYER,
            "mm_patch_merge_type": OneOf("flat"),  # the original LLaVA-1.6 has another
        }

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The tower, the image token and the layer that is read."""
        return {
            "vision_config": read_tower(given, VisionConfig, CLIP_DEFAULTS, "clip_vision_model", VisionConfig),
            "image_token_id": given.get("image_token_index", given.get("image_token_id", cls.image_token_id)),
            "vision_feature_layer": given.get("vision_feature_layer", given.get("mm_vision_select_layer", -2)),
        }


def llava_settings(strategy: str) -> dict[str, Kind]:
    """What every LLaVA reads: its projector is implemented in one form only."""
    return {
        "vision_config": JSON_OBJECT,
        "image_token_index": TOKEN_ID,
        "image_token_id": TOKEN_ID,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": OneOf(strategy),
        "projector_hidden_act": OneOf("gelu"),
        "multimodal_projector_bias": OneOf(True),
        "mm_projector_type": OneOf("mlp2x_gelu"),
        "mm_vision_select_feature": OneOf("patch"),
    }


def read_tower(
    given: Mapping[str, Any],
    config: type[VisionConfig],
    defaults: Mapping[str, Any],
    model_type: str,
    released: Callable[[], VisionConfig],
) -> VisionConfig:
    """The tower that `vision_config` describes, with the `defaults` of its class; without one, that of the released models."""
    if "vision_config" not in given:
        return released()
    vision = given["vision_config"]
    checked(vision, {"model_type": OneOf(model_type)}, "vision_config.")
    return from_fields(config, {**defaults, **vision}, "vision_config.")
