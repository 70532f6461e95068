"""`--model_args`: the model, and the method that answers with its budget."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...dropping import TokenDropper
from ...dropping.budget import Budget
from ...loading.specs import AUTO, MODELS
from ...loading.zoo import VisionLanguageModel
from ...models.parallel import join_processes
from ..loading import load_model
from ..method_names import parse_number
from ..methods import DENSE, find_methods
from ..plans import Plan, makers, mapped

ONE_METHOD = "a run of lmms-eval answers with one method"


@dataclass(frozen=True)
class ModelArguments:
    """The names that `--model_args` takes, and `--batch_size` and `--device` of lmms-eval.

    Args:
        pretrained: a name of MODELS, an id on the Hugging Face Hub, or a folder; as --model of the command line.
        method: one method, written as for --methods of the command line; "dense" drops nothing.
        tokens: the budget: mean vision tokens a layer. A prompt that has fewer keeps all of them.
        retain: the budget as a share of each prompt's vision tokens, such as 0.333 or 1/3.
        setting: the name of one of the method's published settings, in place of a budget.
        seed: of methods that draw at random, and of sampled answers.
        batch_size: the most prompts that go through one packed prefill.

    The others are those of the command line.
    """

    pretrained: str
    method: str = DENSE
    tokens: float | None = None
    retain: float | None = None
    setting: str | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = AUTO
    attention: str = "auto"
    kv_cache_dtype: str = "auto"
    compile: bool = False
    weights: str | None = None
    image_aspect_ratio: str | None = None
    template: str | None = None
    max_pixels: int | None = None
    sampling: str | None = None
    frames: int | None = None
    batch_size: int = 1

    def load(self) -> VisionLanguageModel:
        """The model, on this process's device where torchrun started several; raises as `loading.zoo.load`."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = device.partition(":")[0]
        processes = join_processes(kind)
        device = device if processes.world_size == 1 else processes.device(kind)
        weights = None if self.weights is None else Path(self.weights).expanduser()
        given = {**vars(self), "model": self.pretrained, "device": device, "weights": weights, "tensor_parallel": 1}
        return load_model(argparse.Namespace(**given))

    def plan(self) -> Plan:
        """What answers every request. Raises ValueError for an unknown method, and for a method without a budget."""
        methods = find_methods([self.method])
        if len(methods) > 1:
            raise ValueError(f"method={self.method} stands for {len(methods)} methods; {ONE_METHOD}")
        if (method := methods[0]) is not None:
            return self.plan_of(method)
        if given := [name for name in ("tokens", "retain", "setting") if getattr(self, name) is not None]:
            raise ValueError(f"{given[0]} has no meaning without a method that drops; add one, such as method=v2drop")
        return Plan(DENSE)

    def plan_of(self, method: type[TokenDropper]) -> Plan:
        """The method with the one of tokens, retain and setting that is given."""
        if [self.tokens, self.retain, self.setting].count(None) != 2:
            settings = f", or setting= with one of {', '.join(method.published)}" if method.published else ""
            raise ValueError(f"method={self.method} needs one budget: retain=1/3 or tokens=192{settings}")
        if self.setting is None:
            budget = Budget(self.tokens, self.retain)
            (make,) = makers(method, [self.seed])
            return Plan(method.name, make, partial(budget.schedule, method), budget=budget)
        if self.setting not in method.published:
            known = ", ".join(method.published) or "none"
            raise ValueError(f"{method.name} has no published setting {self.setting!r}; it has: {known}")
        schedule, options, num_layers = method.published[self.setting]
        (make,) = makers(method, [self.seed], options)
        return Plan(f"{method.name} {self.setting}", make, partial(mapped, schedule, num_layers))


def parse_model_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """The arguments as lmms-eval passes them: numbers and true or false are read already, everything else is text.

    Raises ValueError, in one line, for an unknown name and for a value that the name does not take.
    """
    known = [each.name for each in fields(ModelArguments)]
    if unknown := [name for name in given if name not in known]:
        ways = ", ".join(name for name in known if name not in ("device", "batch_size"))
        raise ValueError(f"unknown model_args {', '.join(map(repr, unknown))}; choose from: {ways}")
    if "pretrained" not in given:
        raise ValueError(f"model_args names no model: add pretrained=NAME, one of {', '.join(MODELS)}, a Hub id, or a folder")
    readers = {each.name: READERS[each.type] for each in fields(ModelArguments)}
    values: dict[str, Any] = {name: readers[name](name, value) for name, value in given.items()}
    return ModelArguments(**values)


def read_text(name: str, value: Any) -> str:
    text = str(value)
    if not text.strip():
        raise ValueError(f"{name}= is empty; give it a value or leave it out")
    return text


def read_number(name: str, value: Any) -> float:
    try:
        return parse_number(str(value))
    except ValueError as error:
        raise ValueError(f"{name}={value}: {error}") from error


def read_count(name: str, value: Any) -> int:
    """A whole number; `--batch_size` comes as text."""
    if isinstance(value, bool) or not str(value).isdecimal() or (name != "seed" and int(value) < 1):
        smallest = 0 if name == "seed" else 1
        raise ValueError(f"{name}={value} must be a whole number of at least {smallest}")
    return int(value)


def read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value} must be true or false")
    return value


READERS: dict[Any, Callable[[str, Any], Any]] = {  # by the type of an argument
    **{str: read_text, str | None: read_text, float | None: read_number, bool: read_flag},
    **{int: read_count, int | None: read_count},
}
