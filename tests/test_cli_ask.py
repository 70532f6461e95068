"""One question, and conversations, on the shipped demos."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from nanovlm_v2drop import Request, cli, load
from nanovlm_v2drop.cli import chat as chat_module
from nanovlm_v2drop.cli.arguments import parse_arguments
from nanovlm_v2drop.cli.chat import Conversation
from nanovlm_v2drop.evaluation.loading import sampling_of
from nanovlm_v2drop.processing.prompts import build_prompt
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


def test_a_conversation_streams_its_answers_and_keeps_what_was_said(scene, capsys, monkeypatch):
    requests, stream = [], chat_module.stream

    def noted(vlm, request, dropper):
        requests.append(request)
        return stream(vlm, request, dropper)

    monkeypatch.setattr(chat_module, "stream", noted)
    type_in(monkeypatch, QUESTION, "Is there a red circle in the image?")
    code, out, _ = run(capsys, "--image", scene, "--chat", "--tokens", 60)
    assert code == 0
    first, *answers = [line for line in out.splitlines() if line]
    assert first.startswith("demo in float32 (auto: only 6.5 M weights) answers with v2drop 60; an empty line or Ctrl-D ends")
    assert re.fullmatch(r"\d", answers[0])
    assert answers[1] in ("yes", "no")
    assert [len(request.images) for request in requests] == [1, 1]
    assert requests[1].prompt == f"{requests[0].prompt} {answers[0]}</s>USER: Is there a red circle in the image? ASSISTANT:"


def test_an_empty_line_ends_a_conversation(scene, capsys, monkeypatch):
    type_in(monkeypatch, "", "never asked")
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert (code, len(out.splitlines())) == (0, 1)


def test_a_question_that_does_not_fit_is_told_and_the_conversation_goes_on_without_it(scene, capsys, monkeypatch):
    type_in(monkeypatch, "Is <image> like <image>?", "word " * 2000, QUESTION)
    code, out, _ = run(capsys, "--image", scene, "--chat", "--methods", "dense")
    assert code == 0
    assert out.count("the conversation starts anew; the picture stays") == 2
    assert "the context of demo holds 1024" in out
    assert re.fullmatch(r"\d", out.splitlines()[-2])


@pytest.mark.parametrize(
    ("template", "between", "second"),
    [
        ("vicuna_v1", " yes</s>", "USER: And a dog? ASSISTANT:"),
        ("hub", " yes</s>", "USER: And a dog? ASSISTANT:"),
        ("qwen_1_5", "yes<|im_end|>\n", "<|im_start|>user\nAnd a dog?<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen2_vl", "yes<|im_end|>\n", "<|im_start|>user\nAnd a dog?<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_later_turns_have_no_system_sentence_and_no_picture(template, between, second):
    media = Request(text="placeholder", images=[Image.new("RGB", (4, 4))])
    conversation = Conversation(media, template)
    first = conversation.request("A cat?")
    conversation.remember(first, "yes")
    own = build_prompt(Request(text="A cat?", images=media.images), template)
    assert first.prompt == own
    assert conversation.request("And a dog?").prompt == own + between + second


def test_the_second_answer_equals_one_prompt_with_both_turns(scene):
    vlm = load("demo")
    conversation = Conversation(Request(text="?", images=[scene]), vlm.template)
    first = conversation.request(QUESTION)
    conversation.remember(first, "3")
    prompt = conversation.request(QUESTION)
    ids = vlm.token_ids(prompt)
    assert ids.count(vlm.config.image_token_id) == 144
    assert ids.count(vlm.tokenizer.bos_token_id) == 1
    assert ids.count(vlm.tokenizer.eos_token_id) == 1


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
