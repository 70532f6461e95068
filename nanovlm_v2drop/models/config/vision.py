"""The sizes of the CLIP and SigLIP vision towers."""

from dataclasses import dataclass

from .settings import require_divisible

# What transformers' SiglipVisionConfig has otherwise than the tower that LLaVA-OneVision has where a file names none.
SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower; defaults are openai/clip-vit-large-patch14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        self.check_image_size()

    def check_image_size(self) -> None:
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

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    image_size: int = 384
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def check_image_size(self) -> None:
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} must be in 1..image_size {self.image_size}")
