"""A document of lmms-eval becomes a request, and the generation arguments of its task a way of decoding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...inference import Sampling
from ...processing.prompts import PICTURE_SUFFIXES, Medium, Request
from ...tasks.base import before_stops
from ...tasks.rows import decode_picture
from ...tasks.video_files import frames_in

# A piece of a document: text, or a picture or video with its source (a file, a PIL picture, a list of frames).
Piece = str | tuple[Medium, Any]

DEFAULT_MAX_NEW_TOKENS = 1024  # of a task that names none, as LLaVA's own class in lmms-eval (models/simple/llava.py)
DEFAULT_STOP = "\n\n"  # lmms-eval adds it to tasks that name no stop string
WITHOUT_EFFECT = ("image_aspect_ratio",)  # tasks set it for the class of lmms-eval that is called "llava"


def simple_pieces(visuals: Any, text: str) -> list[Piece]:
    """The pieces of a document of the simple interface: what its doc_to_visual gives, then its text."""
    listed = [] if visuals is None else visuals if isinstance(visuals, list | tuple) else [visuals]
    return [*(visual_piece(visual) for visual in listed if visual is not None), text]


def chat_pieces(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """The pieces of a document of the chat interface: one message of the user, with system messages before its words.

    Raises ValueError for a conversation of several turns, and for what is neither text nor picture nor video.
    """
    *before, last = [message["role"] for message in messages] or [""]
    if last != "user" or set(before) - {"system"}:
        roles = ", ".join(message["role"] for message in messages) or "no message"
        raise ValueError(f"a document must ask one question, as one message of the user, not: {roles}")
    *system, pieces = [message_pieces(message["content"]) for message in messages]
    start = next((index for index, piece in enumerate(pieces) if isinstance(piece, str)), len(pieces))
    pieces[start:start] = [piece for own in system for piece in (*own, "\n")]
    return pieces


def message_pieces(content: str | Sequence[Mapping[str, Any]]) -> list[Piece]:
    return [content] if isinstance(content, str) else [content_piece(item) for item in content]


def content_piece(item: Mapping[str, Any]) -> Piece:
    """One item of a message: {"type": "text", "text": ...}, or {"type": "image" or "video", "url": ...}."""
    kind = item["type"]
    if kind == "text":
        return str(item["text"])
    source = item["url"]
    if kind == "video" and (item.get("start_time") is not None or item.get("end_time") is not None):
        raise ValueError(f"only whole videos are read, not a part of one: {dict(item)}")
    if kind == "image":
        return Medium.IMAGE, picture_source(source)
    # lmms-eval takes every .webm file for sound.
    if kind == "video" or (kind == "audio" and isinstance(source, str) and source.lower().endswith(".webm")):
        return Medium.VIDEO, video_source(source)
    raise ValueError(f"a document holds {kind}, which no model here takes; they take pictures, videos and text")


def visual_piece(visual: Any) -> Piece:
    """A picture or video as doc_to_visual gives it: a picture, a file, a folder of frames, or a list of frames."""
    is_path = isinstance(visual, str | Path)
    is_picture = Path(visual).suffix.lower() in PICTURE_SUFFIXES if is_path else not isinstance(visual, list | tuple)
    if is_path and Path(visual).is_dir():
        is_picture = False
    return (Medium.IMAGE, picture_source(visual)) if is_picture else (Medium.VIDEO, video_source(visual))


def picture_source(source: Any) -> Any:
    """What a request takes as a picture: a file, or a PIL picture; one that the data set has left undecoded is decoded."""
    if isinstance(source, str | Path | Image.Image):
        return source
    if isinstance(source, Mapping) and "bytes" not in source:
        kind = f"a dictionary with {', '.join(map(str, source))}"
        raise ValueError(f"{kind} is no picture, and no whole video; the models here take pictures, videos and text")
    return decode_picture(source, "a picture of the document")


def video_source(source: Any) -> Any:
    """What a request takes as a video: a file, or a list of frames; of a folder the pictures in it, by name."""
    if isinstance(source, Mapping):
        raise ValueError(f"only whole videos are read, as a file, not {dict(source)}")
    if isinstance(source, str | Path) and Path(source).is_dir():
        return frames_in(Path(source))
    return list(source) if isinstance(source, tuple) else source


def request_of(pieces: Sequence[Piece]) -> Request:
    """A request with the pieces in their order.

    Where all pictures, then all videos, come before the text, the model's own template places them, unless the text has just as
    many `<image>` (or `<video>`) as there are pictures (or videos): then it says where they stand. Any other `<image>` and
    `<video>` in the text is removed: a model would take it for one more picture.
    """
    media = [piece for piece in pieces if not isinstance(piece, str)]
    sources = {kind: tuple(source for own, source in media if own is kind) for kind in Medium}
    order = [list(Medium).index(piece[0]) if not isinstance(piece, str) else len(Medium) for piece in pieces]
    if order == sorted(order):
        whole = "".join(piece for piece in pieces if isinstance(piece, str))
        text = without_marks(whole, [kind for kind in Medium if whole.count(kind.value) != len(sources[kind])])
        text = whole if text == whole else text.strip()
    else:
        text = "".join(piece[0].value if not isinstance(piece, str) else without_marks(piece, Medium) for piece in pieces)
    images, videos = sources[Medium.IMAGE], sources[Medium.VIDEO]
    return Request(text=text, images=images, video=videos[0] if len(videos) == 1 else videos or None)


def without_marks(text: str, kinds: Iterable[Medium]) -> str:
    """The text without the placeholders of these media."""
    for kind in kinds:
        text = text.replace(kind.value, "")
    return text


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded: greedily where `temperature` is 0. The text ends before the first string of `until`."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def sampling(self, seed: int) -> Sampling:
        """`seed` of this batch; raises ValueError for a temperature or top_p out of range."""
        return Sampling(self.temperature, self.top_p, (self.seed or 0) + seed)

    def has_stopped(self, text: str) -> bool:
        """Whether a stop string follows the white space that a text may begin with."""
        return any(stop in text.lstrip() for stop in self.until)

    def cut(self, text: str) -> str:
        """The text before the first stop string, without white space at its ends."""
        return before_stops(text.lstrip(), self.until)


def decoding_of(given: Mapping[str, Any]) -> Decoding:
    """The generation arguments of a task, updated by `--gen_kwargs`; None, which YAML writes as None too, is no value.

    Answers are sampled where a temperature is given, unless do_sample is false; and with temperature 1 where only do_sample is
    true. Raises ValueError for an argument that is unknown or cannot be honoured.
    """
    named = {name: value for name, value in given.items() if value not in (None, "None") and name not in WITHOUT_EFFECT}
    do_sample = named.pop("do_sample", None)
    temperature = float(named.pop("temperature", 1.0 if do_sample else 0.0))
    temperature = 0.0 if do_sample is False else temperature
    top_p, top_k = named.pop("top_p", 1.0), named.pop("top_k", 0)
    if temperature > 0 and top_k not in (0, -1):
        raise ValueError(f"gen_kwargs: top_k={top_k} is not offered; sample with temperature and top_p, or greedily")
    if (beams := named.pop("num_beams", 1)) != 1:
        raise ValueError(f"gen_kwargs: num_beams={beams} is not offered; leave it out, or set num_beams=1")
    limits = {name: whole_number(name, named.pop(name)) for name in ("max_new_tokens", "seed") if name in named}
    until = stop_strings(named.pop("until", ()))
    if named:
        known = "max_new_tokens, until, do_sample, temperature, top_p, seed"
        raise ValueError(f"gen_kwargs: unknown {', '.join(map(repr, named))}; the models here know {known}")
    return Decoding(**limits, until=until, temperature=temperature, top_p=float(top_p) if temperature > 0 else 1.0)


def whole_number(name: str, value: Any) -> int:
    smallest = 0 if name == "seed" else 1
    whole = (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
    if not whole or value < smallest:
        raise ValueError(f"gen_kwargs: {name}={value!r} must be a whole number of at least {smallest}")
    return int(value)


def stop_strings(given: Any) -> tuple[str, ...]:
    """One string or several. The one that lmms-eval adds to every task without its own is left out, as by its Qwen2.5-VL."""
    listed = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(stop, str) for stop in listed):
        raise ValueError(f"gen_kwargs: until={given!r} must be a string or a list of strings")
    return tuple(stop for stop in listed if stop and stop != DEFAULT_STOP)
