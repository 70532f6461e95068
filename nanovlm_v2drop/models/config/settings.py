"""Reading the JSON settings of a checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a settings file; raises ValueError where it holds anything else than one JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def from_fields(config: type[Config], raw: dict[str, Any]) -> Config:
    """Build a dataclass from the entries of `raw` that it has fields for; lists become tuples, null is a default."""
    names = {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {name: value for name, value in raw.items() if name in names and value is not None}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def require_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError with both numbers unless `value` is a positive multiple of `divisor`."""
    if divisor <= 0 or value <= 0 or value % divisor:
        raise ValueError(f"{name} {value} must be a positive multiple of {divisor_name} {divisor}")


def set_once(config: object, name: str, value: object) -> None:
    """Fill a field of a frozen dataclass that was left empty, or null in config.json."""
    if not getattr(config, name):
        object.__setattr__(config, name, value)
