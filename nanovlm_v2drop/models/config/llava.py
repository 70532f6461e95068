"""LLaVA-1.5."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from .settings import from_fields
from .vision import VisionConfig
from .vlm import VLMConfig


@dataclass(frozen=True)
class LlavaConfig(VLMConfig):
    """LLaVA-1.5: CLIP, projector, LLaMA."""

    model_types: ClassVar[tuple[str, ...]] = ("llava", "llava_llama")
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    vision_feature_layer: int = -2

    def __post_init__(self) -> None:
        depth = self.vision_config.num_hidden_layers
        if type(self.vision_feature_layer) is not int:
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer!r} is not supported; it must be one number")
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer} is outside a tower of {depth} layers")

    @property
    def vision_layers_run(self) -> int:
        """Blocks before the feature layer; hidden state 0 is the embedding, so -2 leaves the last block out."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        merge_type = ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat"), ("flat",))  # LLaVA-1.6's original says
        return [*llava_settings(raw, "clip_vision_model", "default"), merge_type]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """llava-hf's file is nested, liuhaotian's flat with `mm_` fields."""
        return {
            "vision_config": from_fields(VisionConfig, raw.get("vision_config", {})),
            "image_token_id": raw.get("image_token_index", raw.get("image_token_id", cls.image_token_id)),
            "vision_feature_layer": raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2)),
        }

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def default_eos(cls) -> int | list[int]:
        return 2


def llava_settings(raw: dict[str, Any], tower: str, strategy: str) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """What the projector and the tower of a LLaVA must be."""
    vision = raw.get("vision_config", {})
    return [
        ("vision_config.model_type", vision.get("model_type", tower), (tower,)),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("mm_projector_type", raw.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu",)),
        ("multimodal_projector_bias", raw.get("multimodal_projector_bias", True), (True,)),
        ("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ("patch",)),
        ("vision_feature_select_strategy", raw.get("vision_feature_select_strategy", strategy), (strategy,)),
    ]
