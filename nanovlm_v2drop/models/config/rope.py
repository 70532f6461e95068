"""Scaled rotary frequencies: settings that let a decoder read longer prompts than those it was first trained with.

The arithmetic is in models/rotary.py. Names, defaults and precedence are those of transformers' modeling_rope_utils.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from .settings import Checked, Flag, Kind, ListOf, OneOf, Real, Whole, checked, from_fields, or_null

POSITIONS = Whole(1, 2**27)
FACTOR = Real(1, 1e4)
TURNS = Real(1e-3, 1e6)
ROPE_THETA = Real(1, 1e12)
MROPE_SECTION = or_null(ListOf(Whole(1, 512), 3, 3))
UNSCALED = ("default", "mrope")  # values of rope_type; the second only says that there is an mrope_section


@dataclass(frozen=True)
class RopeScaling(Checked):
    """How the frequencies of a decoder's rotary embedding are scaled; a subclass is one `rope_type`.

    `required`: the settings that a file must have. `follows_length`: whether the frequencies depend on the sequence's length.
    """

    rope_type: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ("factor",)
    follows_length: ClassVar[bool] = False

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def completed(self, max_position_embeddings: int) -> Self:
        """The same with what a file may leave out; raises ValueError for settings that do not fit together."""
        return self

    def check(self, head_dim: int, rope_theta: float) -> None:
        """Raise ValueError where the frequencies of such heads cannot be scaled."""

    def context_length(self, max_position_embeddings: int) -> int | None:
        """The longest prompt in tokens, or None where every prompt has its own frequencies."""
        return max_position_embeddings


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All frequencies are divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: Annotated[float, FACTOR] = 1.0

    def context_length(self, max_position_embeddings: int) -> int:
        """Files of this type keep the number of positions before scaling in max_position_embeddings, as Vicuna 1.5 16k does."""
        return int(self.factor * max_position_embeddings)


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """The base of the frequencies grows with a sequence that is longer than max_position_embeddings."""

    rope_type: ClassVar[str] = "dynamic"
    follows_length: ClassVar[bool] = True
    factor: Annotated[float, FACTOR] = 1.0

    def check(self, head_dim: int, rope_theta: float) -> None:
        if head_dim <= 2:
            raise ValueError(f"rope_type 'dynamic' needs a head_dim above 2, not {head_dim}: one frequency cannot be scaled")

    def context_length(self, max_position_embeddings: int) -> None:
        return None


@dataclass(frozen=True)
class LengthScaling(RopeScaling):
    """nanoVLM's: all frequencies are divided by length / `beyond` for a sequence of more tokens than `beyond`."""

    rope_type: ClassVar[str] = "nanovlm"
    follows_length: ClassVar[bool] = True
    beyond: Annotated[int, POSITIONS] = 8192

    def context_length(self, max_position_embeddings: int) -> None:
        return None


@dataclass(frozen=True)
class StretchedScaling(RopeScaling):
    """Slow frequencies are divided by `factor`, fast ones stay. The original number of positions says which is which.

    `original_max_position_embeddings`: positions before scaling; None is the decoder's max_position_embeddings.
    """

    factor: Annotated[float, FACTOR] = 1.0
    original_max_position_embeddings: Annotated[int | None, or_null(POSITIONS)] = None

    @property
    def original_positions(self) -> int:
        assert self.original_max_position_embeddings is not None  # `completed`
        return self.original_max_position_embeddings

    def completed(self, max_position_embeddings: int) -> Self:
        if self.original_max_position_embeddings is not None:
            return self
        return replace(self, original_max_position_embeddings=max_position_embeddings)


@dataclass(frozen=True)
class Llama3Scaling(StretchedScaling):
    """Llama 3.1's: between the wavelengths original / high_freq_factor and original / low_freq_factor, the two are mixed."""

    rope_type: ClassVar[str] = "llama3"
    required: ClassVar[tuple[str, ...]] = ("factor", "low_freq_factor", "high_freq_factor")
    low_freq_factor: Annotated[float, TURNS] = 1.0
    high_freq_factor: Annotated[float, TURNS] = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}"
            )


@dataclass(frozen=True)
class YarnScaling(StretchedScaling):
    """YaRN: frequencies that turn `beta_slow` to `beta_fast` times within the original positions are mixed.

    Cosines and sines are multiplied by `attention_factor`. None is 0.1 ln(factor) + 1, or a quotient of two such numbers where
    `mscale` and `mscale_all_dim` are given. `truncate`: whether the ends of the mixed part are rounded to whole frequencies.
    """

    rope_type: ClassVar[str] = "yarn"
    attention_factor: Annotated[float | None, or_null(Real(1e-3, 1e3))] = None
    beta_fast: Annotated[float, TURNS] = 32.0
    beta_slow: Annotated[float, TURNS] = 1.0
    mscale: Annotated[float | None, or_null(Real(0, 1e3))] = None
    mscale_all_dim: Annotated[float | None, or_null(Real(0, 1e3))] = None
    truncate: Flag = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} must not be below beta_slow {self.beta_slow:g}")

    def check(self, head_dim: int, rope_theta: float) -> None:
        if rope_theta == 1:
            raise ValueError("rope_type 'yarn' needs a rope_theta above 1: all frequencies would be the same")

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    def magnitude(self, weight: float) -> float:
        """YaRN's growth of queries and keys with the factor."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    def context_length(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, int(self.factor * self.original_positions))


SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.rope_type: scaling for scaling in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}
ROPE_TYPE = OneOf(*UNSCALED, *SCALINGS)
ROPE_SETTINGS: dict[str, Kind] = {
    "type": ROPE_TYPE,
    "rope_type": ROPE_TYPE,
    "rope_theta": ROPE_THETA,
    "mrope_section": MROPE_SECTION,
    "partial_rotary_factor": OneOf(None, 1, 1.0),
    "full_attention": OneOf(None),  # settings for each kind of layer
    "sliding_attention": OneOf(None),
}


class ScalingKind:
    """A RopeScaling, or none. No JSON value is one, so a file describes it in the sections that `rope_fields` reads."""

    def accepts(self, value: Any) -> bool:
        return value is None or isinstance(value, RopeScaling)

    def __str__(self) -> str:
        return "a RopeScaling, or None"


def rope_fields(rope: Mapping[str, Any], prefix: str, original: int | None = None) -> dict[str, Any]:
    """The fields of TextConfig that a rope_scaling or rope_parameters section gives; `prefix` stands before its names.

    `original`: original_max_position_embeddings beside the section, which goes before the one inside. Raises ValueError for a
    type that is not implemented, and for settings that are missing or out of bounds.
    """
    given = checked(rope, ROPE_SETTINGS, prefix)
    fields: dict[str, Any] = {name: given[name] for name in ("rope_theta", "mrope_section") if name in given}
    rope_type = given.get("rope_type", given.get("type", UNSCALED[0]))
    if original is not None:
        rope = {**rope, "original_max_position_embeddings": original}
    return {**fields, "rotary_scaling": None if rope_type in UNSCALED else read_scaling(rope_type, rope, prefix)}


def read_scaling(rope_type: str, rope: Mapping[str, Any], prefix: str) -> RopeScaling:
    """The settings of one type; raises ValueError as `rope_fields`."""
    scaling = SCALINGS[rope_type]
    if missing := [name for name in scaling.required if name not in rope]:
        raise ValueError(f"{prefix}{missing[0]} is missing: rope_type {rope_type!r} needs {', '.join(scaling.required)}")
    return from_fields(scaling, rope, prefix)
