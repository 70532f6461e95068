"""LLaVA-1.6 (LLaVA-NeXT)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from .llava import LlavaConfig
from .settings import Either, Kind, ListOf, Text, Whole, or_null, require_divisible

# (height, width) in pixels, or lmms-lab's range in tiles of 384 pixels.
PINPOINTS = ListOf(ListOf(Whole(1, 2**14), 2, 2), 1, 1024)
TILES = r"\((\d\d?)x(\d\d?)\),\.\.\.,\((\d\d?)x(\d\d?)\)"
TILE_RANGE = Text(TILES, 'a text like "(1x1),...,(6x6)"')
TILE_SIZE = 384


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-1.6 (LLaVA-NeXT): LLaVA-1.5 with pictures in tiles.

    `image_grid_pinpoints` (height, width) in pixels: the sizes that a picture may be resized to.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    image_grid_pinpoints: Annotated[tuple[tuple[int, int], ...], PINPOINTS] = (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in {side for pinpoint in self.image_grid_pinpoints for side in pinpoint}:
            require_divisible("image_grid_pinpoints", side, "image_size", self.vision_config.image_size)

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many: as many as there can be, so never."""
        return max(height * width for height, width in self.image_grid_pinpoints) // self.vision_config.image_size**2

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """As LLaVA-1.5's, and the pinpoints."""
        return {**super().settings(), "image_grid_pinpoints": or_null(Either(PINPOINTS, TILE_RANGE))}

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """As LLaVA-1.5's, and the pinpoints where the file names some."""
        return {**super().own_fields(given), **read_pinpoints(given)}


def read_pinpoints(given: Mapping[str, Any]) -> dict[str, Any]:
    """The field `image_grid_pinpoints` from either spelling, where the file has it."""
    value = given.get("image_grid_pinpoints")
    if isinstance(value, str):
        first_high, first_wide, last_high, last_wide = map(int, re.findall(r"\d+", value))
        rows, columns = range(first_high, last_high + 1), range(first_wide, last_wide + 1)
        value = tuple((TILE_SIZE * high, TILE_SIZE * wide) for high in rows for wide in columns)
    return {} if value is None else {"image_grid_pinpoints": value}
