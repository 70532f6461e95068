"""Settings from JSON files: each one has a kind, which says its type and its bounds.

A config declares the kind of a field in its annotation: `hidden_size: Annotated[int, Whole(1, 2**18)] = 4096`. A setting that
is only checked stands in a table of names and kinds. Every value passes `require`, which names the setting, the value and what
is allowed. Null is a value like any other: a setting that may be null says so with `or_null`.
"""

import dataclasses
import functools
import inspect
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

Config = TypeVar("Config")
MAX_BYTES = 2**26  # the largest official index.json has less than a tenth of this


class Kind(Protocol):
    """What a setting may be; `str` of it completes the sentence "expected ..."."""

    def accepts(self, value: Any) -> bool:
        """Whether `value`, as json.loads gives it, is of this kind."""


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`. In JSON, true and 2.0 are no whole numbers."""

    low: int
    high: int

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`; NaN is outside of all bounds."""

    low: float
    high: float

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Text:
    """A text that matches a regular expression; `meaning` describes it to the reader."""

    pattern: str = r"(?s).*"
    meaning: str = "a text"

    def accepts(self, value: Any) -> bool:
        return type(value) is str and re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.meaning


class OneOf:
    """One of a few values; 1 is not true, and 0 is not false."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def accepts(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def __str__(self) -> str:
        return ("one of " if len(self.values) > 1 else "") + ", ".join(map(repr, self.values))


@dataclass(frozen=True)
class ListOf:
    """A list of `low` to `high` values of one kind."""

    item: Kind
    low: int
    high: int

    def accepts(self, value: Any) -> bool:
        return type(value) in (list, tuple) and self.low <= len(value) <= self.high and all(map(self.item.accepts, value))

    def __str__(self) -> str:
        count = str(self.low) if self.low == self.high else f"{self.low} to {self.high}"
        return f"a list of {count}, each {self.item}"


@dataclass(frozen=True)
class MapOf:
    """A JSON object whose values have one kind."""

    item: Kind

    def accepts(self, value: Any) -> bool:
        return type(value) is dict and all(map(self.item.accepts, value.values()))

    def __str__(self) -> str:
        return f"a JSON object, each value {self.item}"


class JsonObject:
    """A JSON object; the kinds of what is inside are checked later."""

    def accepts(self, value: Any) -> bool:
        return type(value) is dict

    def __str__(self) -> str:
        return "a JSON object"


class Either:
    """A value of any one of several kinds."""

    def __init__(self, *kinds: Kind) -> None:
        self.kinds = kinds

    def accepts(self, value: Any) -> bool:
        return any(kind.accepts(value) for kind in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


def or_null(kind: Kind) -> Kind:
    """The same kind, or null."""
    return Either(kind, OneOf(None))


FLAG = OneOf(False, True)
JSON_OBJECT = JsonObject()
TOKEN_ID = Whole(0, 2**24 - 1)
TOKEN_IDS = Either(TOKEN_ID, ListOf(TOKEN_ID, 1, 64))

# The types of fields. The bounds leave room for models several times as large as any that exists.
Flag = Annotated[bool, FLAG]
TokenId = Annotated[int, TOKEN_ID]
Width = Annotated[int, Whole(1, 2**18)]
Depth = Annotated[int, Whole(1, 1024)]
Heads = Annotated[int, Whole(1, 4096)]
Pixels = Annotated[int, Whole(1, 2**14)]
Epsilon = Annotated[float, Real(1e-12, 0.01)]


class Checked:
    """A config whose fields are of their kinds, whether it is read from a file or made in Python."""

    def __post_init__(self) -> None:
        kinds = kinds_of(type(self))  # type: ignore[arg-type]
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if item.name in kinds and value is not item.default:
                require(item.name, value, kinds[item.name])


@functools.cache
def kinds_of(config: type) -> dict[str, Kind]:
    """The kind of each field of a config; a field that a subclass gives another default keeps its kind."""
    hints = [hint for base in reversed(config.__mro__) for hint in inspect.get_annotations(base).items()]
    return {name: hint.__metadata__[0] for name, hint in hints if hasattr(hint, "__metadata__")}


def require(name: str, value: Any, kind: Kind) -> None:
    """Raise ValueError, with the name, the value and what is allowed, unless `value` is of this kind."""
    if not kind.accepts(value):
        raise ValueError(f"{name} = {shown(value)} is not supported; expected {kind}")


def shown(value: Any) -> str:
    """A value of any size in a few words."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxlong, brief.maxother = 2, 60, 40, 60
    return brief.repr(value)


def checked(raw: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str = "") -> dict[str, Any]:
    """Those entries of `raw` that `kinds` names, lists as tuples; raises ValueError for one of another kind.

    `prefix` stands before the names in messages: "text_config." for a section.
    """
    given = {name: raw[name] for name in kinds if name in raw}
    for name, value in given.items():
        require(prefix + name, value, kinds[name])
    return {name: as_tuples(value) for name, value in given.items()}


def as_tuples(value: Any) -> Any:
    """Lists, also those inside of lists, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def from_fields(config: type[Config], raw: Mapping[str, Any], prefix: str = "") -> Config:
    """Build a config from the entries of `raw` that it has fields for; where null is allowed, it is the default."""
    given = checked(raw, kinds_of(config), prefix)  # type: ignore[arg-type]
    with prefixed(prefix):
        return config(**{name: value for name, value in given.items() if value is not None})


@contextmanager
def prefixed(place: str) -> Iterator[None]:
    """Put where a setting stands, a section or a file, before the message of every ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a settings file.

    Raises ValueError where it holds anything else than one JSON object in UTF-8, or two entries of one name. NaN and Infinity
    are numbers here, since Python writes them; no kind accepts them.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; a settings file has at most {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique_names)
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: its lists or objects are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; raises ValueError for two entries of one name, because one of the two values would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"one object has {count} entries named {shown(name)}; keep one of them")
    return content


def require_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError with both numbers unless `value` is a positive multiple of `divisor`."""
    if divisor <= 0 or value <= 0 or value % divisor:
        raise ValueError(f"{name} {value} must be a positive multiple of {divisor_name} {divisor}")


def set_once(config: object, name: str, value: object) -> None:
    """Fill a field of a frozen dataclass that was left empty."""
    if not getattr(config, name):
        object.__setattr__(config, name, value)
