"""Methods by their names, and errors of users' own methods in one line that names file and line."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..dropping import DROPPERS, Chain, DropSchedule, NotANumber, TokenDropper, by_name
from ..dropping.contract import is_own
from ..dropping.schedule import OutOfReach
from .method_names import ALL, DENSE, parse_methods


class MethodFailed(ValueError):
    """A user's method raised an error or kept wrong rows; the message names its file and line."""


def find_methods(names: Sequence[str]) -> list[type[TokenDropper] | None]:
    """The classes that the names stand for, None for dense; "all" is dense and every entry of DROPPERS.

    "path/to/file.py:Class" is a user's own; options and chains are written as in `method_names`. Raises ValueError for any
    other name, and for two methods that would share a row.
    """
    expanded = [name for given in names for name in ([DENSE, *DROPPERS] if given == ALL else [given])]
    methods = [None if name == DENSE else find_method(name) for name in dict.fromkeys(expanded)]
    by_name(method for method in methods if method is not None)
    return methods


def find_method(name: str) -> type[TokenDropper]:
    """The class that a text of `method_names` stands for."""
    written = parse_methods(name)
    methods = [with_options(named_method(part.name), part.options) for part in written.methods]
    return methods[0] if len(methods) == 1 else Chain.of(methods, written.shares)


def with_options(method: type[TokenDropper], options: Mapping[str, Any]) -> type[TokenDropper]:
    """The method with these options; raises ValueError for an option that it does not have or a value that it refuses."""
    if not options:
        return method
    if method.seeded and "seed" in options:
        raise ValueError(f"{method.name}: give the seed as --seed, and how many as --seeds")
    configured = method.configured(**options)
    try:
        configured(DropSchedule({}))
    except TypeError as error:
        raise ValueError(f"{configured.name} cannot be made: {error}") from error
    return configured


def named_method(name: str) -> type[TokenDropper]:
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
    """A user's file as a module; raises ValueError with the file and the line where it is missing or does not run."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--methods: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file does
        reason = str(error) if isinstance(error, SyntaxError | ImportError) else described(error)
        place = innermost_line(error, {str(path.resolve())}) or path
        raise ValueError(f"--methods: {place} cannot be read: {reason}") from error
    return module


@contextmanager
def naming_errors(method: type[TokenDropper] | None) -> Iterator[None]:
    """In here, whatever a user's method raises is a MethodFailed; methods of this package raise what they raise."""
    try:
        yield
    except (NotANumber, OutOfReach):
        raise
    except (Exception, SystemExit) as error:
        if method is None or all(map(is_own, (method, *parts_of(method)))):
            raise
        raise MethodFailed(f"{place_in(error, method)}: {described(error)}") from error


def place_in(error: BaseException, method: type[TokenDropper]) -> str:
    """File and line of a user's classes at which an error came up, or else those of the method's class."""
    own = [item for part in (method, *parts_of(method)) for item in part.__mro__ if issubclass(item, TokenDropper)]
    classes = [item for item in own if not is_own(item)]
    files = {str(path) for path in map(source_of, classes) if path is not None}
    found = innermost_line(error, files)
    if found is not None:
        return found
    method = next((part for part in parts_of(method) if not is_own(part)), method)
    file = source_of(method)
    return method.__name__ if file is None else f"{file}:{inspect.getsourcelines(method)[1]}"


def innermost_line(error: BaseException, files: Collection[str]) -> str | None:
    """FILE:LINE of the innermost frame of an error in these files; None where no frame is in them."""
    frames = [(str(Path(frame.filename).resolve()), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    lines = [f"{file}:{line}" for file, line in frames if file in files]
    return lines[-1] if lines else None


def described(error: BaseException) -> str:
    reason = str(error).strip().partition("\n")[0]
    return type(error).__name__ + (f": {reason}" if reason else "")


def source_of(item: type) -> Path | None:
    """The file of a class; None where it has none, as in a notebook's cell that is gone."""
    try:
        found = inspect.getsourcefile(item)
    except (TypeError, OSError):
        return None
    return None if found is None else Path(found).resolve()


def sources_of(method: type[TokenDropper]) -> list[Path]:
    """The files of a method and of the classes that it is made of."""
    found = [source_of(item) for part in (method, *parts_of(method)) for item in part.__mro__ if item is not object]
    return list(dict.fromkeys(path for path in found if path is not None and path.is_file()))


def parts_of(method: type[TokenDropper]) -> tuple[type[TokenDropper], ...]:
    """The methods of a chain; none for a single method."""
    return method.methods if issubclass(method, Chain) else ()
