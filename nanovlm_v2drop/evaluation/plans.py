"""Which rows a table has: methods at equal budgets, or with their published settings."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import mean
from typing import Any

from ..dropping import DropSchedule, TokenDropper
from ..dropping.budget import Budget, Shape, for_batch, shapes_of
from ..dropping.schedule import OutOfReach
from ..inference import NothingDropped
from ..loading.zoo import VisionLanguageModel
from ..models.vlm import PackedInputs
from ..processing.images import ImageProcessor
from ..processing.prompts import Request
from .methods import ALL, DENSE, find_methods, naming_errors

NO_SHAPE = Shape(0, 1)


@dataclass(frozen=True)
class Plan:
    """One method with one budget or one setting; `make` is None for dense.

    `label` names the method with its setting. `solve` gives the schedule of a prompt and `make` the dropper of a schedule:
    every prompt has a schedule for its own number of vision tokens. `shape` is that of the task's first prompt. `budget` is
    what was asked for, None for dense and for published settings. `note` is what a reader of the table must know, `paper` the
    paper's own numbers for this row.
    """

    label: str
    make: type[TokenDropper] | partial[Any] | None = None
    solve: Callable[[Shape], DropSchedule] | None = None
    shape: Shape = NO_SHAPE
    budget: Budget | None = None
    note: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> type[TokenDropper] | None:
        """The class of the method."""
        made: Any = self.make.func if isinstance(self.make, partial) else self.make
        return made

    @cached_property
    def dropper(self) -> TokenDropper | None:
        """The dropper of the task's first prompt."""
        with naming_errors(self.kind):
            return None if self.make is None else self.make(self.schedule)

    @property
    def schedule(self) -> DropSchedule:
        """The schedule of the task's first prompt."""
        return self.schedule_for(self.shape)

    def schedule_for(self, shape: Shape) -> DropSchedule:
        """The schedule of a prompt: at the method's floor where its budget lies below that."""
        return self.solved(shape)[0]

    def is_at_floor(self, shape: Shape) -> bool:
        """Whether the method cannot go down to the budget in such a prompt."""
        return self.solved(shape)[1]

    def note_on(self, shapes: Sequence[Shape]) -> str:
        """What a reader must know of answers to prompts of these shapes: `note`, and where the budget is not met."""
        at_floor = sum(map(self.is_at_floor, shapes))
        tokens = mean(self.schedule_for(shape).mean_tokens(shape.num_vision_tokens, shape.num_layers) for shape in shapes)
        floor = f"cannot go below {tokens:.1f} mean tokens: shown at its floor, once"
        if at_floor < len(shapes):
            floor = f"at its floor in {at_floor} of {len(shapes)} prompts, with {tokens:.1f} mean tokens over all"
        unmet = floor if at_floor else self.unmet_note(tokens, shapes)
        return "; ".join(note for note in (self.note, unmet, self.smaller_note(shapes)) if note)

    def unmet_note(self, tokens: float, shapes: Sequence[Shape]) -> str:
        """That these mean `tokens` miss the budget, although it is not below the floor; empty where they meet it."""
        if self.budget is None or is_met(tokens, asked := asked_mean(self.budget, shapes)):
            return ""
        return f"has {tokens:.1f} mean tokens, not the {asked:.1f} that were asked for"

    def smaller_note(self, shapes: Sequence[Shape]) -> str:
        """How many prompts have fewer vision tokens than were asked for; empty where none has."""
        if self.budget is None or self.budget.tokens is None:
            return ""
        smaller = sum(shape.num_vision_tokens < self.budget.tokens for shape in shapes)
        return f"{smaller} of {len(shapes)} prompts have fewer vision tokens and keep all" if smaller else ""

    def solved(self, shape: Shape) -> tuple[DropSchedule, bool]:
        if self.solve is None or not shape.num_vision_tokens:
            return DropSchedule({}), False
        if shape not in self.solutions:
            try:
                self.solutions[shape] = self.solve(shape), False
            except OutOfReach as error:
                self.solutions[shape] = error.floor, True
        return self.solutions[shape]

    @cached_property
    def solutions(self) -> dict[Shape, tuple[DropSchedule, bool]]:
        """What was solved so far: prompts of one shape are many."""
        return {}

    def dropper_for(self, packed: PackedInputs, num_layers: int) -> TokenDropper | None:
        """The dropper of a batch, in which each prompt has its own schedule."""
        if self.make is None:
            return None
        return self.make(for_batch([self.schedule_for(shape) for shape in shapes_of(packed, num_layers)]))

    @property
    def method(self) -> str:
        return DENSE if self.kind is None else self.kind.name

    @property
    def asked_tokens(self) -> float | None:
        """The mean that was asked for in the task's first prompt."""
        return None if self.budget is None else self.budget.mean_tokens(self.shape.num_vision_tokens)

    @property
    def seed(self) -> int:
        return getattr(self.dropper, "seed", 0)

    @property
    def row(self) -> str:
        """Names the row of the table, which the seeds of a method share."""
        return self.label if self.budget is None else f"{self.label} {self.budget}"

    @property
    def key(self) -> str:
        """Names the plan in results files: its row and, where the method draws at random, the seed."""
        return self.row + (f" seed {self.seed}" if self.kind is not None and self.kind.seeded else "")

    @property
    def warns(self) -> bool:
        """Whether a user is warned that nothing was dropped: no row of the table says so.

        A row says so at a floor, and where prompts are smaller than the budget.
        """
        return not self.note and self.budget is None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around answers of this plan: an error in a user's method is one line that names its file; for warnings see `warns`.

        The warnings are those of the whole program, so this is not for several threads.
        """
        with warnings.catch_warnings(), naming_errors(self.kind):
            if not self.warns:
                warnings.simplefilter("ignore", NothingDropped)
            yield


def asked_mean(budget: Budget, shapes: Sequence[Shape]) -> float:
    """The mean number of tokens that a budget asks for in prompts of these shapes."""
    return mean(budget.mean_tokens(shape.num_vision_tokens) for shape in shapes)


def is_met(tokens: float, asked: float) -> bool:
    """Whether a mean is the one that was asked for, within one token or 0.5 %."""
    return abs(tokens - asked) <= max(1.0, 0.005 * asked)


def prompt_shape(vlm: VisionLanguageModel, request: Request) -> Shape:
    """The shape of one prompt."""
    _, media = vlm.tokens_and_media(request)
    frames = max((frames for medium in media for frames, _, _ in medium.grids), default=1)
    alike = isinstance(vlm.image_processor, ImageProcessor)
    return Shape(sum(medium.num_tokens for medium in media), vlm.config.text_config.num_hidden_layers, frames, alike)


def first_seeds(plans: Sequence[Plan]) -> list[Plan]:
    """One plan of each row."""
    return list({plan.row: plan for plan in reversed(plans)}.values())[::-1]


def equal_budget_plans(
    names: Sequence[str], budgets: Sequence[Budget], shape: Shape, seeds: Sequence[int], floors: bool = False
) -> list[Plan]:
    """Dense once, every other method at every budget, for a task whose first prompt has this `shape`.

    A method that cannot go down to a budget in the first prompt runs once at its floor, with a note. Raises ValueError for an
    unknown method, and for a budget that none of the methods reaches in the first prompt. Where prompts are not
    `alike`, another prompt may reach a budget in tokens, so that is no error; nor is it with `floors`, for budgets that
    nobody asked for.
    """
    methods, plans, at_floor = find_methods(names), [], set[type[TokenDropper]]()
    droppers = [method for method in methods if method is not None]
    if None in methods:
        plans.append(Plan(DENSE, shape=shape))
    for budget in dict.fromkeys(budgets):
        unreached = out_of_reach(droppers, budget, shape)
        if droppers and len(unreached) == len(droppers) and not floors and (shape.alike or budget.tokens is None):
            raise next(iter(unreached.values()))
        for method in (method for method in droppers if method not in at_floor):
            solve = partial(budget.schedule, method)
            plans += [Plan(method.name, make, solve, shape, budget) for make in makers(method, seeds)]
        at_floor |= set(unreached)
    return plans


def out_of_reach(
    methods: Sequence[type[TokenDropper]], budget: Budget, shape: Shape
) -> dict[type[TokenDropper], OutOfReach]:
    """Why the methods that cannot meet the budget in a prompt of this shape cannot."""
    unreached = {}
    for method in methods:
        try:
            with naming_errors(method):
                if shape.alike and budget.tokens is not None and budget.tokens > shape.num_vision_tokens:
                    method.schedule_for(budget.tokens, shape.num_vision_tokens, shape.num_layers, shape.frames)
                budget.schedule(method, shape)
        except OutOfReach as error:
            unreached[method] = error
    return unreached


def makers(
    method: type[TokenDropper], seeds: Sequence[int], options: Mapping[str, Any] | None = None
) -> list[partial[Any]]:
    """What makes the dropper of a schedule, or for a method that draws at random one for each seed.

    Raises ValueError for a method that needs more than a schedule.
    """
    draws: list[dict[str, Any]] = [{"seed": seed} for seed in seeds] if method.seeded else [{}]
    given = [{**draw, **(options or {})} for draw in draws]
    try:
        for arguments in given:
            inspect.signature(method).bind(DropSchedule({}), **arguments)
    except TypeError as error:
        known = "a schedule and a seed" if method.seeded else "a schedule"
        raise ValueError(f"{method.__name__} is made with {known} and nothing more: {error}") from error
    return [partial(method, **arguments) for arguments in given]


def official_plans(names: Sequence[str], shape: Shape, seeds: Sequence[int]) -> list[Plan]:
    """Every published setting of every method, at the same depths and shares on a model and a prompt of another size.

    Raises ValueError for an unknown method, and for one without a published setting that was asked for by name.
    """
    plans = []
    for method in find_methods(names):
        if method is None:
            plans.append(Plan(DENSE, shape=shape))
        elif not method.published and ALL not in names:
            raise ValueError(f"{method.name} has no published setting; compare it with --accounting equal")
        else:
            for setting, (schedule, options, num_layers) in method.published.items():
                label, solve = f"{method.name} {setting}", partial(mapped, schedule, num_layers)
                note = schedule.mapping_note(shape.num_layers, shape.num_vision_tokens, num_layers, shape.frames)
                plans += [Plan(label, make, solve, shape, note=note) for make in makers(method, seeds, options)]
    return plans


def mapped(schedule: DropSchedule, from_layers: int, shape: Shape) -> DropSchedule:
    """A published schedule of a decoder of `from_layers` for a prompt of this shape."""
    return schedule.mapped(shape.num_layers, shape.num_vision_tokens, from_layers, shape.frames)
