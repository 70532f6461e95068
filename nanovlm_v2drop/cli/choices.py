"""The names that options take, read from the source files without importing torch.

A name stands once, where its owner defines it: a method's in its file, a back end's in models/attention.py. Importing these
modules takes two seconds, because they import torch. Parsing their source takes a few milliseconds.
"""

import ast
from functools import cache
from pathlib import Path

from ..evaluation.method_names import DENSE
from ..loading.specs import AUTO, DTYPE_NAMES, MODELS, OWN_TEMPLATE

PACKAGE = Path(__file__).parents[1]


@cache
def class_names(room: str) -> tuple[str, ...]:
    """The value of `name = "..."` in every class of a room's files, file by file."""
    return tuple(name for file in sorted((PACKAGE / room).glob("*.py")) for name in names_of_classes(parsed(file)))


def names_of_classes(module: ast.Module) -> list[str]:
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    return [
        statement.value.value
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id == "name"
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


@cache
def listed_in(file: str, variable: str) -> tuple[str, ...]:
    """The strings in the tuple, or the keys of the dictionary, that a module assigns to `variable`.

    Raises ValueError for a module that does not assign one.
    """
    for node in parsed(PACKAGE / file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            return strings(node.value)  # type: ignore[attr-defined]
    raise ValueError(f"{file} assigns no {variable}")


def strings(value: ast.expr) -> tuple[str, ...]:
    items = value.keys if isinstance(value, ast.Dict) else value.elts if isinstance(value, ast.Tuple) else []
    return tuple(item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str))


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def methods() -> tuple[str, ...]:
    return (DENSE, *class_names("dropping"))


def tasks() -> tuple[str, ...]:
    return class_names("tasks")


def ablations() -> tuple[str, ...]:
    return listed_in("research/ablations.py", "ABLATIONS")


def text_methods() -> tuple[str, ...]:
    return listed_in("research/text.py", "TEXT_METHODS")


def texts() -> tuple[str, ...]:
    return listed_in("research/text_questions.py", "TEXTS")


def histories() -> tuple[str, ...]:
    return listed_in("inference/conversation.py", "HISTORIES")


def attention_backends() -> tuple[str, ...]:
    return ("auto", *listed_in("models/attention.py", "BACKENDS"))


def kv_cache_dtypes() -> tuple[str, ...]:
    return listed_in("models/kv_cache.py", "KV_CACHE_DTYPES")


def templates() -> tuple[str, ...]:
    return (*listed_in("processing/prompts.py", "TEMPLATES"), OWN_TEMPLATE)


def samplings() -> tuple[str, ...]:
    return listed_in("processing/video.py", "SAMPLINGS")


def picture_suffixes() -> tuple[str, ...]:
    """The ends of the names of picture files."""
    return listed_in("processing/prompts.py", "PICTURE_SUFFIXES")


def aspect_ratios() -> tuple[str, ...]:
    return listed_in("processing/images.py", "ASPECT_RATIOS")


def dtypes() -> tuple[str, ...]:
    return (AUTO, *DTYPE_NAMES)


def models() -> tuple[str, ...]:
    return tuple(MODELS)
