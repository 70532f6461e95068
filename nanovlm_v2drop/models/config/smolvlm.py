"""SmolVLM, SmolVLM2 and Idefics3: SigLIP, pixel shuffle, one projection, LLaMA."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from .settings import JSON_OBJECT, TOKEN_ID, Flag, Kind, OneOf, Whole, from_fields, require_divisible
from .vision import SiglipVisionConfig
from .vlm import VLMConfig

# What transformers' classes have where the tower's section leaves a size out. The files of the 256M and 500M models leave out
# the depth and the inner width.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 32,
}
SCALE_FACTOR = Whole(1, 64)


def default_tower() -> SiglipVisionConfig:
    """The tower of a file without a `vision_config`."""
    return from_fields(SiglipVisionConfig, VISION_DEFAULTS)


@dataclass(frozen=True)
class SmolVLMConfig(VLMConfig):
    """SmolVLM (`model_type` idefics3, pictures only) and SmolVLM2 (smolvlm, videos too).

    `scale_factor`: side, in patches, of the square of patches that becomes one vision token. A video has no token of its own:
    each of its frames is written like a picture. The defaults are those of transformers' classes.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    image_token_id: int = 128257
    vision_config: SiglipVisionConfig = field(default_factory=default_tower)
    scale_factor: Annotated[int, SCALE_FACTOR] = 2
    takes_video: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        side = self.vision_config.grid_size
        require_divisible("the number of patches along a side of a tile", side, "scale_factor", self.scale_factor)

    @property
    def token_grid(self) -> int:
        """Vision tokens along one side of a tile."""
        return self.vision_config.grid_size // self.scale_factor

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """Both model types have the same file."""
        return {
            "model_type": OneOf(*cls.model_types),
            "vision_config": JSON_OBJECT,
            "image_token_id": TOKEN_ID,
            "scale_factor": SCALE_FACTOR,
        }

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The tower, the image token, and whether the model was trained on videos."""
        vision = {**VISION_DEFAULTS, **given.get("vision_config", {})}
        return {
            **{name: given[name] for name in ("image_token_id", "scale_factor") if name in given},
            "vision_config": from_fields(SiglipVisionConfig, vision, "vision_config."),
            "takes_video": given["model_type"] == "smolvlm",
        }
