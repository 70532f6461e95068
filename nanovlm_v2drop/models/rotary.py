"""The frequencies of the rotary embedding, plain and scaled for long prompts.

Everything is computed in float32, in the order of transformers' modeling_rope_utils.py, so that frequencies are equal bit for
bit. Shapes: T rows of packed sequences, F = head_dim / 2 frequencies.
"""

import math

import torch
from torch import Tensor

from .config import DynamicScaling, LengthScaling, LinearScaling, Llama3Scaling, TextConfig, YarnScaling


def rotary_frequencies(config: TextConfig, device: torch.device, lengths: Tensor | None) -> Tensor:
    """Radians for each position, (F,), or (T, F) where they follow the `lengths` (T,) of the rows' sequences.

    Raises ValueError where lengths are needed and not given.
    """
    if config.rope_follows_length and lengths is None:
        raise ValueError("the rotary frequencies of this decoder follow the length of a sequence; pass its length")
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    wavelengths = config.rope_theta**exponents  # over 2 pi
    match config.rotary_scaling:
        case None:
            return 1.0 / wavelengths
        case LinearScaling(factor=factor):
            return 1.0 / wavelengths / factor
        case DynamicScaling(factor=factor):
            assert lengths is not None
            return 1.0 / dynamic_base(config, factor, lengths)[..., None] ** exponents
        case LengthScaling(beyond=beyond):
            assert lengths is not None
            return 1.0 / wavelengths / (lengths[..., None] / beyond).clamp(min=1.0)
        case Llama3Scaling() as scaling:
            return llama3_frequencies(1.0 / wavelengths, scaling)
        case YarnScaling() as scaling:
            return yarn_frequencies(wavelengths, config, scaling)
    raise TypeError(f"{type(config.rotary_scaling).__name__} has no frequencies")


def dynamic_base(config: TextConfig, factor: float, lengths: Tensor) -> Tensor:
    """The base for sequences of `lengths`, whose dimensions it keeps; up to max_position_embeddings it is rope_theta."""
    most, size = config.max_position_embeddings, config.head_dim
    longer = factor * lengths.clamp(min=most) / most - (factor - 1)
    scaled = config.rope_theta * longer ** (size / (size - 2))
    return torch.where(lengths > most, scaled, config.rope_theta)


def llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves are divided by the factor, short ones stay, and those between are mixed."""
    original, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    lengths = 2 * math.pi / frequencies
    share = (original / lengths - low) / (high - low)  # of the unscaled frequency
    mixed = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(lengths > original / low, frequencies / scaling.factor, mixed)
    return torch.where(lengths < original / high, frequencies, scaled)


def yarn_frequencies(wavelengths: Tensor, config: TextConfig, scaling: YarnScaling) -> Tensor:
    """Frequencies with many turns within the original positions stay, those with few are divided by the factor."""
    low, high = yarn_range(config, scaling)
    ramp = ((torch.arange(len(wavelengths), device=wavelengths.device).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp  # the share of the unscaled frequency
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def yarn_range(config: TextConfig, scaling: YarnScaling) -> tuple[float, float]:
    """The numbers of the frequencies between which YaRN mixes: those with beta_fast and beta_slow turns."""

    def number_of(turns: float) -> float:
        longest = scaling.original_positions / (turns * 2 * math.pi)
        return config.head_dim * math.log(longest) / (2 * math.log(config.rope_theta))

    low, high = number_of(scaling.beta_fast), number_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    return low, high + 0.001 if low == high else high
