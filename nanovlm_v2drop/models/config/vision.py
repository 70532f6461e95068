"""The sizes of the CLIP and SigLIP vision towers."""

from dataclasses import dataclass
from typing import Annotated

from .settings import Checked, Depth, Epsilon, Heads, OneOf, Pixels, Width, require_divisible

Activation = Annotated[str, OneOf("quick_gelu", "gelu", "gelu_pytorch_tanh")]
# What transformers' classes have where a vision_config leaves a size out. A file without any vision_config means the tower
# of the released models instead, which are the defaults of the configs below.
CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
SIGLIP_DEFAULTS = {**CLIP_DEFAULTS, "patch_size": 16}


@dataclass(frozen=True)
class VisionConfig(Checked):
    """CLIP vision tower; defaults are openai/clip-vit-large-patch14-336."""

    hidden_size: Width = 1024
    intermediate_size: Width = 4096
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 16
    image_size: Pixels = 336
    patch_size: Pixels = 14
    num_channels: Annotated[int, OneOf(3)] = 3
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_image_size()

    def check_image_size(self) -> None:
        """Raise ValueError unless patches fill the picture."""
        require_divisible("image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one picture: the 576 vision tokens of LLaVA-1.5."""
        return self.grid_size**2


@dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
    """SigLIP vision tower; defaults are google/siglip-so400m-patch14-384. Its last pixels fill no patch: 27 x 14 = 378."""

    hidden_size: Width = 1152
    intermediate_size: Width = 4304
    num_hidden_layers: Depth = 27
    image_size: Pixels = 384
    hidden_act: Activation = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6

    def check_image_size(self) -> None:
        """Raise ValueError unless at least one patch fits."""
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} must be in 1..image_size {self.image_size}")
