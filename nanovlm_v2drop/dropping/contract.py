"""What a drop point must leave as it is, checked for methods that are not part of this package."""

from itertools import pairwise

import torch
from torch import Tensor

from .base import PrefillState, TokenDropper, require


class ContractBroken(ValueError):
    """A method lost text, kept a row twice, or kept another number of rows than its schedule says."""


def is_own(method: type[TokenDropper]) -> bool:
    """Whether the method is part of this package, whose tests check what it keeps."""
    return method.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_kept(dropper: TokenDropper, before: PrefillState, after: PrefillState) -> None:
    """Raise ContractBroken for rows that may not stand behind a drop point.

    The text rows of `before` must be there in their order and unchanged, the vision rows as many as `vision_counts` says, and
    none twice unless the method `merges`. On a GPU a wrong row is told as by `require`.
    """
    check_sizes(dropper, after)
    text = [torch.cat(state.text_rows()) for state in (before, after)]
    if text[0].shape != text[1].shape:
        raise ContractBroken(f"{dropper.name} keeps {len(text[1])} of {len(text[0])} text rows: text must never leave")
    old, new = before.hidden_states[text[0]], after.hidden_states[text[1]]
    # Compared as bytes, in which NaN equals itself.
    is_same, place = (as_bytes(old) == as_bytes(new)).all(), f", at the drop point of layer {before.layer_idx}"
    require(is_same, ContractBroken, f"{dropper.name} loses, moves or changes text rows: text must stay{place}")
    masks = after.vision_mask.split(after.seqlens)
    for mask, count in zip(masks, after.vision_counts, strict=True):
        message = f"{dropper.name} keeps other rows than the {count} vision tokens that it should{place}"
        require(mask.sum() == count, ContractBroken, message)
    if not dropper.merges:
        check_order(dropper, before, after)


def check_order(dropper: TokenDropper, before: PrefillState, after: PrefillState) -> None:
    """Raise ContractBroken unless each vision row is there once at most, and where it was: behind as many text rows.

    Rows that an earlier method of a chain has averaged have no number, so they are not checked.
    """
    old, new = (list(map(text_before, *parts_of(state))) for state in (before, after))
    for (numbers, places), (kept, kept_places), size in zip(old, new, before.prompt_vision_counts, strict=True):
        known = places.new_full((size + 1,), -1).scatter(0, torch.where(numbers < 0, size, numbers), places)
        largest_so_far = torch.cat([kept.new_full((1,), -1), kept]).cummax(0).values[:-1]
        in_order = (kept > largest_so_far) & (known[kept.clamp(0, size)] == kept_places) | (kept < 0)
        message = f"{dropper.name} keeps a vision row twice, or moves rows: they stay in reading order unless merges = True"
        require(in_order.all(), ContractBroken, f"{message}, at the drop point of layer {before.layer_idx}")


def parts_of(state: PrefillState) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The vision rows of each sequence, counted from its first row, its mask, and its `vision_indices`."""
    rows = [own - start for own, (start, _) in zip(state.vision_rows(), state.spans, strict=True)]
    return rows, list(state.vision_mask.split(state.seqlens)), list(state.vision_indices.split(state.seqlens))


def text_before(rows: Tensor, mask: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of one sequence's vision rows, and how many text rows stand before each."""
    return indices[rows], (~mask).cumsum(0)[rows]


def check_sizes(dropper: TokenDropper, after: PrefillState) -> None:
    """Raise ContractBroken unless every field speaks of the same rows."""
    if not isinstance(after, PrefillState):
        raise ContractBroken(f"{dropper.name} must return a PrefillState, not {type(after).__name__}")
    sizes = {
        "sum(seqlens)": sum(after.seqlens),
        "hidden_states": len(after.hidden_states),
        "position_ids": after.position_ids.shape[-1],
        "vision_mask": len(after.vision_mask),
        "vision_indices": len(after.vision_indices),
        **({} if after.deepstack is None else {"deepstack": len(after.deepstack)}),
    }
    if any(one != other for one, other in pairwise(sizes.values())):
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ContractBroken(f"{dropper.name} keeps another number of rows than its schedule says: {listed}")


def as_bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
