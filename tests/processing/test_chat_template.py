"""The chat template of a folder: the prompt of transformers, and bounds that no template leaves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nanovlm_v2drop.processing.chat_template import ChatTemplate, read_chat_template
from nanovlm_v2drop.processing.prompts import TEMPLATES, Exchange, Medium, Request, build_prompt

LLAVA, QWEN2_VL = ("<image>", "<video>"), ("<|image_pad|>", "<|video_pad|>")
# Templates in the forms that are in circulation, written anew: media first, pieces in order, and text only.
MEDIA_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ part['text'] + ' ' }}"
    "{% else %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}\n{% for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\n"
    "    {%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}\n"
    "    {%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}\n"
    "    {{- '<|eot_id|>' }}\n{% endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
IN_ORDER = (
    "{% set state = namespace(images=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set state.images = state.images + 1 %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' [/INST]' }}{% else %}{{ raise_exception('Only users may ask') }}{% endif %}{% endfor %}"
)
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES_WITH_PARTS = {
    "media first": (MEDIA_FIRST, LLAVA),
    "llama 3": (LLAMA3, LLAVA),
    "mistral": (MISTRAL, LLAVA),
    "in order": (IN_ORDER, QWEN2_VL),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def picture() -> Image.Image:
    return Image.new("RGB", (2, 2))


def chat_template(source: str, spelling: str = "hub", file: str = "chat_template.jinja") -> ChatTemplate:
    return ChatTemplate(Path(file), source, SPECIAL, TEMPLATES[spelling])


def prompt_of(source: str, request: Request, tokens: tuple[str, ...] = LLAVA) -> str:
    return build_prompt(request, chat_template(source, "qwen2_vl" if tokens == QWEN2_VL else "hub"), tokens)


def transformers_prompt(source: str, content: Any) -> str:
    return rendered_by_transformers(source, [{"role": "user", "content": content}])


def rendered_by_transformers(source: str, messages: list[dict[str, Any]]) -> str:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered = utilities.render_jinja_template([messages], chat_template=source, add_generation_prompt=True, **SPECIAL)
    return (rendered[0] if isinstance(rendered, tuple) else rendered)[0]


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("text", ["What is this?", " two  spaces ", "línea\nnueva {{ braces }} <b>&amp;"])
@pytest.mark.parametrize("name", TEMPLATES_WITH_PARTS)
def test_the_prompt_is_that_of_transformers(name: str, text: str, number: int) -> None:
    source, tokens = TEMPLATES_WITH_PARTS[name]
    content = [{"type": "image"}] * number + [{"type": "text", "text": text}]
    ours = prompt_of(source, Request(text=text, images=[picture()] * number), tokens)
    assert ours == transformers_prompt(source, content)


def test_a_template_for_plain_language_models_gets_the_question_as_one_text() -> None:
    ours = prompt_of(TEXT_ONLY, Request(text="What?", images=[picture()]))
    assert ours == transformers_prompt(TEXT_ONLY, "<image>\nWhat?")
    assert prompt_of(TEXT_ONLY, Request(text="What?")) == transformers_prompt(TEXT_ONLY, "What?")


def test_a_placed_picture_stays_in_its_place_where_the_template_would_move_it_to_the_front() -> None:
    request = Request(text="Is <image> in <image>?", images=[picture(), picture()])
    assert prompt_of(MEDIA_FIRST, request) == "USER: Is <image> in <image>? ASSISTANT:"
    content = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " in "}, {"type": "image"}]
    ours = prompt_of(IN_ORDER, request, QWEN2_VL)
    assert ours == transformers_prompt(IN_ORDER, [*content, {"type": "text", "text": "?"}])


def test_two_videos_are_two_parts() -> None:
    ours = prompt_of(IN_ORDER, Request(text="Which?", video=["a.mp4", "b.mp4"]), QWEN2_VL)
    assert ours == transformers_prompt(IN_ORDER, [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "Which?"}])


@pytest.mark.parametrize("name", ["media first", "llama 3", "in order"])
def test_later_turns_are_those_of_transformers(name: str) -> None:
    source, tokens = TEMPLATES_WITH_PARTS[name]
    said = [("user", "A cat?"), ("assistant", "yes"), ("user", "Two?"), ("assistant", "no"), ("user", "Old?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    for message in messages[:3:2]:
        message["content"].insert(0, {"type": "image"})
    earlier = [Exchange([Medium.IMAGE], ["A cat?"], "yes"), Exchange([Medium.IMAGE], ["Two?"], "no")]
    template = chat_template(source, "qwen2_vl" if tokens == QWEN2_VL else "hub")
    assert build_prompt(Request(text="Old?"), template, tokens, earlier) == rendered_by_transformers(source, messages)


def test_later_turns_of_a_template_for_plain_language_models_are_texts() -> None:
    earlier = [Exchange([Medium.IMAGE], ["A cat?"], "yes")]
    said = [("user", "<image>\nA cat?"), ("assistant", "yes"), ("user", "Old?")]
    wanted = rendered_by_transformers(TEXT_ONLY, [{"role": role, "content": text} for role, text in said])
    assert build_prompt(Request(text="Old?"), chat_template(TEXT_ONLY), LLAVA, earlier) == wanted


@pytest.mark.parametrize("name", ["hub", "qwen_1_5", "qwen2_vl"])
def test_the_papers_later_turns_are_those_of_the_hubs_template(name: str) -> None:
    source, tokens = (MEDIA_FIRST, LLAVA) if name == "hub" else (IN_ORDER, QWEN2_VL)
    earlier = [Exchange([Medium.IMAGE] if name != "qwen_1_5" else [], ["A cat?"], "yes")]
    hub = build_prompt(Request(text="Old?"), chat_template(source, name), tokens, earlier)
    assert build_prompt(Request(text="Old?"), name, tokens, earlier) == hub


@pytest.mark.parametrize(
    ("source", "reason"), [(MISTRAL, "Only users may ask"), ("{{ messages[-1].content[0].text }}<image>", "does not hold")]
)
def test_a_template_that_refuses_or_loses_earlier_turns_cannot_continue_a_conversation(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template cannot continue this conversation: .*{reason}.*--template NAME"):
        build_prompt(Request(text="Old?"), chat_template(source), LLAVA, [Exchange([Medium.IMAGE], ["A cat?"], "yes")])


def test_transformers_options_and_functions_work_the_same() -> None:
    source = (
        "{% for i in range(6) %}\n  {% if i == 3 %}\n    {% break %}\n  {% endif %}\n  {{ i }}\n{% endfor %}\n"
        "{{ {'b': '<é>', 'a': [1, none]} | tojson }}{{ dict(x=1) | tojson(indent=2) }}"
        "{% set state = namespace(n=1) %}{% set state.n = state.n + 2 %}{{ state.n }}{{ strftime_now('%Y') | length }}"
        "{% macro shout(t) %}{{ t | upper }}!{% endmacro %}{{ shout('hi') ~ '-' ~ 3 }}{{ tools is none }}"
        "{{ messages[0].content[0].text }}{{ '%s-%02d' % ('a', 7) }}{{ messages[0].content | length * 2 }}"
    )
    assert prompt_of(source, Request(text="What?")) == transformers_prompt(source, [{"type": "text", "text": "What?"}])


# Files


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


NAMED = [{"name": "rag", "template": "-"}, {"name": "default", "template": "E"}]
SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "jinja": ({"chat_template.jinja": "A{{ bos_token }}"}, "A<s>"),
    "json": ({"chat_template.json": {"chat_template": "B"}}, "B"),
    "processor": ({"processor_config.json": {"chat_template": "C"}}, "C"),
    "tokenizer": ({"tokenizer_config.json": {"chat_template": "D"}}, "D"),
    "named": ({"tokenizer_config.json": {"chat_template": NAMED}}, "E"),
    "by name": ({"chat_template.json": {"chat_template": {"default": "F", "rag": "-"}}}, "F"),
    "jinja before json": ({"chat_template.jinja": "G", "chat_template.json": {"chat_template": "-"}}, "G"),
    "json before tokenizer": (
        {"chat_template.json": {"chat_template": "H"}, "tokenizer_config.json": {"chat_template": "-"}},
        "H",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_template_is_found_in_every_place_that_transformers_knows(case: str, tmp_path: Path) -> None:
    files, expected = SOURCES[case]
    names = {"bos_token": "<s>"}
    files = {**files, "tokenizer_config.json": {**names, **files.get("tokenizer_config.json", {})}}
    found = read_chat_template(write(tmp_path, files), TEMPLATES["hub"])
    assert found is not None
    assert found.render([]) == expected
    assert found.name == next(name for name, content in files.items() if expected[0] in str(content))


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path, TEMPLATES["hub"]) is None
    assert read_chat_template(write(tmp_path, {"tokenizer_config.json": {"chat_template": None}}), TEMPLATES["hub"]) is None


BAD_FILES: dict[str, tuple[str, Any, str]] = {
    "number": ("chat_template.json", {"chat_template": 5}, "chat_template must be a text, or templates by name"),
    "list of numbers": ("tokenizer_config.json", {"chat_template": [1, 2]}, "chat_template must be a text"),
    "without default": ("chat_template.json", {"chat_template": {"rag": "x"}}, "templates by name with one named 'default'"),
    "no object": ("chat_template.json", ["x"], "must hold a JSON object"),
    "unfinished": ("chat_template.jinja", "{% for message in messages %}", "the chat template cannot be read: .*--template"),
    "unknown tag": ("chat_template.jinja", "{% include_all %}", "the chat template cannot be read: .*--template NAME"),
    "unknown filter": ("chat_template.jinja", "{{ messages | frobnicate }}", "the chat template cannot be read: .*frobnicate"),
    "too long": ("chat_template.jinja", "x" * 100_001, "has 100001 characters; 100000 are allowed"),
    "token that is a number": (
        "tokenizer_config.json",
        {"bos_token": 7, "chat_template": "x"},
        "bos_token = 7 is not supported",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_template_file_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    file, content, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_chat_template(write(tmp_path, {file: content}), TEMPLATES["hub"])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        read_chat_template(tmp_path, TEMPLATES["hub"])


# Templates that must not get through; each is harmless where it is refused late

REFUSED: dict[str, tuple[str, str]] = {
    "private attribute": ("{{ ''.__class__ }}", "SecurityError|does not hold the question"),
    "private attribute by a filter": ("{{ '' | attr('__class__') }}", "SecurityError|does not hold the question"),
    "private attribute of a function": ("{{ raise_exception.__globals__ }}", "SecurityError|does not hold the question"),
    "private name in a namespace": ("{% set n = namespace(__x__=1) %}", "which starts with an underscore"),
    "private name set in a namespace": ("{% set n = namespace() %}{% set n._x = 1 %}", "which starts with an underscore"),
    "changed list": ("{{ messages.append(1) }}", "SecurityError"),
    "other file": ("{% include 'tokenizer.json' %}", "no loader for this environment"),
    "many steps": ("{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}", "more than 100000 steps"),
    "many steps over a text": (
        "{% set t = 'x' * 400 %}{% for a in t %}{% for b in t %}{% endfor %}{% endfor %}",
        "more than 100000 steps",
    ),
    "long range": ("{% for i in range(20000) %}{% endfor %}", "numbers up to 10000 are allowed"),
    "endless macro": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion|steps"),
    "long output": ("{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 1000000 characters"),
    "long text": ("{{ 'x' * 20000 }}", "numbers up to 10000 are allowed"),
    "large power": ("{{ 2 ** 101 }}", "raises a number to the power 101"),
    "padded text": ("{{ 'x'.ljust(20000) }}", "numbers up to 10000 are allowed"),
    "padded by a filter": ("{{ 'x' | center(20000) }}", "numbers up to 10000 are allowed"),
    "padded by a format": ("{{ '%20000d' % 1 }}", "whose width has more than three digits"),
    "padded by a format filter": ("{{ '%20000d' | format(1) }}", "whose width has more than three digits"),
    "padded by a format method": ("{{ '{:20000}'.format(1) }}", "whose width has more than three digits"),
    "doubled text": (
        "{% set n = namespace(t='xx') %}{% for i in range(22) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "more than 1000000 characters",
    ),
    "added text": (
        "{% set n = namespace(t='xx') %}{% for i in range(22) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "more than 1000000 characters",
    ),
    "nested lists": (
        "{% set n = namespace(t=[1]) %}{% for i in range(22) %}{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t }}",
        "more than 1000000 characters",
    ),
    "nested lists as JSON": (
        "{% set n = namespace(t=[1]) %}{% for i in range(22) %}{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t | tojson }}",
        "numbers up to|more than 1000000 characters|too long",
    ),
    "replaced text": ("{{ ('x' * 9000) | replace('x', 'y' * 9000) | replace('y', 'z' * 90) }}", "too long texts|more than"),
    "own error": ("{{ raise_exception('only text here') }}", "TemplateError: only text here"),
    "unknown name": ("{{ messages[7].content.text }}", "UndefinedError"),
    "question lost": ("Hello", "does not hold the question with every picture and video in order"),
    "picture twice": ("<image>{{ messages[0].content[0].text }}<image>", "does not hold the question"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_does_not_leave_its_bounds(case: str) -> None:
    source, message = REFUSED[case]
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        prompt_of(source, Request(text="What?"))
    assert time.monotonic() - start < 20  # seconds; each takes a part of one
    assert "chat_template.jinja" in str(caught.value)


def test_a_long_question_is_within_the_bounds() -> None:
    text = "word " * 60_000
    assert text.strip() in prompt_of(LLAMA3, Request(text=text, images=[picture()]))
