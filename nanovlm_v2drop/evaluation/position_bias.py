"""Whether a method keeps vision tokens because of their place: the paper's Figure 3, as a number.

The kept tokens are counted at a method's first drop point, over many samples. If the place did not matter, every tenth of the
sequence would keep its share. `kl_bits` is the divergence from these shares, in bits (0 for even). `chi_square` is the usual
statistic of the same ten counts: 9 on average for draws with replacement, and less for one draw without replacement. Tokens of
one picture are not independent, so compare both with Random's, which is even by construction. Pictures can have a bias of their
own: important things stand more often in the middle.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

BINS = 10


def position_bias(stages: Sequence[tuple[int, Sequence[int]]], grid_size: int) -> dict[str, Any] | None:
    """Probabilities of being kept, from (vision tokens of the prompt, numbers of those that were kept) of each sample.

    `bins`: by tenth of the sequence; `rows`, `columns`, `map`: by place in the picture or frame of grid_size x grid_size
    tokens; `frames`: by picture or frame, where a prompt has several. Tokens that fill no whole picture (the newline behind a
    video) are not counted. None where there is nothing to count.
    """
    frames = max((count // grid_size**2 for count, _ in stages), default=0)
    if not frames:
        return None
    there, kept = np.zeros((BINS, frames, grid_size, grid_size)), np.zeros((BINS, frames, grid_size, grid_size))
    for count, numbers in stages:
        whole = count - count % grid_size**2
        inside = np.asarray(numbers, dtype=int)
        np.add.at(there, places(np.arange(whole), whole, grid_size), 1)
        np.add.at(kept, places(inside[inside < whole], whole, grid_size), 1)
    by_frame = share(kept.sum((0, 2, 3)), there.sum((0, 2, 3)))
    there, kept = there.sum(1), kept.sum(1)
    bins_there, bins_kept = there.sum((1, 2)), kept.sum((1, 2))
    return {
        "kept_share": round(float(kept.sum() / there.sum()), 5),
        "bins": share(bins_kept, bins_there),
        "rows": share(kept.sum((0, 2)), there.sum((0, 2))),
        "columns": share(kept.sum((0, 1)), there.sum((0, 1))),
        "map": share(kept.sum(0), there.sum(0)),
        "frames": by_frame if grid_size > 1 else [],
        "kl_bits": round(divergence(bins_kept, bins_there), 6),
        "chi_square": round(chi_square(bins_kept, bins_there), 3),
        "degrees_of_freedom": BINS - 1,
    }


def places(numbers: np.ndarray, count: int, grid_size: int) -> tuple[np.ndarray, ...]:
    """Bin, frame, row and column of each token."""
    frame, place = np.divmod(numbers, grid_size**2)
    return numbers * BINS // count, frame, *np.divmod(place, grid_size)


def share(kept: np.ndarray, there: np.ndarray) -> list[Any]:
    """Probabilities as (nested) lists; None where no token stands."""
    if kept.ndim > 1:
        return [share(*pair) for pair in zip(kept, there, strict=True)]
    return [round(float(one / all_), 5) if all_ else None for one, all_ in zip(kept, there, strict=True)]


def divergence(kept: np.ndarray, there: np.ndarray) -> float:
    """Kullback-Leibler divergence of where kept tokens stand from where all tokens stand, in bits."""
    if not kept.sum():
        return 0.0
    p, q = kept / kept.sum(), there / there.sum()
    filled = p > 0
    return float((p[filled] * np.log2(p[filled] / q[filled])).sum())


def chi_square(kept: np.ndarray, there: np.ndarray) -> float:
    """Pearson's statistic of the kept counts against an even share of each bin."""
    wanted = there * kept.sum() / there.sum()
    return float(((kept - wanted) ** 2 / np.where(wanted > 0, wanted, 1)).sum())
