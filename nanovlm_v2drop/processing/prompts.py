"""Questions to token ids: requests, chat templates and tokenizers, exactly as the official files say.

A `Request` becomes a prompt (`build_prompt`), and a prompt becomes ids in which every picture and video has as many tokens
as the tower will give it features (`encode_prompt`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import sentencepiece
import tokenizers
from PIL.Image import Image
from tokenizers import decoders

from ..models.config import read_json_object
from ..models.config.settings import JSON_OBJECT, TOKEN_ID, Either, MapOf, Text, checked, or_null, prefixed, require
from .video import VideoSource

IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"  # how a request marks where its pictures and its video stand
QWEN_SYSTEM = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Request:
    """One question about pictures or a video.

    `text` is what the user asks, with `<image>` where each picture and `<video>` where the video stands, or without: then
    they come first, pictures before the video. `prompt` is given in its place by a caller who has applied a chat template
    already, with the model's own tokens. `video` is a file, or a list of frames. Raises ValueError unless exactly one of
    text and prompt is given.
    """

    text: str | None = None
    images: Sequence[str | Path | Image] = ()
    video: VideoSource | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.prompt is None):
            given = "both" if self.text is not None else "neither"
            raise ValueError(f"a request takes either text or an already templated prompt, got {given}")
        match self.images:
            case [*_]:
                pass
            case _:
                kind = type(self.images).__name__
                raise ValueError(f"images must be a list of pictures, got {kind}; wrap a single picture in a list")


def vicuna_v1(text: str) -> str:
    """The original LLaVA-1.5's conversation (`conv_vicuna_v1`), with which the papers evaluate."""
    return f"{VICUNA_SYSTEM} USER: {text} ASSISTANT:"


def hub(text: str) -> str:
    """The chat template stored beside llava-hf's checkpoints, which has no system sentence."""
    return f"USER: {text} ASSISTANT:"


def qwen_1_5(text: str) -> str:
    """Qwen2's conversation with its system sentence, as the original LLaVA-OneVision and Qwen2-VL are asked."""
    return f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n{qwen_hub(text)}"


def qwen_hub(text: str) -> str:
    """The chat template stored beside llava-hf's LLaVA-OneVision, which has no system turn."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Template:
    """A conversation, and how a picture or video is written in it; one that has no place in the text ends with `separator`."""

    wrap: Callable[[str], str]
    image: str = IMAGE_TOKEN
    video: str = VIDEO_TOKEN
    separator: str = "\n"

    def __call__(self, text: str) -> str:
        """`text` in a conversation, its placeholders written as the model reads them."""
        return self.wrap(text.replace(IMAGE_TOKEN, self.image).replace(VIDEO_TOKEN, self.video))


DEFAULT_TEMPLATE = "vicuna_v1"
# How LLaMA's tokenizer.json turns tokens back into text.
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
TEMPLATES: dict[str, Template] = {
    "vicuna_v1": Template(vicuna_v1),
    "hub": Template(hub),
    "qwen_1_5": Template(qwen_1_5),
    "qwen_hub": Template(qwen_hub),
    "qwen2_vl": Template(
        qwen_1_5, "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", ""
    ),
}


def build_prompt(request: Request, template: str = DEFAULT_TEMPLATE) -> str:
    """Write the string that the model reads; `request.prompt` is returned as it is.

    Raises ValueError for an unknown template, a blank text or prompt, and for a text that has `<image>` or `<video>` in it,
    but not once per picture or video.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; choose one of: {', '.join(sorted(TEMPLATES))}")
    question = request.prompt or request.text or ""
    if not question.strip():
        raise ValueError(f"the request is blank ({question!r}); give it a text to answer")
    if request.prompt is not None:
        return request.prompt
    separator = TEMPLATES[template].separator
    with_video = _place_media(question, VIDEO_TOKEN, int(request.video is not None), "videos", separator)
    return TEMPLATES[template](_place_media(with_video, IMAGE_TOKEN, len(request.images), "pictures", separator))


def _place_media(text: str, token: str, count: int, what: str, separator: str) -> str:
    placeholders = text.count(token)
    if placeholders == 0:
        return f"{token}{separator}" * count + text
    if placeholders != count:
        raise ValueError(
            f"the text has {placeholders} {token} but {count} {what} are given; write one {token} for each, or none to put "
            "them first"
        )
    return text


class Tokenizer(Protocol):
    """What the package asks of a tokenizer; `len()` counts its tokens, the added ones included."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the beginning-of-sequence token where the checkpoint uses one."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens, and the ids of padded embedding rows, are left out."""

    def token_to_id(self, token: str) -> int | None:
        """The id of one token as spelled in the vocabulary, or None where there is no such token."""

    def __len__(self) -> int: ...


class JsonTokenizer:
    """A `tokenizer.json`, followed to the letter: `tokenizer_config.json`'s `legacy` would change LLaVA-1.5's ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos_token: str | None, eos_token: str | None) -> None:
        self.tokenizer = tokenizer
        # Files may carry the cutting and padding of a training run.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.bos_token_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else tokenizer.token_to_id(eos_token)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


class SentencePieceTokenizer:
    """A LLaMA `tokenizer.model` with the same ids as its `tokenizer.json`; `added_tokens` maps new tokens to ids."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, added_tokens: dict[str, int]) -> None:
        self.processor = processor
        self.added_tokens = added_tokens
        self.bos_token_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_token_id = processor.eos_id() if processor.eos_id() >= 0 else None
        ids = range(processor.get_piece_size())
        special_ids = [token_id for token_id in ids if processor.is_control(token_id) or processor.is_unknown(token_id)]
        self.special_tokens = {processor.id_to_piece(token_id): token_id for token_id in special_ids} | added_tokens
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        token_ids = [] if self.bos_token_id is None else [self.bos_token_id]
        # Each run is encoded by itself: so a "▁" comes before the first word after a special token too, as in training.
        for run in self.special_pattern.split(text):
            special_id = self.special_tokens.get(run)
            token_ids += self.processor.encode(run) if special_id is None else [special_id]
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        # Added tokens lie behind the model's own pieces, and padded rows behind those.
        own_ids = [token_id for token_id in token_ids if token_id < self.processor.get_piece_size()]
        tokens = [self.processor.id_to_piece(token_id) for token_id in own_ids]
        return LLAMA_DECODER.decode([token for token in tokens if token not in self.special_tokens])

    def token_to_id(self, token: str) -> int | None:
        if token in self.special_tokens:
            return self.special_tokens[token]
        token_id = self.processor.piece_to_id(token)
        return None if self.processor.is_unknown(token_id) else token_id

    def __len__(self) -> int:
        return self.processor.get_piece_size() + sum(
            token_id >= self.processor.get_piece_size() for token_id in self.added_tokens.values()
        )


def load_tokenizer(folder: str | Path, vision_tokens: Mapping[str, int] = MappingProxyType({})) -> Tokenizer:
    """Load a checkpoint folder's tokenizer: `tokenizer.json`, or `tokenizer.model` where that is all there is.

    `vision_tokens`: the config's name and id of each token that stands for vision features; a folder that does not know them
    (the original LLaVA's) gets them at these ids. Raises FileNotFoundError where neither file is there, and ValueError for
    a broken file, or for a token whose id is unknown, taken, or another one than given.
    """
    folder = Path(folder)
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file():
        tokenizer: Tokenizer = _load_json(json_file, vision_tokens)
    elif model_file.is_file():
        tokenizer = _load_sentencepiece(model_file, vision_tokens)
    else:
        raise FileNotFoundError(f"no tokenizer in {str(folder)!r}: looked for {json_file.name} and {model_file.name}")
    for token, token_id in vision_tokens.items():
        if tokenizer.token_to_id(token) != token_id:
            known_id = tokenizer.token_to_id(token)
            raise ValueError(f"{folder}: {token} is token {known_id}, but the model's config says {token_id}")
    return tokenizer


def _load_json(path: Path, vision_tokens: Mapping[str, int]) -> JsonTokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # The library raises a bare Exception for every kind of damage.
    except Exception as error:
        raise ValueError(f"cannot read {path} as a tokenizer: {error}") from error
    absent = [token for token in vision_tokens if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(sorted(absent, key=vision_tokens.__getitem__))
    return JsonTokenizer(tokenizer, *_named_specials(path.parent, tokenizer))


def _named_specials(folder: Path, tokenizer: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The BOS and EOS tokens that the folder names; LLaMA's own where it names none and the tokenizer has them."""
    named: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        named |= _read_specials(folder / name) if (folder / name).is_file() else {}
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    tokens = []
    for name, llama_token in (("bos_token", "<s>"), ("eos_token", "</s>")):
        tokens.append(named.get(name, llama_token if llama_token in special else None))
    return tokens[0], tokens[1]


def _read_specials(file: Path) -> dict[str, str | None]:
    """The BOS and EOS tokens that one file names: a text, an object with the text as its `content`, or null for none."""
    raw = read_json_object(file)
    with prefixed(f"{file}: "):
        named = checked(raw, dict.fromkeys(("bos_token", "eos_token"), or_null(Either(Text(), JSON_OBJECT))))
        for name, token in named.items():
            if isinstance(token, dict):
                require(f"{name}.content", token.get("content"), Text())
                named[name] = token["content"]
    return named


def _load_sentencepiece(path: Path, vision_tokens: Mapping[str, int]) -> SentencePieceTokenizer:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load(str(path))
    # The library raises OSError or RuntimeError, depending on how the file is broken.
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot read {path} as a sentencepiece model: {error}") from error
    added_file = path.parent / "added_tokens.json"
    own_tokens = read_json_object(added_file) if added_file.is_file() else {}
    require(f"{added_file}: the file", own_tokens, MapOf(TOKEN_ID))
    added_tokens = {**vision_tokens, **own_tokens}
    if IMAGE_TOKEN not in added_tokens:
        raise ValueError(f"{path} does not know {IMAGE_TOKEN}; pass the config's vision_tokens")
    _check_added_tokens(processor, added_tokens)
    return SentencePieceTokenizer(processor, added_tokens)


def _check_added_tokens(processor: sentencepiece.SentencePieceProcessor, added_tokens: dict[str, int]) -> None:
    for token, token_id in added_tokens.items():
        taken = processor.id_to_piece(token_id) if 0 <= token_id < processor.get_piece_size() else None
        if token_id < 0 or taken not in (None, token):
            raise ValueError(
                f"token id {token_id} cannot stand for {token}: ids 0 to {processor.get_piece_size() - 1} are the "
                f"tokenizer's own{'' if taken is None else f' (it is {taken!r})'}; use a larger one"
            )


class Counted(Protocol):
    """A picture or video whose tokens are counted, decoded (VisionInput) or not yet (PlannedMedium)."""

    @property
    def num_tokens(self) -> int: ...


Medium = TypeVar("Medium", bound=Counted)


def encode_prompt(tokenizer: Tokenizer, prompt: str, media: Mapping[int, Sequence[Medium]]) -> tuple[list[int], list[Medium]]:
    """Token ids of a prompt in which each picture's or video's token stands once per feature, and the media in that order.

    `media`: for each vision token's id the pictures or videos that its occurrences stand for, in order.
    Raises ValueError where the prompt has more or fewer of a token than there are pictures or videos.
    """
    token_ids = tokenizer.encode(prompt)
    for token_id, given in media.items():
        if (placeholders := token_ids.count(token_id)) != len(given):
            raise ValueError(
                f"the prompt has {placeholders} image or video tokens (id {token_id}) but {len(given)} pictures or videos are "
                "given for it; write one for each, and check that the tokenizer knows the token"
            )
    queues = {token_id: iter(given) for token_id, given in media.items()}
    expanded: list[int] = []
    ordered: list[Medium] = []
    for token_id in token_ids:
        if token_id in queues:
            ordered.append(next(queues[token_id]))
        expanded += [token_id] * (ordered[-1].num_tokens if token_id in queues else 1)
    return expanded, ordered
