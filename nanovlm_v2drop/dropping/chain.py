"""Two or more methods in one run, with one schedule and one accounting: `Chain([first, second])`.

A method before the decoder and one inside it is the usual pair. Each method acts at its own drop points, which must differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any, ClassVar

from torch import Tensor

from ..models.decoder import ModuleOutputs
from .base import PrefillState, TokenDropper
from .contract import check_kept, is_own
from .schedule import BatchSchedule, DropSchedule, OutOfReach

CLOSE = 0.5  # tokens between a mean and its target that count as met
STEPS = 20  # of the search for a part's own target


class ChainSchedule(DropSchedule):
    """The schedules of several methods as one: every drop point keeps what its own schedule says."""

    def __init__(self, parts: Sequence[DropSchedule]) -> None:
        """Raises ValueError where two parts have a drop point at one layer."""
        owners = {layer: number for number, part in enumerate(parts) for layer in part}
        if len(owners) < sum(map(len, parts)):
            layers = sorted(layer for number, part in enumerate(parts) for layer in part if owners[layer] != number)
            raise ValueError(
                f"two methods of a chain drop at layer {layers[0]}: give one of them a schedule with other layers, or the "
                "option layers, such as v2drop:layers=4/8"
            )
        super().__init__(dict.fromkeys(sorted(owners), 1.0))
        self.parts = tuple(parts)
        self.keep_ratios = {layer: parts[owners[layer]][layer] for layer in self}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.parts)})"

    def part_at(self, layer_idx: int) -> DropSchedule:
        return next(part for part in self.parts if layer_idx in part)

    def kept_count(self, layer_idx: int, current: int) -> int:
        return self.part_at(layer_idx).kept_count(layer_idx, current)

    def kept_of(self, layer_idx: int, current: int, prompt: int) -> int:
        return self.part_at(layer_idx).kept_of(layer_idx, current, prompt)


class Chain(TokenDropper):
    """Several droppers in one run: `Chain([DivPrune(first), V2Drop(second)])`; for a budget, see `Chain.of`.

    `cut_cache` of one of them cuts earlier caches at the drop points of all. Each method has its own `marks`.
    """

    methods: ClassVar[tuple[type[TokenDropper], ...]] = ()
    levels: ClassVar[tuple[float, ...]] = ()  # share of the reduction that is made behind each method, on a logarithmic scale

    def __init__(self, droppers: Sequence[TokenDropper], *, cut_cache: bool | None = None) -> None:
        """Raises TypeError for anything but droppers, ValueError where two act at one layer or one has nothing to cut to."""
        if not droppers or not all(isinstance(dropper, TokenDropper) for dropper in droppers):
            raise TypeError(f"a chain is made of droppers, such as [V2Drop(schedule), ...], not of {droppers!r}")
        self.droppers = tuple(droppers)
        self.name = "+".join(dropper.name for dropper in droppers)
        self.merges = any(dropper.merges for dropper in droppers)
        self.renumbers = any(dropper.renumbers for dropper in droppers)
        self.schedule = ChainSchedule([dropper.schedule for dropper in droppers])
        cuts = self.cut_cache or any(dropper.cut_cache for dropper in droppers)
        self.cut_cache = cuts if cut_cache is None else cut_cache
        for dropper in droppers:
            dropper.check_cut(self.cut_cache)
    @classmethod
    def of(cls, methods: Sequence[type[TokenDropper]], share: float | Sequence[float] | None = None) -> "type[ChainFor]":
        """A chain of methods as a class, which is used like any other method: made with a schedule, or solved for a budget.

        `share`: the part of the reduction that the first method makes, from 0 to 1 on a logarithmic scale. With 0.5, the
        default for two methods, both keep the same share of the tokens that they receive. More than two methods take one number
        for each of them but the last. Raises ValueError for shares out of range, and for methods in another order than they
        act.
        """
        last = len(methods) - 1
        shares = (1 / len(methods),) * last if share is None else (share,) if isinstance(share, (int, float)) else tuple(share)
        if last < 1 or len(shares) != last or not all(0 <= part <= 1 for part in shares) or sum(shares) > 1:
            raise ValueError(f"{len(methods)} methods need {last} shares from 0 to 1, together at most 1, not {list(shares)}")
        if late := [method.name for method in methods[1:] if method.latest_layer == 0]:
            raise ValueError(f"{late[0]} acts before the decoder: it must be the first of a chain")
        own_share = "" if share is None else ":share=" + "/".join(f"{part:g}" for part in shares)
        names = {"name": "+".join(method.name for method in methods) + own_share, "__module__": cls.__module__}
        flags = {flag: any(getattr(method, flag) for method in methods) for flag in ("merges", "renumbers", "seeded")}
        parts = {"methods": tuple(methods), "levels": (*accumulate(shares), 1.0)}
        return type("ChainFor", (ChainFor,), {**names, **flags, **parts})

    @property
    def layers_read(self) -> frozenset[int]:
        return frozenset().union(*(dropper.layers_read for dropper in self.droppers))

    @property
    def layers_observed(self) -> frozenset[int]:
        return frozenset().union(*(dropper.layers_observed for dropper in self.droppers))

    def check(self, num_layers: int) -> None:
        for dropper in self.droppers:
            dropper.check(num_layers)

    def begin(self, state: PrefillState) -> PrefillState:
        for number in range(len(self.droppers)):
            state = self.on_own_marks(number, state, self.droppers[number].begin)
        pruning = [dropper.name for dropper in self.droppers if dropper.decode_pruning(state) is not None]
        if pruning and len(self.droppers) > 1:
            raise ValueError(f"{pruning[0]} hides cache slots while decoding, which a chain cannot: give it prune=0")
        return state

    def observe(self, state: PrefillState, outputs: ModuleOutputs) -> None:
        for number, dropper in enumerate(self.droppers):
            if state.layer_idx in dropper.layers_observed:
                state.marks = state.carried.get(marks_of(number))
                dropper.observe(state, outputs)
                state.carried, state.marks = carrying(state, number), None

    def __call__(self, state: PrefillState) -> PrefillState:
        number = next(number for number, dropper in enumerate(self.droppers) if state.layer_idx in dropper.schedule)
        return self.on_own_marks(number, state, self.droppers[number])

    def on_own_marks(
        self, number: int, state: PrefillState, step: Callable[[PrefillState], PrefillState]
    ) -> PrefillState:
        """The state after a step of one method, which sees its own marks; those of the others follow their rows."""
        seen = replace(state, marks=state.carried.get(marks_of(number)))
        after = step(seen)
        if step is self.droppers[number] and not is_own(type(step)):
            check_kept(self.droppers[number], seen, after)
        return replace(after, marks=None, carried=carrying(after, number))


class ChainFor(Chain):
    """A chain whose methods are fixed by its class, made with one schedule; `Chain.of` makes the classes."""

    def __init__(self, schedule: DropSchedule, seed: int = 0, *, cut_cache: bool | None = None) -> None:
        """Raises TypeError for a schedule that was not made for a chain of these methods."""
        draw: dict[str, Any] = {"seed": seed}
        made = zip(self.methods, split(schedule, len(self.methods)), strict=True)
        droppers = [method(part, **draw) if method.seeded else method(part) for method, part in made]
        super().__init__(droppers, cut_cache=cut_cache)
        self.name, self.schedule, self.seed = type(self).name, schedule, seed

    @classmethod
    def schedule_for(
        cls, mean_tokens: float, num_vision_tokens: int, num_layers: int, frames: int = 1
    ) -> DropSchedule:
        """The schedule for a mean over all layers. A method that cannot make its part of the reduction makes what it can.

        Raises OutOfReach, with the chain's floor, where the last method cannot make the rest.
        """
        parts: list[DropSchedule] = []
        for number, (method, level) in enumerate(zip(cls.methods, cls.levels, strict=True)):
            target = num_vision_tokens * (mean_tokens / num_vision_tokens) ** level
            try:
                parts.append(solve_part(method, parts, target, num_vision_tokens, num_layers, frames))
            except OutOfReach as error:
                parts.append(error.floor)
                if number == len(cls.methods) - 1:
                    raise OutOfReach(f"{cls.name}: {error}", ChainSchedule(parts)) from error
        return ChainSchedule(parts)


def marks_of(number: int) -> str:
    """The key of a method's marks in `PrefillState.carried`."""
    return f"marks of method {number}"


def carrying(state: PrefillState, number: int) -> Mapping[str, Tensor]:
    """What follows the rows, with the marks that one method has set."""
    return state.carried if state.marks is None else {**state.carried, marks_of(number): state.marks}


def split(schedule: DropSchedule, count: int) -> list[DropSchedule]:
    """The `count` parts of a chain's schedule, of one prompt or of a batch; a prompt that keeps everything may have none."""
    if isinstance(schedule, BatchSchedule):
        return [BatchSchedule(parts) for parts in zip(*(split(own, count) for own in schedule.schedules), strict=True)]
    if isinstance(schedule, ChainSchedule) and len(schedule.parts) == count:
        return list(schedule.parts)
    if isinstance(schedule, DropSchedule) and not schedule:
        return [schedule] * count
    raise TypeError(f"a chain of {count} methods takes a ChainSchedule of {count} parts, not {schedule!r}; see schedule_for")


def solve_part(
    method: type[TokenDropper],
    parts: Sequence[DropSchedule],
    target: float,
    num_vision_tokens: int,
    num_layers: int,
    frames: int,
) -> DropSchedule:
    """The method's schedule with which a chain that has `parts` already has the mean `target`.

    Raises OutOfReach, and ValueError where the method always drops at a layer of another one.
    """
    if not parts:
        return method.schedule_for(target, num_vision_tokens, num_layers, frames)
    first = next(iter(method.schedule_for(num_vision_tokens, num_vision_tokens, num_layers)), num_layers)
    arriving = [num_vision_tokens, *ChainSchedule(parts).vision_tokens_per_layer(num_vision_tokens, num_layers)][first]

    def error(candidate: DropSchedule) -> float:
        try:
            whole = ChainSchedule([*parts, candidate])
        except ValueError:  # at a layer of another method, where PyramidDrop goes for small budgets
            return inf
        return whole.mean_tokens(num_vision_tokens, num_layers) - target

    best = nearest(partial(method.schedule_for, num_vision_tokens=arriving, num_layers=num_layers), error, target, arriving)
    at_least = ChainSchedule([*parts, best]).mean_tokens(num_vision_tokens, num_layers)
    if at_least > target + CLOSE:
        reached = f"with these shares it is at least {at_least:.1f}"
        raise OutOfReach(f"a mean of {target:g} vision tokens is out of reach: {reached}", best)
    return best


def nearest(
    solve: Callable[[float], DropSchedule], error: Callable[[DropSchedule], float], target: float, arriving: int
) -> DropSchedule:
    """The schedule with the smallest `error`, which is infinite for one that cannot be.

    Behind a method inside the decoder, early layers hold more than `arriving`.
    """
    best, low, high = solve(min(target, arriving)), 0.0, float(arriving)
    for _ in range(STEPS):
        if abs(error(best)) <= CLOSE:
            break
        middle = (low + high) / 2
        try:
            candidate = solve(middle)
        except OutOfReach:
            low = middle
            continue
        low, high = (low, middle) if 0 <= error(candidate) < inf else (middle, high)
        best = min(best, candidate, key=lambda one: abs(error(one)))
    return best
