"""One question, and conversations, on the shipped demos."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from nanovlm_v2drop import Request, cli, generate, load
from nanovlm_v2drop.cli import chat as chat_module
from nanovlm_v2drop.cli.arguments import parse_arguments
from nanovlm_v2drop.cli.chat import WordWrap
from nanovlm_v2drop.evaluation.loading import sampling_of
from nanovlm_v2drop.processing.video import (
    FpsSampling,
    FrameSampling,
    LmmsEvalSampling,
    Qwen3VLSampling,
    SmolVLMSampling,
    UniformSampling,
)
from nanovlm_v2drop.tasks import load_task

ROOT = Path(__file__).parents[1]
CLIP = ROOT / "weights" / "demo-video" / "clip.mp4"
QUESTION = "How many objects are in the image?"


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scene") / "scene.png"
    load_task("demo").first_sample().images[0].save(path)
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_question_is_answered_with_and_without_dropping_in_a_small_table(scene, tmp_path, capsys):
    code, out, _ = run(capsys, "--image", scene, "--prompt", QUESTION, "--output", tmp_path / "run")
    assert code == 0
    *table, kept, last = out.splitlines()
    result = json.loads(last)
    assert [(row["method"], row["asked_tokens"]) for row in result["results"]] == [
        ("dense", None), *((method, budget) for budget in (48.0, 32.0, 16.0) for method in ("v2drop", "random"))
    ]  # fmt: skip
    assert kept == f"kept tokens: {tmp_path / 'run' / 'kept.png'}"
    assert Image.open(result["picture"]).size[0] > 700
    assert max(map(len, table)) <= 78
    cells = next(line for line in table if line.startswith("v2drop 32")).split()
    row = result["results"][3]
    times = [f"{row['prefill_ms']:.1f}", f"{row['total_ms']:.1f}"]
    assert cells == ["v2drop", "32", "144", "31.8", "1", *times, *row["text"].split()]
    assert "synthetic scenes" not in out


@pytest.mark.parametrize("options", [["--prompt", QUESTION, "--image"], ["--limit", "2"]])
def test_a_default_output_that_cannot_be_made_is_told_before_the_model_is_loaded(options, scene, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").write_text("")
    for module in ("ask", "runs"):
        monkeypatch.setattr(f"nanovlm_v2drop.cli.{module}.load_model", None)
    code, _, error = run(capsys, *options, *([scene] if "--image" in options else []))
    assert code == 2
    assert re.fullmatch(r"nanovlm-v2drop: --output results/demo-\S+: \S+/results is a file; give a folder\n", error)


def test_a_long_name_of_a_method_leaves_the_numbers_and_the_answer_their_room(scene, tmp_path, capsys):
    name = "visionzip+v2drop:metric=cosine:share=0.5"
    options = ["--methods", name, "--tokens", "48", "--output", tmp_path / "run"]
    _, out, _ = run(capsys, "--image", scene, "--prompt", QUESTION, *options)
    *table, _, last = out.splitlines()
    (row,) = json.loads(last)["results"]
    shown = next(line for line in table if line.startswith("visionzip"))
    assert max(map(len, table)) <= 78
    assert shown.split()[1:] == ["144", "48.0", "1", f"{row['prefill_ms']:.1f}", f"{row['total_ms']:.1f}", *row["text"].split()]


def test_a_photo_is_met_with_a_note_and_a_model_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nanovlm_v2drop.cli.ask.physical_memory_gb", lambda: 8.0)
    Image.new("RGB", (300, 200), (90, 120, 100)).save(tmp_path / "photo.png")
    options = ["--prompt", QUESTION, "--methods", "dense", "--output", tmp_path / "run"]
    code, out, _ = run(capsys, "--image", tmp_path / "photo.png", *options)
    words = " ".join(out.split())
    assert code == 0
    assert "demo knows only synthetic scenes of 144 x 144 pixels. This is 300 x 200, so its answers mean nothing" in words
    assert "--model smolvlm-2.2b fits this machine (4.5 GB to download)" in words


def test_several_pictures_and_a_folder_of_pictures_are_one_question(scene, tmp_path, capsys):
    picture = Image.open(scene)
    (tmp_path / "folder").mkdir()
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / "folder" / name)
    options = ["--prompt", QUESTION, "--methods", "dense", "--output", tmp_path / "run"]
    code, out, _ = run(capsys, "--image", scene, tmp_path / "folder", *options)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["results"][0]["vision_tokens"] == 3 * 144


def test_a_clip_is_asked_about_with_the_eight_frames_that_the_demo_was_trained_with(tmp_path, capsys):
    options = ["--prompt", "What moves?", "--retain", "0.25", "--methods", "dense,v2drop", "--output", tmp_path]
    code, out, _ = run(capsys, "--model", "demo-video", "--video", CLIP, *options)
    assert code == 0
    dense, own = json.loads(out.splitlines()[-1])["results"]
    assert dense["vision_tokens"] == 8 * 36 + 1
    assert abs(own["mean_vision_tokens"] - 0.25 * 289) <= 1
    assert "move" in dense["text"]


# -- conversations


def type_in(monkeypatch, *lines: str) -> None:
    """What a user types; the end of the input follows."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_a_conversation_streams_its_answers_and_keeps_its_cache(scene, capsys, monkeypatch):
    chats, chat = [], chat_module.Chat
    monkeypatch.setattr(chat_module, "Chat", lambda *options, **more: chats.append(chat(*options, **more)) or chats[-1])
    type_in(monkeypatch, QUESTION, "Is there a red circle in the image?")
    code, out, _ = run(capsys, "--image", scene, "--chat", "--tokens", 60)
    assert code == 0
    first, *answers = [line for line in out.splitlines() if line]
    end = "an empty line or Ctrl-D ends the conversation, /forget begins another"
    assert first == f"demo in float32 (auto: only 6.5 M weights) answers with v2drop 60; {end}"
    assert re.fullmatch(r"\d", answers[0])
    assert answers[1] in ("yes", "no")
    one, two = chats[0].turns
    assert (len(one.question.images), len(two.question.images)) == (1, 0)
    assert two.cached_tokens > 144 > two.prefilled_tokens


@pytest.mark.parametrize("history", ["keep-cache", "cut-cache", "re-prefill"])
def test_the_history_of_a_conversation_is_chosen_by_its_name(history, scene, capsys, monkeypatch):
    histories, chat = [], chat_module.Chat

    def made(*options, history):
        histories.append(history)
        return chat(*options, history=history)

    monkeypatch.setattr(chat_module, "Chat", made)
    type_in(monkeypatch, QUESTION)
    assert run(capsys, "--image", scene, "--chat", "--history", history)[0] == 0
    assert histories == [history]


@pytest.mark.skipif(find_spec("readline") is None, reason="this Python is built without readline")
def test_arrow_keys_edit_a_question_on_a_terminal():
    own, terminal = pty.openpty()
    script = "from nanovlm_v2drop.cli.chat import edit_lines; edit_lines(); print(ascii(input('> ')), flush=True)"
    options = {"stdin": terminal, "stdout": terminal, "env": {**os.environ, "TERM": "xterm"}}
    with subprocess.Popen([sys.executable, "-c", script], **options) as process:
        os.close(terminal)
        os.write(own, b"What is i?\x1b[Dt\n")
        shown = b""
        with suppress(OSError):  # the terminal is closed when the process ends
            while piece := os.read(own, 4096):
                shown += piece
    assert process.returncode == 0
    assert b"'What is it?'" in shown
    os.close(own)


def test_an_empty_line_ends_a_conversation(scene, capsys, monkeypatch):
    type_in(monkeypatch, "", "never asked")
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert (code, len(out.splitlines())) == (0, 1)


def test_a_question_that_cannot_be_asked_is_told_and_the_conversation_goes_on_without_it(scene, capsys, monkeypatch):
    type_in(monkeypatch, "Is <image> like <image>?", QUESTION, "word " * 2000, "/forget", QUESTION)
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert code == 0
    assert out.count("the conversation is as it was; /forget keeps the pictures and forgets what was said") == 2
    assert "the context of demo holds 1024" in out
    digits = [line for line in out.splitlines() if re.fullmatch(r"\d", line)]
    assert len(digits) == 2
    assert digits[0] == digits[1]


def test_a_line_with_a_slash_is_a_command_and_with_two_a_question(scene, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(chat_module, "answer", lambda conversation, plan, media, question: asked.append(question))
    type_in(monkeypatch, "/help", "/forget it", "//forget", " //", "a/b")
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert (code, asked) == (0, ["/forget", "/", "a/b"])
    told = "unknown command {0}; the only one is /forget. Type /{0} to ask this as a question"
    assert out.splitlines()[1:3] == [told.format("/help"), told.format("/forget it")]


@given(st.lists(st.text("ab \n\N{CJK UNIFIED IDEOGRAPH-6F22}", max_size=12), max_size=20), st.integers(3, 9))
@settings(max_examples=200, deadline=None)
def test_streamed_lines_break_between_words(pieces, width):
    def shown(parts):
        lines = WordWrap(width)
        return "".join(map(lines.add, parts)) + lines.rest()

    text, wrapped = "".join(pieces), shown(pieces)
    assert wrapped == shown([text])
    assert all(cell_len(line) <= width for line in wrapped.split("\n"))
    assert "".join(wrapped.split()) == "".join(text.split())
    narrow = [word for word in text.split() if word.isascii() and len(word) < width]
    assert [word for word in narrow if word not in wrapped.split()] == []
    if all(cell_len(line) <= width for line in text.split("\n")):
        assert wrapped == re.sub(r" +(?=\n|$)", "", text)  # nothing is broken that fits


def test_with_forget_each_question_is_answered_as_if_it_were_the_first(scene, capsys, monkeypatch):
    questions = [QUESTION, "Is there a red circle in the image?", QUESTION]
    type_in(monkeypatch, *questions)
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense", "--forget")
    (picture,) = load_task("demo").first_sample().images
    wanted = [generate(load("demo"), [Request(question, images=[picture])])[0].text for question in questions]
    assert (code, out.splitlines()[1:4]) == (0, wanted)


def test_an_interrupt_ends_an_answer_and_not_the_conversation(scene, capsys, monkeypatch):
    stream, calls = chat_module.Chat.stream, []

    def interrupted(self, *question):
        calls.append(question)
        pieces = stream(self, *question)
        if len(calls) > 1:
            return pieces
        next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_module.Chat, "stream", interrupted)
    type_in(monkeypatch, QUESTION, QUESTION)
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert code == 0
    assert out.splitlines()[1] == " (interrupted)"
    assert out.splitlines()[2]


def test_an_interrupt_at_the_prompt_ends_the_conversation(scene, capsys, monkeypatch):
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert (code, out.splitlines()[1:]) == (0, [""])


def test_a_conversation_that_had_to_be_prefilled_again_says_so(scene, capsys, monkeypatch):
    note = "the earlier turns or their pictures are written in another way now"
    monkeypatch.setattr("nanovlm_v2drop.inference.conversation.common_length", lambda *_: 0)
    type_in(monkeypatch, QUESTION, QUESTION)
    _, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert out.count(f"(the whole conversation was prefilled again: {note})") == 1


def test_conversations_are_measured_in_a_table_that_says_what_was_compared(capsys):
    options = ["--methods", "dense,v2drop,divprune", "--tokens", 48, "--batch-size", 2]
    code, out, _ = run(capsys, "--conversations", 2, *options)
    assert code == 0
    title, *table, last = out.splitlines()
    assert title == "demo: 2 conversations of 3 questions; later questions see the earlier turns"
    rows = json.loads(last)["results"]
    histories = {"dense": 2, "v2drop": 3, "divprune": 2}
    assert [row["method"] for row in rows] == [name for name, count in histories.items() for _ in range(count)]
    shown = [line.split()[:3] for line in table if line.startswith(tuple(histories))]
    assert shown == [[row["method"], row["budget"] or "-", row["history"]] for row in rows]


def test_conversations_fit_a_terminal_of_80_columns_and_name_the_methods_that_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr("nanovlm_v2drop.cli.conversations.console_for", lambda wide: Console(width=80))
    code, out, _ = run(capsys, "--conversations", 2, "--methods", "dense,v2drop,divprune", "--tokens", 1, "--batch-size", 2)
    assert code == 0
    *lines, last = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    assert sum(line.startswith("divprune") for line in lines) == 2 * 2  # histories, tables
    assert "left out, because the method does not go down to this budget: v2drop 1" in " ".join(lines)
    assert {row["method"] for row in json.loads(last)["results"]} == {"dense", "divprune"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--frames", "8"], UniformSampling(8)),
        (["--sampling", "uniform"], UniformSampling()),
        (["--sampling", "fps", "--frames", "16"], FpsSampling(max_frames=16)),
        (["--sampling", "qwen3-vl", "--frames", "16"], Qwen3VLSampling(max_frames=16)),
        (["--sampling", "lmms-eval", "--frames", "16"], LmmsEvalSampling(16)),
        (["--sampling", "smolvlm"], SmolVLMSampling()),
    ],
)
def test_frames_are_chosen_by_the_rule_that_is_named(options: list[str], expected: FrameSampling | None) -> None:
    assert sampling_of(parse_arguments(["--model", "qwen2-vl-2b", *options])) == expected
