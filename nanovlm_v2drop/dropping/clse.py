"""CLSE: visual tokens ranked by their spectral change between layers (arXiv 2606.24165).

At the first drop point, a token's score is the attention from the prompt's last token in the previous layer, times a factor
that grows with the change of the token's high-frequency energy in that layer. The energy comes from a two-dimensional Fourier
transform of the hidden states over the picture's grid. At later drop points the grid has gaps, and attention alone ranks.
Position ids are kept, and the caches of all earlier layers are cut to the kept tokens. Source: github.com/zjubinchen/CLSE,
LLaVA1.5/llava/model/language_model/clse_model.py and tools.py.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import PrefillState, Published, TokenDropper
from .fastv import last_row_attention
from .schedule import CountSchedule, DropSchedule, PromptShares
from .state import Grid

MODES = ("clse_attn", "clse", "attn")
SIGMA = 0.1  # width of the Gaussian, as a share of half the shorter side
SHARPNESS = 0.1  # of the sigmoid of the standardised change
EPSILON = 1e-6


class CLSE(TokenDropper):
    """Drop the tokens with least attention and least spectral change.

    `mode`: "clse_attn" (the default of the released code), "attn" or "clse" for one of the two factors alone. Deviations from
    the released code: only the last token's row of attention is computed (in the released code, the whole matrix); every
    picture of every sequence has its own grid, frames one by one (in the released code, batch item 0 with a grid of 24 x 24 at
    row 35). Behind another method the grid has gaps from the start, so attention alone ranks. The released LLaVA code cuts
    earlier caches (`cut_cache`), its Qwen2-VL code does not; without `official`, it is an option as for any method. What
    Qwen3-VL's tower adds to the tokens behind the first layers is not part of a change.
    """

    name = "clse"
    published: ClassVar[Mapping[str, Published]] = {
        "192": Published(CountSchedule({1: 330, 11: 210, 21: 62}), {"cut_cache": True}),
        "128": Published(CountSchedule({1: 220, 11: 140, 21: 41}), {"cut_cache": True}),
        "64": Published(CountSchedule({1: 110, 11: 70, 21: 20}), {"cut_cache": True}),
        "qwen2-vl 0.334": Published(PromptShares({1: 0.57, 10: 0.36, 19: 0.098}), num_layers=28),
        "qwen2-vl 0.223": Published(PromptShares({1: 0.38, 10: 0.24, 19: 0.066}), num_layers=28),
        "qwen2-vl 0.112": Published(PromptShares({1: 0.19, 10: 0.12, 19: 0.034}), num_layers=28),
    }
    earliest_layer = 1  # no layer exists before layer 0
    reads_attention = True
    depths = (1 / 32, 11 / 32, 21 / 32)
    leanest = (0.0, 0.64, 0.29)  # the later stages of the published settings

    def __init__(self, schedule: DropSchedule, mode: str = MODES[0], **options: Any) -> None:
        super().__init__(schedule, **options)
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; choose one of: {', '.join(MODES)}")
        self.mode = mode

    def score(self, state: PrefillState) -> Tensor:
        queries, keys = state.queries_and_keys()
        attention = last_row_attention(queries[state.last_rows()], keys, state)
        if self.mode == "attn":
            return attention
        scores = list(attention.split(state.seqlens))
        for index, factors in self.spectral_factors(state).items():
            scores[index] = factors if self.mode == "clse" else scores[index] * factors
        return torch.cat(scores)

    def spectral_factors(self, state: PrefillState) -> dict[int, Tensor]:
        """Of each sequence with a whole grid the factors of its tokens (T,), between 0 and 1; text tokens have 1."""
        assert state.previous is not None  # prefill refuses a schedule that drops at layer 0
        factors = {}
        for index, (rows, grids, (start, end)) in enumerate(
            zip(state.vision_rows(), state.vision_grids, state.spans, strict=True)
        ):
            if 0 < state.vision_counts[index] == state.prompt_vision_counts[index]:
                before = spectral_energy(state.previous[rows], grids)
                change = change_factor(before, spectral_energy(state.previous_output[rows], grids))
                factors[index] = torch.ones(end - start, device=change.device).index_copy(0, rows - start, change)
        return factors


def spectral_energy(hidden_states: Tensor, grids: tuple[Grid, ...]) -> Tensor:
    """(n,) mean magnitude over channels of a prompt's tokens (n, D), after a high-pass filter over each frame's grid."""
    parts = hidden_states.split([prod(grid) for grid in grids])
    return torch.cat([high_pass(part.float().unflatten(0, grid)) for part, grid in zip(parts, grids, strict=True)])


def high_pass(frames: Tensor) -> Tensor:
    """(frames * rows * columns,) mean magnitude over channels of frames (frames, rows, columns, D) without low frequencies."""
    _, rows, columns, _ = frames.shape
    sigma = max(SIGMA * min(rows // 2, columns // 2), EPSILON)
    row, column = (torch.arange(size, device=frames.device) - size // 2 for size in (rows, columns))
    squares = (row[:, None] ** 2 + column**2).float()
    spectrum = torch.fft.fftshift(torch.fft.fft2(frames, dim=(1, 2)), dim=(1, 2))
    passed = spectrum * (1 - (-squares / (2 * sigma**2)).exp())[..., None]
    return torch.fft.ifft2(torch.fft.ifftshift(passed, dim=(1, 2)), dim=(1, 2)).abs().mean(-1).flatten()


def change_factor(before: Tensor, after: Tensor) -> Tensor:
    """(n,) between 0 and 1: the relative change of energies (n,), standardised over the tokens, through a sharp sigmoid."""
    change = ((after - before).abs() / (before.mean() + before + EPSILON)).clamp(max=1)
    spread = change.std(correction=min(1, len(change) - 1))
    return ((change - change.mean()) / (spread + EPSILON) / SHARPNESS).sigmoid()
