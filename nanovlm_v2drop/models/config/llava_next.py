"""LLaVA-1.6 (LLaVA-NeXT)."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .llava import LlavaConfig
from .settings import require_divisible


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-1.6 (LLaVA-NeXT): LLaVA-1.5 with pictures in tiles.

    `image_grid_pinpoints` (height, width) in pixels: the sizes that a picture may be resized to.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in {side for pinpoint in self.image_grid_pinpoints for side in pinpoint}:
            require_divisible("image_grid_pinpoints", side, "image_size", self.vision_config.image_size)

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many: as many as there can be, so never."""
        return max(height * width for height, width in self.image_grid_pinpoints) // self.vision_config.image_size**2

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        pinpoints = read_pinpoints(raw.get("image_grid_pinpoints"))
        return {**super().own_fields(raw), **({} if pinpoints is None else {"image_grid_pinpoints": pinpoints})}


def read_pinpoints(value: Any) -> tuple[tuple[int, int], ...] | None:
    """[[height, width], ...] in pixels; lmms-lab also writes "(1x1),...,(6x6)", in tiles of 384 pixels."""
    if isinstance(value, str):
        ends = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", value.replace(" ", ""))
        if ends is None:
            raise ValueError(f"image_grid_pinpoints {value!r} is not supported; expected [[height, width], ...] in pixels")
        first_high, first_wide, last_high, last_wide = map(int, ends.groups())
        rows, columns = range(first_high, last_high + 1), range(first_wide, last_wide + 1)
        return tuple((384 * high, 384 * wide) for high in rows for wide in columns)
    return None if value is None else tuple((height, width) for height, width in value)
