"""Documents of lmms-eval to requests, and generation arguments to ways of decoding, without lmms-eval."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanovlm_v2drop import Request, load
from nanovlm_v2drop.evaluation.lmms_eval.requests import Decoding, chat_pieces, decoding_of, request_of, simple_pieces
from nanovlm_v2drop.processing.prompts import build_prompt

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def simple(visuals: Any, text: str) -> Request:
    return request_of(simple_pieces(visuals, text))


def chat(*content: Any, role: str = "user") -> Request:
    return request_of(chat_pieces([{"role": role, "content": list(content)}]))


def image(url: Any) -> dict[str, Any]:
    return {"type": "image", "url": url}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("visuals", [None, [], [None]])
def test_a_document_without_visuals_is_text_alone(visuals: Any) -> None:
    assert simple(visuals, "Why?") == chat(text("Why?")) == Request(text="Why?")


def test_media_before_the_text_are_placed_by_the_models_template() -> None:
    expected = Request(text="What?", images=(RED, BLUE), video="clip.mp4")
    assert simple([RED, BLUE, "clip.mp4"], "What?") == expected
    assert chat(image(RED), image(BLUE), {"type": "video", "url": "clip.mp4"}, text("What?")) == expected


def test_media_between_the_words_stay_there() -> None:
    assert chat(text("From "), image(RED), text(" to "), image(BLUE), text("?")) == Request(
        text="From <image> to <image>?", images=(RED, BLUE)
    )
    assert chat({"type": "video", "url": "clip.mp4"}, image(RED), text("?")).text == "<video><image>?"
    assert chat(text("Look: "), image(RED)).text == "Look: <image>"


def test_placeholders_in_the_text_say_where_pictures_stand() -> None:
    marked = "First <image>, then <image>?"
    expected = Request(text=marked, images=(RED, BLUE))
    assert simple([RED, BLUE], marked) == chat(image(RED), image(BLUE), text(marked)) == expected


@pytest.mark.parametrize(("visuals", "marks"), [([RED], 2), ([RED, BLUE], 1), ([], 1), (["clip.mp4"], 1)])
def test_placeholders_that_do_not_match_the_pictures_are_removed(visuals: list[Any], marks: int) -> None:
    assert simple(visuals, "<image>\n" * marks + "What?").text == "What?"
    interleaved = chat(text("<image>See "), image(RED), text("<video>?"))
    assert interleaved.text == "See <image>?"


def test_a_system_message_stands_before_the_question() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [image(RED), text("What?")]}]
    assert request_of(chat_pieces(messages)) == Request(text="Be brief.\nWhat?", images=(RED,))


@pytest.mark.parametrize(
    ("messages", "roles"),
    [
        ([], "no message"),
        ([{"role": "assistant", "content": "Yes."}], "assistant"),
        ([{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C?"}],
         "user, assistant, user"),
    ],
)  # fmt: skip
def test_several_turns_are_refused(messages: list[dict[str, str]], roles: str) -> None:
    with pytest.raises(ValueError, match=f"must ask one question, as one message of the user, not: {roles}$"):
        chat_pieces(messages)


def test_files_are_told_apart_by_their_ends_and_folders_are_videos(tmp_path: Path) -> None:
    frames = [tmp_path / f"{number}.jpg" for number in range(3)]
    for frame in reversed(frames):
        RED.save(frame)
    (tmp_path / "notes.txt").touch()
    assert simple(["a.PNG"], "?").images == ("a.PNG",)
    assert simple(["a.mkv", "b.webm"], "?").video == ("a.mkv", "b.webm")
    assert simple([str(tmp_path)], "?").video == chat({"type": "video", "url": str(tmp_path)}, text("?")).video == frames
    assert simple([(RED, BLUE)], "?").video == [RED, BLUE]
    assert chat({"type": "audio", "url": "clip.webm"}, text("?")).video == "clip.webm"  # lmms-eval takes it for sound


def test_a_picture_that_is_not_decoded_yet_is_decoded() -> None:
    stored = io.BytesIO()
    RED.save(stored, "PNG")
    (picture,) = simple([{"bytes": stored.getvalue(), "path": None}], "?").images
    assert isinstance(picture, Image.Image)
    assert picture.tobytes() == RED.tobytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chat({"type": "audio", "url": "a.wav"}, text("?")), "a document holds audio, which no model here takes"),
        (lambda: chat({"type": "video", "url": "a.mp4", "start_time": 1.0}, text("?")), "only whole videos are read"),
        (lambda: chat({"type": "video", "url": {"path": "a.mp4", "video_start": 1}}, text("?")), "only whole videos are read"),
        (lambda: simple([{"array": [0.0], "sampling_rate": 1}], "?"), "a dictionary with array, sampling_rate is no picture"),
        (lambda: simple([3], "?"), "a picture of the document: 3 is not a picture"),
    ],
)
def test_what_no_model_takes_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no picture, so it is no video"):
        simple([str(tmp_path)], "?")


PIECES = st.lists(st.sampled_from([image(RED), text("<image>"), text("a <video> b "), text("? ")]), max_size=4)


@settings(max_examples=20, deadline=None)
@given(PIECES)
def test_every_document_with_words_gives_a_prompt_with_its_pictures(pieces: list[dict[str, Any]]) -> None:
    vlm, content = load("demo"), [*pieces, text("What?")]
    request = chat(*content)
    build_prompt(request, vlm.conversation, vlm.config.marks)
    assert len(request.images) == sum(piece["type"] == "image" for piece in content)
    assert sum(vlm.prepare([request]).vision_counts) == 144 * len(request.images)


@pytest.mark.parametrize(
    ("kwargs", "decoding"),
    [
        ({}, Decoding(1024)),
        ({"until": ["\n\n"], "do_sample": False}, Decoding(1024)),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, Decoding(16)),
        ({"temperature": 0.0, "top_p": None, "top_k": "None"}, Decoding()),
        ({"temperature": 0.7}, Decoding(temperature=0.7)),
        ({"temperature": 0.7, "do_sample": True, "top_p": 0.9, "seed": 3}, Decoding(temperature=0.7, top_p=0.9, seed=3)),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, Decoding()),
        ({"do_sample": True}, Decoding(temperature=1.0)),
        ({"do_sample": True, "temperature": 0}, Decoding()),
        ({"until": "stop"}, Decoding(until=("stop",))),
        ({"until": ["\n\n", "a", ""], "image_aspect_ratio": "original"}, Decoding(until=("a",))),
        ({"max_new_tokens": 16.0}, Decoding(16)),
    ],
)
def test_generation_arguments_are_honoured(kwargs: dict[str, Any], decoding: Decoding) -> None:
    before = dict(kwargs)
    assert decoding_of(kwargs) == decoding
    assert kwargs == before


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 5}, "num_beams=5 is not offered"),
        ({"temperature": 1.0, "top_k": 50}, "top_k=50 is not offered"),
        ({"repetition_penalty": 1.1, "penalty": 2}, "unknown 'repetition_penalty', 'penalty'; the models here know"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens=inf must be a whole number"),
        ({"seed": float("nan")}, "seed=nan must be a whole number"),
        ({"until": [3]}, "until=[3] must be a string or a list of strings"),
    ],
)
def test_generation_arguments_that_cannot_be_honoured_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"gen_kwargs: {message}")):
        decoding_of(kwargs)


def test_the_text_ends_before_the_first_stop_string() -> None:
    assert Decoding(until=("c", "b")).cut("a b c") == "a"
    assert Decoding().cut("a b c ") == "a b c"


def test_white_space_before_a_text_does_not_stop_it() -> None:
    line = Decoding(until=("\n",))
    assert [line.has_stopped(text) for text in ("", "\n", "\n a", "\n a\n", "a\nb")] == [False, False, False, True, True]
    assert line.cut("\n a\nb") == "a"
    assert not Decoding().has_stopped("a\n\nb")
