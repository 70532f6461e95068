"""Budgets: how many vision tokens a layer sees on average, asked for once and solved for every prompt by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real

from ..models.vlm import PackedInputs
from .base import TokenDropper
from .schedule import BatchSchedule, DropSchedule


@dataclass(frozen=True)
class Shape:
    """What a schedule must know: vision tokens of a prompt, layers of the decoder, and frames of the prompt's video.

    `alike`: whether every picture gives the model as many vision tokens as these.
    """

    num_vision_tokens: int
    num_layers: int
    frames: int = 1
    alike: bool = True


@dataclass(frozen=True)
class Budget:
    """Mean vision tokens a layer: so many `tokens`, or the share `retain` of the prompt's own vision tokens.

    A prompt with fewer vision tokens than `tokens` keeps all of them.
    """

    tokens: float | None = None
    retain: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for both, for none, and for a number out of range; TypeError for what is no number."""
        if (self.tokens is None) == (self.retain is None):
            raise ValueError(f"a budget is either tokens or retain, not tokens {self.tokens} and retain {self.retain}")
        for name, value, example in (("tokens", self.tokens, "192"), ("retain", self.retain, "1/3")):
            if value is not None and (not isinstance(value, Real) or isinstance(value, bool)):
                raise TypeError(f"{name} is {value!r}: give a number, such as {name}={example}")
        if self.tokens is not None and not 0 <= self.tokens < inf:
            raise ValueError(f"a budget of {self.tokens} tokens must be 0 or more, and finite")
        if self.retain is not None and not 0 < self.retain <= 1:
            raise ValueError(f"retain {self.retain} must be above 0 and at most 1: it is a share of the vision tokens")

    def __str__(self) -> str:
        return f"{self.tokens:g}" if self.retain is None else f"{100 * self.retain:.4g}%"

    def mean_tokens(self, num_vision_tokens: int) -> float:
        """What it asks for in a prompt with so many vision tokens."""
        if self.retain is not None:
            return round(self.retain * num_vision_tokens, 2)
        assert self.tokens is not None
        return min(self.tokens, num_vision_tokens)

    def schedule(self, method: type[TokenDropper], shape: Shape) -> DropSchedule:
        """The method's schedule for one prompt; raises OutOfReach, with the floor, where the method cannot drop so much."""
        count = shape.num_vision_tokens
        if not count or (self.tokens is not None and self.tokens > count):
            return DropSchedule({})
        schedule = method.schedule_for(self.mean_tokens(count), count, shape.num_layers, shape.frames)
        if not isinstance(schedule, DropSchedule):
            raise TypeError(f"schedule_for of {method.__name__} must return a DropSchedule, not {schedule!r}")
        return schedule

    def dropper(self, method: type[TokenDropper], shapes: Sequence[Shape]) -> TokenDropper:
        """The method for a batch of prompts of these shapes; raises OutOfReach as `schedule`."""
        return method(for_batch([self.schedule(method, shape) for shape in shapes]))


def shapes_of(packed: PackedInputs, num_layers: int) -> list[Shape]:
    """The shape of each prompt of a batch."""
    return [
        Shape(count, num_layers, max((frames for frames, _, _ in grids), default=1))
        for count, grids in zip(packed.vision_counts, packed.vision_grids, strict=True)
    ]


def for_batch(schedules: Sequence[DropSchedule]) -> DropSchedule:
    """One schedule for a batch of prompts with these schedules."""
    return schedules[0] if len(set(schedules)) == 1 else BatchSchedule(schedules)


def asked_budget(dropper: object, tokens: float | None, retain: float | None) -> Budget | None:
    """The budget for a method that is given as a class; None for a dropper that is made already, and for no dropping.

    Raises TypeError for a class without a budget, a budget without a class, and anything that is no dropper.
    """
    is_class = isinstance(dropper, type) and issubclass(dropper, TokenDropper)
    has_budget = tokens is not None or retain is not None
    if not is_class and dropper is not None and not isinstance(dropper, TokenDropper):
        found = f'DROPPERS["{dropper}"]' if isinstance(dropper, str) else "V2Drop"
        raise TypeError(
            f"the dropper is {dropper!r}: give a class with a budget, such as {found} and retain=1/3, "
            "or a dropper that is made, such as V2Drop(DropSchedule({3: 0.5}))"
        )
    if is_class and not has_budget:
        raise TypeError(f"{getattr(dropper, '__name__', dropper)} needs a budget: give retain=1/3 or tokens=192 beside it")
    if has_budget and not is_class:
        given = "no dropper" if dropper is None else f"a {type(dropper).__name__} that has its schedule"
        raise TypeError(f"tokens and retain are budgets for a class, such as V2Drop, not for {given}")
    return Budget(tokens, retain) if has_budget else None
