"""Dropping methods, one file each. A new method is one new file with a TokenDropper in it: it is found by its `name`."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable

from .base import NotANumber, PrefillState, TokenDropper
from .chain import Chain, ChainSchedule
from .random import Random
from .schedule import BatchSchedule, CountSchedule, DropSchedule
from .v2drop import PUBLISHED_SCHEDULES, V2Drop


def find_droppers() -> dict[str, type[TokenDropper]]:
    """Every TokenDropper with a name in the files of this folder."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = [item for module in modules for item in vars(module).values() if inspect.isclass(item)]
    return by_name([item for item in classes if issubclass(item, TokenDropper) and hasattr(item, "name")])


def by_name(classes: Iterable[type[TokenDropper]]) -> dict[str, type[TokenDropper]]:
    """The classes by their names. Raises ValueError for two with one name, such as a subclass that inherits its name."""
    found: dict[str, type[TokenDropper]] = {}
    for item in classes:
        if (other := found.setdefault(item.name, item)) is not item:
            both = f"{other.__module__}.{other.__name__} and {item.__module__}.{item.__name__}"
            raise ValueError(f"{both} are both called {item.name!r}: give each a name of its own")
    return found


DROPPERS = find_droppers()

__all__ = [
    "DROPPERS",
    "PUBLISHED_SCHEDULES",
    "BatchSchedule",
    "Chain",
    "ChainSchedule",
    "CountSchedule",
    "DropSchedule",
    "NotANumber",
    "PrefillState",
    "Random",
    "TokenDropper",
    "V2Drop",
]
