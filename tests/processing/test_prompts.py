"""Prompts: literal templates, the place of pictures and videos, and requests that cannot be meant."""

from itertools import groupby
from pathlib import Path

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama import IMAGE_TOKEN_ID, llama_tokenizer, train_sentencepiece
from PIL import Image

from nanovlm_v2drop.models.vlm import VisionInput
from nanovlm_v2drop.processing.prompts import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    Exchange,
    Medium,
    Request,
    build_prompt,
    encode_prompt,
    write_media,
)
from nanovlm_v2drop.processing.tokenizer import JsonTokenizer


@pytest.fixture(scope="module")
def from_json() -> JsonTokenizer:
    return JsonTokenizer(llama_tokenizer(train_sentencepiece()), "<s>", "</s>")


def picture() -> Image.Image:
    return Image.new("RGB", (2, 2))


# Templates


def test_vicuna_prompt_is_the_papers_string():
    assert build_prompt(Request(text="What is this?", images=[picture()])) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
    )


def test_hub_prompt_has_no_system_sentence():
    request = Request(text="What is this?", images=[picture()])
    assert build_prompt(request, "hub") == "USER: <image>\nWhat is this? ASSISTANT:"


def test_default_template_is_in_the_table():
    assert DEFAULT_TEMPLATE == "vicuna_v1"
    llava = {"vicuna_v1", "hub", "mistral_instruct", "qwen_1_5", "qwen_hub"}
    assert set(TEMPLATES) == llava | {"qwen2_vl", "qwen3_vl", "smolvlm", "nanovlm", "nanovlm_222m"}


def test_mistral_is_asked_between_its_instruction_marks():
    request = Request(text="What is this?", images=[picture()])
    assert build_prompt(request, "mistral_instruct") == "[INST] <image>\nWhat is this? [/INST]"
    earlier = [Exchange([Medium.IMAGE], ["A cat?"], "yes"), Exchange([], ["Two?"], "no")]
    turns = "[INST] <image>\nA cat? [/INST] yes </s>[INST] Two? [/INST] no </s>[INST] Old? [/INST]"
    assert build_prompt(Request(text="Old?"), "mistral_instruct", earlier=earlier) == turns


def test_pictures_without_a_place_come_first():
    request = Request(text="Compare.", images=[picture(), picture()])
    assert build_prompt(request, "hub") == "USER: <image>\n<image>\nCompare. ASSISTANT:"


def test_placed_pictures_stay_where_they_are():
    request = Request(text="Is <image> in <image>?", images=(picture(), picture()))
    assert build_prompt(request, "hub") == "USER: Is <image> in <image>? ASSISTANT:"


def test_text_alone_needs_no_picture():
    assert build_prompt(Request(text="Hi"), "hub") == "USER: Hi ASSISTANT:"


def test_templated_prompt_passes_unchanged():
    prompt = "  USER: <image> {braces}\n"
    assert build_prompt(Request(prompt=prompt, images=[picture()])) == prompt


@given(text=st.text(min_size=1).filter(lambda text: text.strip() and "<video>" not in text))
@settings(max_examples=50, deadline=None)
def test_every_text_stands_in_the_prompt_verbatim(text):
    assert text in build_prompt(Request(text=text, images=[picture()] * max(1, text.count("<image>"))))


# Requests that cannot be meant


@pytest.mark.parametrize(("fields", "given"), [({}, "neither"), ({"text": "a", "prompt": "b"}, "both")])
def test_request_takes_exactly_one_of_text_and_prompt(fields, given):
    with pytest.raises(ValueError, match=f"either text or an already templated prompt, got {given}"):
        Request(**fields)


@pytest.mark.parametrize("images", [picture(), "picture.png", None])
def test_request_refuses_a_single_picture(images):
    with pytest.raises(ValueError, match="must be a list of pictures"):
        Request(text="a", images=images)


@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
@pytest.mark.parametrize("field", ["text", "prompt"])
def test_blank_request_is_refused(field, blank):
    with pytest.raises(ValueError, match="blank"):
        build_prompt(Request(**{field: blank}))


def test_unknown_template_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"'llama'; choose one of: hub, mistral_instruct, nanovlm, .*, vicuna_v1"):
        build_prompt(Request(text="Hi"), "llama")


@pytest.mark.parametrize(("text", "num_images", "counts"), [("<image> a", 0, "1 .* 0"), ("<image>" * 3, 2, "3 .* 2")])
def test_placeholder_count_must_match_the_pictures(text, num_images, counts):
    with pytest.raises(ValueError, match=f"has {counts} pictures .*write one <image> for each"):
        build_prompt(Request(text=text, images=[picture()] * num_images))


# Prompt to ids


def medium(num_tokens: int) -> VisionInput:
    return VisionInput(torch.zeros(0), ((1, 1, num_tokens),), (1, 1))


def test_each_image_token_is_repeated_once_per_feature(from_json):
    plain = from_json.encode("a <image> b <image>")
    first, second = (index for index, token_id in enumerate(plain) if token_id == IMAGE_TOKEN_ID)
    media = [medium(3), medium(2)]
    expanded, ordered = encode_prompt(from_json, "a <image> b <image>", {IMAGE_TOKEN_ID: media})
    assert ordered == media
    assert expanded == [
        *plain[:first],
        *[IMAGE_TOKEN_ID] * 3,
        *plain[first + 1 : second],
        *[IMAGE_TOKEN_ID] * 2,
        *plain[second + 1 :],
    ]


def test_prompt_without_pictures_is_only_encoded(from_json):
    encoded = encode_prompt(from_json, "USER: Hi ASSISTANT:", {IMAGE_TOKEN_ID: []})
    assert encoded == (from_json.encode("USER: Hi ASSISTANT:"), [])


def test_media_come_in_the_order_of_their_tokens(from_json):
    other_id = from_json.token_to_id("<pad>")
    first, second, video = medium(2), medium(1), medium(4)
    _, ordered = encode_prompt(from_json, "<image> a <pad> b <image>", {IMAGE_TOKEN_ID: [first, second], other_id: [video]})
    assert ordered == [first, video, second]


@pytest.mark.parametrize(("prompt", "tokens_per_image", "counts"), [("a", [4], "0 .* 1"), ("<image> <image>", [4], "2 .* 1")])
def test_image_token_count_must_match_the_pictures(from_json, prompt, tokens_per_image, counts):
    with pytest.raises(ValueError, match=f"has {counts.replace(' .* ', ' image or video tokens .* but ')} pictures"):
        encode_prompt(from_json, prompt, {IMAGE_TOKEN_ID: list(map(medium, tokens_per_image))})


# Several videos, and marks that are only text

VIDEO_TEMPLATES = {"qwen_1_5": "<video>\n", "qwen2_vl": "<|vision_start|><|video_pad|><|vision_end|>"}


@pytest.mark.parametrize("template", VIDEO_TEMPLATES)
def test_two_videos_come_before_the_question(template):
    prompt = build_prompt(Request(text="Which is longer?", video=["a.mp4", "b.mp4"]), template)
    assert f"user\n{VIDEO_TEMPLATES[template] * 2}Which is longer?" in prompt


def test_two_videos_stand_where_the_question_places_them():
    prompt = build_prompt(Request(text="Is <video> before <video>?", video=["a.mp4", "b.mp4"]), "qwen_1_5")
    assert "user\nIs <video> before <video>?" in prompt


def test_pictures_and_videos_without_a_place_stand_before_the_question_in_that_order():
    prompt = build_prompt(Request(text="What?", images=[picture()], video=["a.mp4", "b.mp4"]), "hub")
    assert prompt == "USER: <image>\n<video>\n<video>\nWhat? ASSISTANT:"


FRAMES = [picture(), picture()]
SOURCES = {
    "none": (None, []),
    "a file": ("a.mp4", ["a.mp4"]),
    "a path": (Path("a.mp4"), [Path("a.mp4")]),
    "frames": (FRAMES, [FRAMES]),
    "files of frames": (["1.png", Path("2.JPG")], [["1.png", Path("2.JPG")]]),
    "two files": (["a.mp4", Path("b.mkv")], ["a.mp4", Path("b.mkv")]),
    "one file in a list": (["a.mp4"], ["a.mp4"]),
    "frames twice": ([FRAMES, FRAMES], [FRAMES, FRAMES]),
    "a file and frames": (["a.mp4", FRAMES], ["a.mp4", FRAMES]),
    "no frame": ([], [[]]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_list_of_pictures_is_one_video_and_any_other_list_is_several(case):
    given_video, expected = SOURCES[case]
    assert Request(text="What?", video=given_video).videos == expected


@pytest.mark.parametrize("text", ["What does <video> do in HTML?", "<video>", "<video> and <video>"])
def test_a_mark_of_a_video_is_text_for_a_model_without_videos(text):
    request = Request(text=text, images=[picture()])
    assert build_prompt(request, "hub", ("<image>",)) == f"USER: <image>\n{text} ASSISTANT:"


@pytest.mark.parametrize("text", ["What does <image> do in XML?", "<image>", "<image> or <video>?"])
def test_both_marks_are_text_for_a_model_that_spells_its_tokens_otherwise(text):
    prompt = build_prompt(Request(text=text), "qwen2_vl", ("<|image_pad|>", "<|video_pad|>"))
    assert f"user\n{text}<|im_end|>" in prompt


def test_a_mark_that_is_a_token_of_the_model_needs_its_picture():
    with pytest.raises(ValueError, match="has 1 <image> but 0 pictures are given"):
        build_prompt(Request(text="What does <image> do?"), "hub", ("<image>",))
    with pytest.raises(ValueError, match="has 2 <image> but 1 pictures are given"):
        build_prompt(Request(text="<image><image>", images=[picture()]), "qwen2_vl", ("<|image_pad|>", "<|video_pad|>"))


BAD_TEXTS = {
    "Latin-1 on a UTF-8 command line": ("text", "caf\udce9?", r"the text is not valid Unicode: character 3 is '\\udce9'"),
    "half of a pair": ("text", "a\ud83d", r"the text is not valid Unicode: character 1 is '\\ud83d'"),
    "half of a pair in a prompt": ("prompt", "\udc00", r"the prompt is not valid Unicode: character 0 .* not UTF-8"),
    "bytes": ("text", b"What?", "the text must be a str, got bytes"),
    "a number": ("text", 5, "the text must be a str, got int"),
    "a list": ("prompt", ["What?"], "the prompt must be a str, got list"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_is_no_unicode_is_refused_in_one_line(case):
    field, value, message = BAD_TEXTS[case]
    with pytest.raises(ValueError, match=message) as caught:
        Request(**{field: value})
    assert "\n" not in str(caught.value)


# Pictures and videos with words between their tokens


def written(text: str, *grids: tuple[int, int, int]) -> VisionInput:
    return VisionInput(torch.zeros(1, 3, 2, 2), grids, (2, 2), text=text)


def test_media_that_bring_their_own_words_stand_in_the_place_of_their_marks(from_json):
    tiles, video = written("a<image>b<image>c", (1, 2, 1), (1, 1, 1)), written("<image>, <image>", (2, 1, 3))
    prompt, ordered = write_media("<image> and <video>?", {"<image>": [tiles], "<video>": [video]})
    assert prompt == "a<image>b<image>c and <image>, <image>?"
    assert ordered == [("<image>", tiles), ("<video>", video)]
    expanded, again = encode_prompt(from_json, prompt, {IMAGE_TOKEN_ID: [tiles, video]})
    counts, rows = [2, 1, 3, 3], iter(expanded)
    runs = [list(run) for is_image, run in groupby(rows, key=IMAGE_TOKEN_ID.__eq__) if is_image]
    assert [len(run) for run in runs] == counts
    assert again == [tiles, video]


def test_media_without_words_leave_their_marks():
    plain, video = written("", (1, 2, 1)), written("0 s: <video>", (1, 1, 3))
    prompt, ordered = write_media("<video>, <image>?", {"<image>": [plain], "<video>": [video]})
    assert prompt == "0 s: <video>, <image>?"
    assert ordered == [("<video>", video), ("<image>", plain)]


@pytest.mark.parametrize(("prompt", "count"), [("a", 0), ("<image><image>", 2)])
def test_marks_must_be_as_many_as_the_media(prompt, count):
    with pytest.raises(ValueError, match=f"the prompt has {count} <image> but 1 pictures or videos are given for it"):
        write_media(prompt, {"<image>": [written("<image>", (1, 1, 1))]})


@pytest.mark.parametrize(
    "content",
    [
        ["What?"],
        ["<image>", "What?"],
        ["<image>", "<image>", "Which?"],
        ["Is", "<image>", " blue?"],
        ["<video>", "What happens?"],
    ],
)
def test_smolvlms_conversation_is_that_of_transformers(content):
    module = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    kinds = {"<image>": {"type": "image"}, "<video>": {"type": "video"}}
    message = {"role": "user", "content": [kinds.get(piece, {"type": "text", "text": piece}) for piece in content]}
    official = jinja2.Template(module.DEFAULT_CHAT_TEMPLATE).render(messages=[message], add_generation_prompt=True)
    assert TEMPLATES["smolvlm"]("".join(content)) == official


# Several turns

EARLIER = [Exchange([Medium.IMAGE], ["A cat?"], "yes"), Exchange([], ["Two?"], "no")]
QWEN_TURNS = (
    "A cat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    "no<|im_end|>\n<|im_start|>user\nOld?<|im_end|>\n<|im_start|>assistant\n"
)
LATER = {
    "vicuna_v1": "A cat? ASSISTANT: yes</s>USER: Two? ASSISTANT: no</s>USER: Old? ASSISTANT:",
    "hub": "A cat? ASSISTANT: yes USER: Two? ASSISTANT: no USER: Old? ASSISTANT:",
    **dict.fromkeys(["qwen_1_5", "qwen_hub", "qwen2_vl", "nanovlm"], QWEN_TURNS),
    "smolvlm": "A cat?<end_of_utterance>\nAssistant: yes<end_of_utterance>\nUser: Two?<end_of_utterance>\nAssistant: no"
    "<end_of_utterance>\nUser: Old?<end_of_utterance>\nAssistant:",
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_later_turns_follow_the_first_without_its_system_sentence(name):
    first = TEMPLATES[name].write([Medium.IMAGE], ["A cat?"])
    whole = build_prompt(Request(text="Old?"), name, earlier=EARLIER)
    assert whole == first.partition("A cat?")[0] + LATER[name]
    assert whole.startswith(first)


def test_a_model_of_single_questions_has_no_second_turn():
    with pytest.raises(ValueError, match="for single questions; forget the earlier turns, or give --template NAME"):
        build_prompt(Request(text="Old?"), "nanovlm_222m", earlier=EARLIER)


def test_braces_in_an_answer_are_text():
    assert "{answer} {}</s>" in build_prompt(Request(text="Old?"), earlier=[Exchange([], ["A cat?"], "{answer} {}")])


def test_smolvlms_later_turns_are_those_of_transformers():
    module = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    said = [("user", "A cat?"), ("assistant", "yes"), ("user", "Two?"), ("assistant", "no"), ("user", "Old?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    messages[0]["content"].insert(0, {"type": "image"})
    official = jinja2.Template(module.DEFAULT_CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    assert build_prompt(Request(text="Old?"), "smolvlm", earlier=EARLIER) == official
