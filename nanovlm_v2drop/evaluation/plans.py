"""Which rows a table has: methods at equal budgets, or with their published settings."""

import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..dropping import DROPPERS, DropSchedule, TokenDropper, by_name
from ..dropping.schedule import OutOfReach
from ..inference import NothingDropped
from ..loading.zoo import VisionLanguageModel
from ..processing.prompts import Request

DENSE, ALL = "dense", "all"


@dataclass(frozen=True)
class Plan:
    """One method with one schedule; `dropper` is None for dense.

    `label` names the method with its setting. `asked_tokens` is the mean that was asked for, None for dense and for
    published settings; `note` what a reader of the table must know; `paper` the paper's own numbers for this row.
    """

    label: str
    dropper: TokenDropper | None = None
    asked_tokens: float | None = None
    note: str = ""
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return DENSE if self.dropper is None else self.dropper.name

    @property
    def schedule(self) -> DropSchedule:
        return DropSchedule({}) if self.dropper is None else self.dropper.schedule

    @property
    def seed(self) -> int:
        return getattr(self.dropper, "seed", 0)

    @property
    def row(self) -> str:
        """Names the row of the table, which the seeds of a method share."""
        return self.label if self.asked_tokens is None else f"{self.label} {self.asked_tokens:g}"

    @property
    def key(self) -> str:
        """Names the plan in results files: its row and, where the method draws at random, the seed."""
        return self.row + (f" seed {self.seed}" if self.dropper is not None and self.dropper.seeded else "")

    @contextmanager
    def floor_allowed(self) -> Iterator[None]:
        """In here nobody is warned that nothing was dropped, where `note` says so already: a floor may be everything."""
        with warnings.catch_warnings():
            if self.note:
                warnings.simplefilter("ignore", NothingDropped)
            yield


@dataclass(frozen=True)
class Shape:
    """What a schedule must know: vision tokens of a prompt, layers of the decoder, and frames of the prompt's video."""

    num_vision_tokens: int
    num_layers: int
    frames: int = 1


def prompt_shape(vlm: VisionLanguageModel, request: Request) -> Shape:
    """The shape of one prompt; where prompts differ in size, a schedule solved for it keeps the same shares of the others."""
    _, media = vlm.tokens_and_media(request)
    frames = max((frames for medium in media for frames, _, _ in medium.grids), default=1)
    return Shape(sum(medium.num_tokens for medium in media), vlm.config.text_config.num_hidden_layers, frames)


def first_seeds(plans: Sequence[Plan]) -> list[Plan]:
    """One plan of each row."""
    return list({plan.row: plan for plan in reversed(plans)}.values())[::-1]


def find_methods(names: Sequence[str]) -> list[type[TokenDropper] | None]:
    """The classes that the names stand for, None for dense; "all" is dense and every entry of DROPPERS.

    "path/to/file.py:Class" is a user's own. Raises ValueError for a name that is nothing of these, and for two methods that
    would share a row.
    """
    expanded = [name for given in names for name in ([DENSE, *DROPPERS] if given == ALL else [given])]
    methods = [None if name == DENSE else find_method(name) for name in dict.fromkeys(expanded)]
    by_name(method for method in methods if method is not None)
    return methods


def find_method(name: str) -> type[TokenDropper]:
    path, colon, class_name = name.rpartition(":")
    if colon and path.endswith(".py"):
        return load_method(Path(path), class_name)
    if name not in DROPPERS:
        known = ", ".join([DENSE, *DROPPERS])
        raise ValueError(f"unknown method {name!r}; choose from: {known}; or all; or give your own as FILE.py:CLASS")
    return DROPPERS[name]


def load_method(path: Path, class_name: str) -> type[TokenDropper]:
    """The class from a user's file; raises ValueError where the file or a complete TokenDropper in it is missing."""
    found = getattr(run_file(path), class_name, None)
    if not inspect.isclass(found) or not issubclass(found, TokenDropper):
        raise ValueError(f"{path} has no class {class_name} that is a TokenDropper")
    if not isinstance(getattr(found, "name", None), str):
        raise ValueError(f'{class_name} in {path} needs a name: a class attribute name = "..."')
    if found.name in (DENSE, *DROPPERS):
        raise ValueError(f"{class_name} in {path} is called {found.name!r} as another method is: give it a name of its own")
    if all(vars(TokenDropper)[step] is getattr(found, step) for step in ("score", "select", "compress")):
        raise ValueError(f"{class_name} in {path} chooses nothing: it must have a score, a select or a compress method")
    return found


def run_file(path: Path) -> ModuleType:
    """A user's file as a module; raises ValueError where it is missing, no Python, or misses an import of its own."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--methods: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"--methods: {path} cannot be read: {error}") from error
    return module


def equal_budget_plans(names: Sequence[str], budgets: Sequence[float], shape: Shape, seeds: Sequence[int]) -> list[Plan]:
    """Dense once, every other method at every budget (mean vision tokens a layer).

    A method that cannot go down to a budget runs once at its floor, with a note. Raises ValueError for an unknown method,
    and for a budget that none of the methods reaches.
    """
    methods, plans, at_floor = find_methods(names), [], set[str]()
    droppers = [method for method in methods if method is not None]
    if None in methods:
        plans.append(Plan(DENSE))
    for budget in dict.fromkeys(budgets):
        reached, unreached = solve(droppers, budget, shape)
        if droppers and not reached:
            raise next(iter(unreached.values()))
        for method in droppers:
            if method in reached:
                schedule, note = reached[method], ""
            elif method.name in at_floor:
                continue
            else:
                at_floor.add(method.name)
                schedule, note = unreached[method].floor, floor_note(unreached[method].floor, shape)
            plans += [Plan(method.name, dropper, budget, note) for dropper in make_droppers(method, schedule, seeds)]
    return plans


def solve(
    methods: Sequence[type[TokenDropper]], budget: float, shape: Shape
) -> tuple[dict[type[TokenDropper], DropSchedule], dict[type[TokenDropper], OutOfReach]]:
    """The schedules that meet the budget, and for the other methods why there is none."""
    reached, unreached = {}, {}
    for method in methods:
        try:
            reached[method] = method.schedule_for(budget, shape.num_vision_tokens, shape.num_layers, shape.frames)
        except OutOfReach as error:
            unreached[method] = error
    return reached, unreached


def floor_note(floor: DropSchedule, shape: Shape) -> str:
    mean = floor.mean_tokens(shape.num_vision_tokens, shape.num_layers)
    return f"cannot go below {mean:.1f} mean tokens: shown at its floor, once"


def make_droppers(
    method: type[TokenDropper], schedule: DropSchedule, seeds: Sequence[int], options: Mapping[str, Any] | None = None
) -> list[TokenDropper]:
    """One dropper, or for a method that draws at random one for each seed; raises ValueError for one that needs more."""
    draws: list[dict[str, Any]] = [{"seed": seed} for seed in seeds] if method.seeded else [{}]
    given = [{**draw, **(options or {})} for draw in draws]
    try:
        for arguments in given:
            inspect.signature(method).bind(schedule, **arguments)
    except TypeError as error:
        known = "a schedule and a seed" if method.seeded else "a schedule"
        raise ValueError(f"{method.__name__} is made with {known} and nothing more: {error}") from error
    return [method(schedule, **arguments) for arguments in given]


def official_plans(names: Sequence[str], shape: Shape, seeds: Sequence[int]) -> list[Plan]:
    """Every published setting of every method, at the same depths and shares on a model of another size.

    Raises ValueError for an unknown method, and for one without a published setting that was asked for by name.
    """
    plans = []
    for method in find_methods(names):
        if method is None:
            plans.append(Plan(DENSE))
        elif not method.published and ALL not in names:
            raise ValueError(f"{method.name} has no published setting; compare it with --accounting equal")
        else:
            for setting, (schedule, options, num_layers) in method.published.items():
                target = shape.num_layers, shape.num_vision_tokens, num_layers, shape.frames
                label, note = f"{method.name} {setting}", schedule.mapping_note(*target)
                droppers = make_droppers(method, schedule.mapped(*target), seeds, options)
                plans += [Plan(label, dropper, note=note) for dropper in droppers]
    return plans
