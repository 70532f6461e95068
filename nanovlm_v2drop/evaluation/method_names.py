"""How methods are written on the command line, read without torch.

    v2drop                          a method
    v2drop:metric=cosine            with an option
    my.py:Mine:power=2              a class of a file
    divprune+v2drop:share=0.5       a chain: the first method makes half of the reduction
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DENSE, ALL = "dense", "all"
SHARE = "share"
NAMED = re.compile(r"[^:=]+\.py:[^:=]+|[^:=]+")  # FILE.py:CLASS or NAME, before the first option
FORM = "NAME:OPTION=VALUE, FILE.py:CLASS:OPTION=VALUE, or two of them with + between"


@dataclass(frozen=True)
class MethodText:
    """One method of a chain: its name (FILE.py:CLASS for a user's own), and its options."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ChainText:
    """What stands for one row of a table: one method, or several with the shares of the reduction that they make."""

    methods: tuple[MethodText, ...]
    shares: tuple[float, ...] | None = None


def parse_methods(text: str) -> ChainText:
    """Raises ValueError, in one line, for text of another form, an option given twice, or a share outside a chain."""
    parts = [parse_method(part, text) for part in text.split("+")]
    shares = [part.options[SHARE] for part in parts if SHARE in part.options]
    if len(shares) > (len(parts) > 1):
        reason = "is for a chain, such as divprune+v2drop:share=0.5" if len(parts) == 1 else "stands twice"
        raise ValueError(f"method {text!r}: {SHARE} {reason}")
    methods = tuple(MethodText(part.name, {key: part.options[key] for key in part.options if key != SHARE}) for part in parts)
    return ChainText(methods, shares_of(shares[0], text) if shares else None)


def parse_method(part: str, text: str) -> MethodText:
    found = NAMED.match(part)
    if found is None or part[found.end() :][:1] not in ("", ":"):
        raise ValueError(f"method {text!r}: {part!r} is no method; write {FORM}")
    options: dict[str, Any] = {}
    for option in part[found.end() + 1 :].split(":") if found.end() < len(part) else []:
        name, is_set, value = option.partition("=")
        if not is_set or not name.isidentifier() or not value:
            raise ValueError(f"method {text!r}: {option!r} is no option; write {FORM}")
        if name in options:
            raise ValueError(f"method {text!r}: the option {name} stands twice")
        options[name] = value_of(value)
    return MethodText(found[0], options)


def parse_number(text: str) -> float:
    """A number such as 0.333, or a fraction such as 1/3; raises ValueError for anything else."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is no number") from None


def value_of(text: str) -> Any:
    """A number, True, False or None, as Python writes them or in lower case; any other text as it is."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (int, float, bool, type(None))) else text


def shares_of(value: Any, text: str) -> tuple[float, ...]:
    """One number, or several with / between."""
    numbers = [value_of(number) for number in value.split("/")] if isinstance(value, str) else [value]
    if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"method {text!r}: {SHARE} must be a number from 0 to 1, or several such as 0.4/0.3, not {value}")
    return tuple(map(float, numbers))
