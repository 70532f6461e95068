"""Questions to token ids: requests, the conversations of the papers, and the place of every picture and video.

A `Request` becomes a prompt (`build_prompt`), and a prompt becomes ids in which every picture and video has as many tokens
as the tower gives it features (`encode_prompt`).
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Protocol, TypeVar, cast

from PIL.Image import Image

from .tokenizer import Tokenizer
from .video import VideoSource

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"  # how a request marks where its pictures and its videos stand
NANOVLM_IMAGE = "<|image|>"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif", ".mpo")
QWEN_SYSTEM = "You are a helpful assistant."
QWEN_SYSTEM_TURN = f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Request:
    """One question about pictures or videos.

    Args:
        text: what the user asks, with `<image>` where each picture and `<video>` where each video stands. Without them the
            pictures come first, then the videos, then the text.
        images: files or pictures.
        video: one video (a file, or a list of frames), or a list of videos. A list of pictures is one video.
        prompt: given in place of `text` by a caller who has applied a chat template, with the model's own tokens.

    Raises:
        ValueError: not exactly one of text and prompt is given, it is not valid Unicode, or images is no list.
    """

    text: str | None = None
    images: Sequence[str | Path | Image] = ()
    video: VideoSource | Sequence[VideoSource] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.prompt is None):
            given = "both" if self.text is not None else "neither"
            raise ValueError(f"a request takes either text or an already templated prompt, got {given}")
        check_unicode("text" if self.prompt is None else "prompt", self.text if self.prompt is None else self.prompt)
        if not isinstance(self.images, Sequence) or isinstance(self.images, str | bytes):
            kind = type(self.images).__name__
            raise ValueError(f"images must be a list of pictures, got {kind}; wrap a single picture in a list")
        if self.video is not None and not isinstance(self.video, str | Path | Sequence):
            raise ValueError(f"the video must be a file or a list of frames, got {type(self.video).__name__}")

    @property
    def videos(self) -> list[VideoSource]:
        """The videos one by one."""
        if self.video is None:
            return []
        if not isinstance(self.video, str | Path) and any(map(is_video, self.video)):
            return list(cast(Sequence[VideoSource], self.video))
        return [cast(VideoSource, self.video)]


def check_unicode(field: str, text: str | None) -> None:
    """Raise ValueError for anything else than a text that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"the {field} must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {field} is not valid Unicode: character {error.start} is {text[error.start]!a}; it was probably read from "
            "input that is not UTF-8"
        ) from None


def is_video(source: object) -> bool:
    """Whether a member of a list is a video (frames, or a file that is no picture), not a frame."""
    if isinstance(source, str | Path):
        return Path(source).suffix.lower() not in PICTURE_SUFFIXES
    return isinstance(source, list | tuple)


class Medium(Enum):
    """What can stand between the words of a question; the value is how a request writes it."""

    IMAGE = IMAGE_TOKEN
    VIDEO = VIDEO_TOKEN


Content = Sequence[str | Medium]  # the pieces of a question, in order


def split_question(text: str, media: Collection[Medium]) -> list[str | Medium]:
    """The pieces of a text in which the placeholders of these media stand; empty pieces are left out."""
    if not media:
        return [text]
    pieces = re.split("(" + "|".join(medium.value for medium in media) + ")", text)
    return [Medium(piece) if index % 2 else piece for index, piece in enumerate(pieces) if piece]


@dataclass(frozen=True)
class Exchange:
    """An earlier turn of a conversation: what stands before the question, the question and the answer."""

    leading: Content
    question: Content
    answer: str


Earlier = Sequence[Exchange]


class Conversation(Protocol):
    """How a model is asked: what stands around the question, and how a picture is written in it."""

    def write(self, leading: Content, question: Content, vision_tokens: Collection[str], earlier: Earlier = ()) -> str:
        """The prompt of a question whose pictures and videos come before it (`leading`) or have a place in it.

        Raises ValueError where a template cannot write the `earlier` turns too.
        """


def vicuna_v1(text: str) -> str:
    """The conversation of the original LLaVA-1.5 (`conv_vicuna_v1`), which the papers use."""
    return f"{VICUNA_SYSTEM} USER: {text} ASSISTANT:"


def hub(text: str) -> str:
    """The chat template stored beside llava-hf's LLaVA-1.5, which has no system sentence."""
    return f"USER: {text} ASSISTANT:"


def mistral_instruct(text: str) -> str:
    """Mistral's conversation, with which LLaVA-1.6 is asked where it has this decoder."""
    return f"[INST] {text} [/INST]"


def qwen_1_5(text: str) -> str:
    """Qwen2's conversation with its system sentence, as the original LLaVA-OneVision and Qwen2-VL are asked."""
    return QWEN_SYSTEM_TURN + qwen_hub(text)


def smolvlm(text: str) -> str:
    """SmolVLM's conversation. Its words begin with a space, and its pictures do not."""
    space = "" if text.startswith(IMAGE_TOKEN) else " "
    return f"<|im_start|>User:{space}{text}<end_of_utterance>\nAssistant:"


def nanovlm(text: str) -> str:
    """nanoVLM's conversation; several pictures are numbered from zero."""
    first, *others = text.split(NANOVLM_IMAGE)
    numbers = [f"<image: {number}>" if len(others) > 1 else "" for number in range(len(others))]
    pieces = (f"{number}{NANOVLM_IMAGE}{piece}" for number, piece in zip(numbers, others, strict=True))
    return qwen_hub(first + "".join(pieces))


def nanovlm_222m(text: str) -> str:
    """How the first nanoVLM, which has no conversation, is asked; its picture stands before everything."""
    pictures = text.count(NANOVLM_IMAGE)
    return f"{NANOVLM_IMAGE * pictures}Question: {text.replace(NANOVLM_IMAGE, '')} Answer:"


def qwen_hub(text: str) -> str:
    """Qwen2's conversation without a system turn."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Template:
    """A conversation of a paper; a picture or video before the question ends with `separator`.

    `wrap` writes the first turn. Later turns leave out `system`, with which the first one begins. `answer` is the form of an
    answer that another turn follows; None is for models that know single questions only.
    """

    wrap: Callable[[str], str]
    image: str = IMAGE_TOKEN
    video: str = VIDEO_TOKEN
    separator: str = "\n"
    system: str = ""
    answer: str | None = None

    def __call__(self, text: str) -> str:
        """`text` in a conversation, its placeholders written as the model reads them."""
        return self.write([], split_question(text, list(Medium)))

    def write(self, leading: Content, question: Content, vision_tokens: Collection[str] = (), earlier: Earlier = ()) -> str:
        if earlier and self.answer is None:
            raise ValueError("this template is for single questions; forget the earlier turns, or give --template NAME")
        said = [self.turn(turn.leading, turn.question) + str(self.answer).format(answer=turn.answer) for turn in earlier]
        return self.system + "".join(said) + self.turn(leading, question)

    def turn(self, leading: Content, question: Content) -> str:
        """One question without the system sentence."""
        before = [self.spell(medium) + self.separator for medium in leading]
        return self.wrap("".join([*before, *map(self.spell, question)])).removeprefix(self.system)

    def spell(self, piece: str | Medium) -> str:
        """Text as it is, a picture or video as the model's own tokens."""
        if isinstance(piece, str):
            return piece
        return self.image if piece is Medium.IMAGE else self.video


DEFAULT_TEMPLATE = "vicuna_v1"
QWEN_ANSWER = "{answer}<|im_end|>\n"
QWEN_IMAGE, QWEN_VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(vicuna_v1, system=f"{VICUNA_SYSTEM} ", answer=" {answer}</s>"),
    "hub": Template(hub, answer=" {answer} "),
    # An answer is " " + answer + " </s>": haotian-liu/LLaVA, llava/conversation.py, SeparatorStyle.LLAMA_2.
    "mistral_instruct": Template(mistral_instruct, answer=" {answer} </s>"),
    "qwen_1_5": Template(qwen_1_5, system=QWEN_SYSTEM_TURN, answer=QWEN_ANSWER),
    "qwen_hub": Template(qwen_hub, answer=QWEN_ANSWER),
    "qwen2_vl": Template(qwen_1_5, QWEN_IMAGE, QWEN_VIDEO, separator="", system=QWEN_SYSTEM_TURN, answer=QWEN_ANSWER),
    "qwen3_vl": Template(qwen_hub, QWEN_IMAGE, QWEN_VIDEO, separator="", answer=QWEN_ANSWER),
    "smolvlm": Template(smolvlm, separator="", system="<|im_start|>", answer=" {answer}<end_of_utterance>\n"),
    "nanovlm": Template(nanovlm, NANOVLM_IMAGE, separator="", answer=QWEN_ANSWER),
    "nanovlm_222m": Template(nanovlm_222m, NANOVLM_IMAGE, separator=""),
}


def named_template(name: str) -> Template:
    """A conversation of the table; raises ValueError for an unknown name."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; choose one of: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def build_prompt(
    request: Request,
    template: str | Conversation = DEFAULT_TEMPLATE,
    vision_tokens: Collection[str] = (IMAGE_TOKEN, VIDEO_TOKEN),
    earlier: Earlier = (),
) -> str:
    """Write the string that the model reads, behind `earlier` turns; `request.prompt` is returned as it is.

    `vision_tokens`: the names of the model's own tokens for pictures and videos. Where `<image>` or `<video>` is not one of
    them and no picture or video is given, it is ordinary text.
    Raises ValueError for an unknown template, a blank text or prompt, and for a text that has `<image>` or `<video>` in it,
    but not once per picture or video.
    """
    conversation = named_template(template) if isinstance(template, str) else template
    leading, question = content_of(request, vision_tokens)
    return conversation.write(leading, question, vision_tokens, earlier) if request.prompt is None else request.prompt


def content_of(request: Request, vision_tokens: Collection[str]) -> tuple[Content, Content]:
    """The pictures and videos that come before a question, and the pieces of the question; raises as `build_prompt`."""
    question = request.prompt or request.text or ""
    if not question.strip():
        raise ValueError(f"the request is blank ({question!r}); give it a text to answer")
    if request.prompt is not None:
        return [], [request.prompt]
    counts = {Medium.IMAGE: len(request.images), Medium.VIDEO: len(request.videos)}
    placed = [medium for medium, count in counts.items() if has_places(question, medium, count, vision_tokens)]
    leading = [medium for medium, count in counts.items() if medium not in placed for _ in range(count)]
    return leading, split_question(question, placed)


def has_places(text: str, medium: Medium, count: int, vision_tokens: Collection[str]) -> bool:
    """Whether `text` says where its `count` pictures or videos stand; raises ValueError where it names more or fewer."""
    placeholders, what = text.count(medium.value), "pictures" if medium is Medium.IMAGE else "videos"
    if placeholders == count or placeholders == 0:
        return placeholders > 0
    if count == 0 and medium.value not in vision_tokens:
        return False
    raise ValueError(
        f"the text has {placeholders} {medium.value} but {count} {what} are given; write one {medium.value} for each, or none "
        "to put them first"
    )


class Counted(Protocol):
    """A picture or video whose tokens are counted, decoded (VisionInput) or not yet (PlannedMedium)."""

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]: ...

    @property
    def text(self) -> str: ...


Given = TypeVar("Given", bound=Counted)


def token_counts(medium: Counted) -> list[int]:
    """The number of features for each vision token with which a picture or video is written in a prompt."""
    if not medium.text:
        return [sum(map(prod, medium.grids))]
    return [rows * columns for frames, rows, columns in medium.grids for _ in range(frames)]


def write_media(prompt: str, media: Mapping[str, Sequence[Given]]) -> tuple[str, list[tuple[str, Given]]]:
    """Put the text of each picture and video in the place of its mark, such as `<image>`; and mark and medium in that order.

    `media`: for each mark the pictures or videos that its occurrences stand for, in order. A medium without a text leaves its
    mark as it is. Raises ValueError where the prompt has more or fewer of a mark than there are pictures or videos.
    """
    for mark, given in media.items():
        if (places := prompt.count(mark)) != len(given):
            raise ValueError(
                f"the prompt has {places} {mark} but {len(given)} pictures or videos are given for it; write one for each"
            )
    queues = {mark: iter(given) for mark, given in media.items()}
    pieces = re.split("(" + "|".join(map(re.escape, media)) + ")", prompt)
    ordered = [(mark, next(queues[mark])) for mark in pieces[1::2]]
    pieces[1::2] = [medium.text or mark for mark, medium in ordered]
    return "".join(pieces), ordered


def encode_prompt(tokenizer: Tokenizer, prompt: str, media: Mapping[int, Sequence[Given]]) -> tuple[list[int], list[Given]]:
    """Token ids of a prompt in which each vision token stands once per feature, and the media in the order of their tokens.

    `media`: for each vision token's id the pictures or videos that its occurrences stand for, in order.
    Raises ValueError where the prompt has more or fewer of a token than its pictures or videos are written with.
    """
    token_ids = tokenizer.encode(prompt)
    places = {token_id: [place for medium in given for place in places_of(medium)] for token_id, given in media.items()}
    for token_id, needed in places.items():
        if (placeholders := token_ids.count(token_id)) != len(needed):
            raise ValueError(
                f"the prompt has {placeholders} image or video tokens (id {token_id}) but {len(media[token_id])} pictures or "
                f"videos, which take {len(needed)}, are given for it; write one for each, and check that the tokenizer knows "
                "the token"
            )
    queues = {token_id: iter(needed) for token_id, needed in places.items()}
    expanded: list[int] = []
    ordered: list[Given] = []
    for token_id in token_ids:
        count, begun = next(queues[token_id]) if token_id in queues else (1, None)
        expanded += [token_id] * count
        ordered += [] if begun is None else [begun]
    return expanded, ordered


def places_of(medium: Given) -> list[tuple[int, Given | None]]:
    """For each vision token of a picture or video, the number of its features; with the first, the medium itself."""
    first, *others = token_counts(medium)
    return [(first, medium), *((count, None) for count in others)]
