"""The chat template in a checkpoint's folder: a program of a stranger, run in a sandbox with bounded time and output.

The options are those of transformers (utils/chat_template_utils.py), so that the prompt is the same as that of its
`apply_chat_template`.
"""

import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..models.config import read_json_object
from .prompts import Content, Earlier, Medium, Template
from .tokenizer import SPECIAL_TOKENS, tokenizer_settings

MAX_SOURCE, MAX_OUTPUT = 100_000, 1_000_000  # characters
MAX_STEPS = 100_000  # of all loops and macros together
MAX_SECONDS = 5.0
MAX_NUMBER = 10_000  # that a template may pass to a function or repeat a text with
MAX_PRODUCT = 10**9  # of the lengths of what a function gets: `replace` puts a text for each character of another
FORMAT_WIDTH = re.compile(r"\d{4}")  # "%9999d" and "{:9999}" make long texts of short ones


class TemplateBudgetError(jinja2.TemplateError):
    """A chat template runs too long or writes too much."""


class Budget:
    """What one rendering of a template has used up."""

    def __init__(self) -> None:
        self.steps, self.characters, self.end = 0, 0, time.monotonic() + MAX_SECONDS

    def step(self) -> str:
        """Count one turn of a loop or macro."""
        self.steps += 1
        if self.steps > MAX_STEPS or time.monotonic() > self.end:
            raise TemplateBudgetError(f"it takes more than {MAX_STEPS} steps or {MAX_SECONDS:g} s")
        return ""

    def write(self, value: Any) -> Any:
        """Count what an expression writes."""
        self.characters += length_of(value)
        if self.characters > MAX_OUTPUT:
            raise TemplateBudgetError(f"it writes more than {MAX_OUTPUT} characters")
        self.step()
        return value


class GenerationTag(Extension):
    """`{% generation %}` marks the model's own words for training; here they are only written."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's way)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("written"), [], [], body).set_lineno(line)

    def written(self, caller: Callable[[], str]) -> str:
        return caller()


class Steps(Extension):
    """Counts the turns of loops and macros, and the length of joined texts, by calls that a template cannot name."""

    def count(self, tree: nodes.Template) -> nodes.Template:
        kinds: tuple[type[Any], ...] = (nodes.For, nodes.Macro, nodes.CallBlock)
        for kind in kinds:
            for block in list(tree.find_all(kind)):
                block.body.insert(0, nodes.ExprStmt(self.call_method("step")).set_lineno(block.lineno))
        for concat in list(tree.find_all(nodes.Concat)):
            concat.nodes = [self.call_method("joined", [nodes.List(concat.nodes)])]
        return tree

    def step(self) -> str:
        return self.environment.budget.step()  # type: ignore[attr-defined]

    def joined(self, parts: Sequence[Any]) -> str:
        return checked("".join(map(str, checked(parts))))


class NamespaceWithoutUnderscores(Namespace):
    """Jinja's namespace, whose attributes must not be Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not set {name!r}, which starts with an underscore")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' options, where no operation makes a text or number out of proportion."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        extensions = [GenerationTag, Steps, loopcontrols]
        self.budget = Budget()
        options = {"trim_blocks": True, "lstrip_blocks": True, "finalize": lambda value: self.budget.write(value)}
        super().__init__(extensions=extensions, **options)
        self.filters = {name: bounded(function) for name, function in self.filters.items()} | {"tojson": to_json}
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        self.globals |= {"dict": lambda *args, **kwargs: dict(*args, **kwargs), "namespace": NamespaceWithoutUnderscores}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_arguments([left, right] if operator in ("*", "**") else [])  # a text of 10,000 characters 10,000 times is 100 MB
        if operator == "**" and abs(right) > 100:
            raise TemplateBudgetError(f"it raises a number to the power {right}")
        if operator == "%" and isinstance(left, str):
            check_format(left)
        return checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # jinja wraps the method `format`
        if getattr(function, "__name__", "") in ("format", "format_map"):
            check_format(owner)
        check_arguments([owner if isinstance(owner, str) else "", *args, *kwargs.values()])
        return checked(super().call(context, function, *args, **kwargs))

    def compiled(self, source: str) -> jinja2.Template:
        steps = self.extensions[f"{Steps.__module__}.{Steps.__name__}"]
        return self.from_string(steps.count(self.parse(source)))  # type: ignore[attr-defined]


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no large number and gives no long text."""

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        check_arguments([*args, *kwargs.values()])
        if function.__name__ == "do_format":
            check_format(args[0])
        return checked(function(*args, **kwargs))

    return filtered


def check_arguments(values: Sequence[Any]) -> None:
    """Raise TemplateBudgetError for a number or for texts of which a function could make a very long one."""
    if large := [value for value in values if isinstance(value, int | float) and abs(value) > MAX_NUMBER]:
        raise TemplateBudgetError(f"it computes with {large[0]:.3g}; numbers up to {MAX_NUMBER} are allowed")
    if math.prod(max(length_of(value), 1) for value in values) > MAX_PRODUCT:
        raise TemplateBudgetError("it computes with too long texts")


def check_format(text: Any) -> None:
    if FORMAT_WIDTH.search(str(text)):
        raise TemplateBudgetError(f"it formats with {str(text)[:40]!r}, whose width has more than three digits")


def checked(value: Any) -> Any:
    if length_of(value) > MAX_OUTPUT:
        raise TemplateBudgetError(f"it makes a value of more than {MAX_OUTPUT} characters")
    return value


def length_of(value: Any) -> int:
    """About how many characters a value has when it is written; counting ends above MAX_OUTPUT."""
    waiting, length = [value], 0
    while waiting and length <= MAX_OUTPUT:
        item = waiting.pop()
        length += len(item) if isinstance(item, str) else 1
        if isinstance(item, list | tuple | dict):
            waiting += [*item, *item.values()] if isinstance(item, dict) else item
    return length


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers': Jinja's own filter would escape HTML."""
    check_arguments([checked(value), indent or 0])
    return checked(json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A folder's own conversation.

    Args:
        file: where the template was read; `name` says it to the user.
        source: the Jinja template.
        special_tokens: what the template may write by name, such as bos_token.
        spelling: how a picture and a video are written in a text of this family.

    Raises:
        ValueError: the template is too long or is no valid Jinja.
    """

    def __init__(self, file: Path, source: str, special_tokens: Mapping[str, str], spelling: Template) -> None:
        self.file, self.special_tokens, self.spelling = file, dict(special_tokens), spelling
        self.sandbox = Sandbox()
        if len(source) > MAX_SOURCE:
            raise ValueError(f"{file}: the chat template has {len(source)} characters; {MAX_SOURCE} are allowed")
        try:
            self.compiled = self.sandbox.compiled(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"{file}: the chat template cannot be read: {error}; give --template NAME") from error

    @property
    def name(self) -> str:
        return self.file.name

    def write(self, leading: Content, question: Content, vision_tokens: Collection[str], earlier: Earlier = ()) -> str:
        """The prompt; raises ValueError where the template fails, or loses a question, an answer or a picture.

        Most templates take the pieces of a message one by one. Some of them move pictures to the front; they get a placed
        picture as a token in the text. Those of plain language models take no pieces at all, but a text.
        """
        said = [part for turn in earlier for part in (*turn.leading, *turn.question, turn.answer)]
        parts, errors = [*said, *leading, *question], []
        for form in range(len(self.contents([], []))):
            try:
                prompt = self.render(self.messages(leading, question, earlier, form))
            except TemplateBudgetError as error:
                raise ValueError(f"{self.file}: the chat template is stopped: {error}; give --template NAME") from error
            except Exception as error:  # a template may raise any
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if holds_all(prompt, parts, vision_tokens):
                return prompt
            errors.append("its prompt does not hold the question with every picture and video in order")
        what = "continue this conversation" if earlier else "ask this question"
        raise ValueError(f"{self.file}: the chat template cannot {what}: {errors[0]}; give --template NAME")

    def messages(self, leading: Content, question: Content, earlier: Earlier, form: int) -> list[dict[str, Any]]:
        """All turns, with their contents in one of the forms of `contents`."""
        messages = []
        for turn in earlier:
            messages.append({"role": "user", "content": self.contents(turn.leading, turn.question)[form]})
            messages.append({"role": "assistant", "content": self.contents([], [turn.answer])[form]})
        return [*messages, {"role": "user", "content": self.contents(leading, question)[form]}]

    def contents(self, leading: Content, question: Content) -> tuple[list[dict[str, str]], list[dict[str, str]], str]:
        """The content of a message in three forms: its pieces, one piece of text with tokens in it, and that text."""
        before = "".join(self.spelling.spell(medium) + self.spelling.separator for medium in leading)
        text = before + "".join(map(self.spelling.spell, question))
        return [part_of(part) for part in (*leading, *question)], [part_of(text)], text

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        self.sandbox.budget = Budget()
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        return self.compiled.render(**{**self.special_tokens, **values})


def part_of(part: str | Medium) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image" if part is Medium.IMAGE else "video"}


def holds_all(prompt: str, parts: Content, vision_tokens: Collection[str]) -> bool:
    """Whether the pieces stand in the prompt in order, with as many vision tokens as there are pictures and videos."""
    tokens, position = list(vision_tokens), 0
    for part in parts:
        sought = part.strip() if isinstance(part, str) else tokens[min(list(Medium).index(part), len(tokens) - 1)]
        found = prompt.find(sought, position)
        if found < 0 or str(part_of(part)) in prompt:  # the second: a template for texts has written Python's list
            return False
        position = found + len(sought)
    written = sum(part.count(token) for part in parts if isinstance(part, str) for token in tokens)
    media = sum(isinstance(part, Medium) for part in parts)
    return sum(prompt.count(token) for token in tokens) == media + written


def read_chat_template(folder: Path, spelling: Template) -> ChatTemplate | None:
    """The folder's template, where it has one: chat_template.jinja, chat_template.json or in tokenizer_config.json.

    Raises ValueError for a file that is not UTF-8 or holds no template.
    """
    raw = folder / "chat_template.jinja"
    settings = tokenizer_settings(folder)
    special = {name: token for name, token in settings.items() if name in SPECIAL_TOKENS and token is not None}
    if raw.is_file():
        try:
            return ChatTemplate(raw, raw.read_text(encoding="utf-8"), special, spelling)
        except UnicodeDecodeError as error:
            raise ValueError(f"{raw} is not UTF-8: {error}") from error
    for file in (folder / "chat_template.json", folder / "processor_config.json", folder / "tokenizer_config.json"):
        source = read_json_object(file).get("chat_template") if file.is_file() else None
        if source is not None:
            return ChatTemplate(file, default_template(file, source), special, spelling)
    return None


def default_template(file: Path, source: Any) -> str:
    """The template that a settings file names, of several the one named "default"."""
    if isinstance(source, list):
        with suppress(TypeError, KeyError):
            source = {entry["name"]: entry["template"] for entry in source}
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ValueError(f"{file}: chat_template must be a text, or templates by name with one named 'default'")
    return source
