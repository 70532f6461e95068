"""Tokenizers: a checkpoint's `tokenizer.json` or `tokenizer.model`, with exactly the official token ids."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, pre_tokenizers

from ..models.config import read_json_object
from ..models.config.settings import FLAG, JSON_OBJECT, TOKEN_ID, Either, MapOf, Text, checked, or_null, prefixed, require

SPECIAL_TOKENS = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
SETTINGS = {**dict.fromkeys(SPECIAL_TOKENS, or_null(Either(Text(), JSON_OBJECT))), "legacy": or_null(FLAG)}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands for a byte that belongs to no character
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# How LLaMA's tokenizer.json turns tokens back into text.
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
# Protocol buffers that follow each other are merged: these bytes set add_dummy_prefix of a model's normalizer_spec to false.
WITHOUT_PREFIX = b"\x1a\x02\x18\x00"


class RewrittenTokenizer(UserWarning):
    """A `tokenizer.json` in transformers 5's form stands alone; its token ids may not be those of the training."""


class Tokenizer(Protocol):
    """What the package asks of a tokenizer; `len()` counts its tokens, the added ones included.

    `decode` of a longer answer continues the text of a shorter one: only replacement characters at the end may become others.
    """

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
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in added.items() if token.special}
        self.has_byte_tokens = tokenizer.decoder is not None and b"ByteFallback" in tokenizer.decoder.__getstate__()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        if not self.has_byte_tokens:
            return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        tokens = [self.tokenizer.id_to_token(token_id) for token_id in token_ids if token_id not in self.special_ids]
        return self.tokenizer.decoder.decode(list(mend_bytes(token for token in tokens if token is not None)))

    def token_to_id(self, token: str) -> int | None:
        return self.tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)


def mend_bytes(tokens: Iterator[str]) -> Iterator[str]:
    """Put a replacement character for each byte token that is part of no character, and leave the other tokens as they are.

    `tokenizers` would replace the whole run of bytes around it, finished characters included.
    """
    for is_bytes, run in groupby(tokens, key=lambda token: BYTE_TOKEN.fullmatch(token) is not None):
        members = list(run)
        yield from split_characters(members) if is_bytes else members


def split_characters(tokens: list[str]) -> Iterator[str]:
    """Byte tokens of whole characters, and a replacement character for each other byte."""
    while tokens:
        try:
            bytes(int(token[3:5], 16) for token in tokens).decode("utf-8")
        except UnicodeDecodeError as error:
            yield from [*tokens[: error.start], REPLACEMENT]
            tokens = tokens[error.start + 1 :]
        else:
            yield from tokens
            return


class SentencePieceTokenizer:
    """A LLaMA `tokenizer.model`, with the same ids as its `tokenizer.json`.

    Args:
        model: content of the file.
        added_tokens: new tokens and their ids.
        vision_tokens: those of them that stand for pictures and videos. The original code encodes what follows one of them as
            a text of its own, with a space before its first word.
        legacy: whether that space is put after the other special tokens too.
    """

    def __init__(
        self, model: bytes, added_tokens: dict[str, int], vision_tokens: Collection[str] = (), legacy: bool = True
    ) -> None:
        self.processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX)
        self.added_tokens, self.vision_tokens, self.legacy = added_tokens, frozenset(vision_tokens), legacy
        self.bos_token_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_token_id = processor.eos_id() if processor.eos_id() >= 0 else None
        ids = range(processor.get_piece_size())
        special_ids = [token_id for token_id in ids if processor.is_control(token_id) or processor.is_unknown(token_id)]
        self.special_tokens = {processor.id_to_piece(token_id): token_id for token_id in special_ids} | added_tokens
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        token_ids = [] if self.bos_token_id is None else [self.bos_token_id]
        processor = self.processor
        for run in self.special_pattern.split(text):
            if (special_id := self.special_tokens.get(run)) is None:
                token_ids += processor.encode(run)
            else:
                token_ids.append(special_id)
                processor = self.processor if self.legacy or run in self.vision_tokens else self.without_prefix
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        # Added tokens lie behind the model's own pieces, and padded rows behind those.
        size, special = self.processor.get_piece_size(), set(self.special_tokens.values())
        return self.processor.decode([token_id for token_id in token_ids if token_id < size and token_id not in special])

    def token_to_id(self, token: str) -> int | None:
        if token in self.special_tokens:
            return self.special_tokens[token]
        token_id = self.processor.piece_to_id(token)
        return None if self.processor.is_unknown(token_id) else token_id

    def __len__(self) -> int:
        size = self.processor.get_piece_size()
        return size + sum(token_id >= size for token_id in self.added_tokens.values())


def load_tokenizer(folder: str | Path, vision_tokens: Mapping[str, int] | None = MappingProxyType({})) -> Tokenizer:
    """Load a checkpoint folder's tokenizer: `tokenizer.json`, or `tokenizer.model` where that is all there is.

    `tokenizer.model` also comes first beside a `tokenizer.json` that transformers 5 has rewritten, which forgets the space
    after every `<image>`; without it, such a file is used with a RewrittenTokenizer warning. `vision_tokens`: the config's
    name and id of each token that stands for vision features; a folder that does not know them (the original LLaVA's) gets
    them at these ids; None is for a model of text alone. Raises FileNotFoundError where neither file is there, and ValueError
    for a broken file, or for a token whose id is unknown, taken, or another one than given.
    """
    folder = Path(folder)
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    if json_file.is_file():
        tokenizer: Tokenizer = _load_json(json_file, vision_tokens)
    elif model_file.is_file():
        tokenizer = _load_sentencepiece(model_file, vision_tokens)
    else:
        raise FileNotFoundError(f"no tokenizer in {str(folder)!r}: looked for {json_file.name} and {model_file.name}")
    for token, token_id in (vision_tokens or {}).items():
        if tokenizer.token_to_id(token) != token_id:
            known_id = tokenizer.token_to_id(token)
            raise ValueError(f"{folder}: {token} is token {known_id}, but the model's config says {token_id}")
    return tokenizer


def _load_json(path: Path, vision_tokens: Mapping[str, int] | None) -> Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # The library raises a bare Exception for every kind of damage.
    except Exception as error:
        raise ValueError(f"cannot read {path} as a tokenizer: {error}") from error
    if vision_tokens is not None and _is_rewritten(tokenizer):
        if (model_file := path.with_name("tokenizer.model")).is_file():
            return _load_sentencepiece(model_file, vision_tokens, _added_tokens(tokenizer))
        warnings.warn(
            f"{path} has the form that transformers 5 writes: no space follows a special token such "
            "as <image>. If the model was trained with LLaMA's own tokenizer, put its tokenizer.model beside this file",
            RewrittenTokenizer,
            stacklevel=3,
        )
    ids = vision_tokens or {}
    absent = [token for token in ids if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(sorted(absent, key=ids.__getitem__))
    return JsonTokenizer(tokenizer, *_named_specials(path.parent, tokenizer))


def _is_rewritten(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether this is LLaMA's tokenizer with a space before the first word of the text alone, as transformers 5 saves it."""
    pre_tokenizer = tokenizer.pre_tokenizer
    is_metaspace = isinstance(pre_tokenizer, pre_tokenizers.Metaspace)
    return is_metaspace and tokenizer.normalizer is None and pre_tokenizer.prepend_scheme == "first"


def _added_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The special tokens as texts, and `legacy`, as `special_tokens_map.json` and `tokenizer_config.json` name them.

    Raises ValueError for a token that is neither a text, an object with the text as its `content`, nor null for none.
    """
    settings: dict[str, Any] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if file.is_file():
            with prefixed(f"{file}: "):
                settings |= checked(read_json_object(file), SETTINGS)
                for name in SPECIAL_TOKENS & settings.keys():
                    settings[name] = _text_of(name, settings[name])
    return settings


def _text_of(name: str, token: Any) -> str | None:
    if isinstance(token, dict):
        require(f"{name}.content", token.get("content"), Text())
        return token["content"]
    return token


def _named_specials(folder: Path, tokenizer: tokenizers.Tokenizer) -> tuple[str | None, str | None]:
    """The BOS and EOS tokens that the folder names; LLaMA's own where it names none and the tokenizer has them."""
    named = tokenizer_settings(folder)
    special = {added.content for added in tokenizer.get_added_tokens_decoder().values() if added.special}
    defaults = {name: token for name, token in (("bos_token", "<s>"), ("eos_token", "</s>")) if token in special}
    return named.get("bos_token", defaults.get("bos_token")), named.get("eos_token", defaults.get("eos_token"))


def _load_sentencepiece(
    path: Path, vision_tokens: Mapping[str, int] | None, other_tokens: Mapping[str, int] = MappingProxyType({})
) -> SentencePieceTokenizer:
    legacy = tokenizer_settings(path.parent).get("legacy")
    added_tokens = {**(vision_tokens or {}), **_read_added_tokens(path.with_name("added_tokens.json"))}
    try:
        model = path.read_bytes()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
    # The library raises OSError or RuntimeError, depending on how the file is broken.
    except RuntimeError as error:
        raise ValueError(f"cannot read {path} as a sentencepiece model: {error}") from error
    if processor is None:
        raise ValueError(f"cannot read {path} as a sentencepiece model: it is empty")
    own = range(processor.get_piece_size())
    added_tokens |= {token: token_id for token, token_id in other_tokens.items() if token_id not in own}
    if vision_tokens is not None and not vision_tokens and "<image>" not in added_tokens:
        raise ValueError(f"{path} does not know <image>; pass the config's vision_tokens")
    _check_added_tokens(path, processor, added_tokens)
    spaced = () if vision_tokens is None else vision_tokens or ("<image>",)
    return SentencePieceTokenizer(model, added_tokens, spaced, legacy is not False)


def _read_added_tokens(path: Path) -> dict[str, int]:
    tokens = read_json_object(path) if path.is_file() else {}
    require(f"{path}: the file", tokens, MapOf(TOKEN_ID))
    return tokens


def _check_added_tokens(path: Path, processor: sentencepiece.SentencePieceProcessor, added_tokens: dict[str, int]) -> None:
    for token, token_id in added_tokens.items():
        taken = processor.id_to_piece(token_id) if 0 <= token_id < processor.get_piece_size() else None
        if token_id < 0 or taken not in (None, token):
            raise ValueError(
                f"{path}: token id {token_id} cannot stand for {token}: ids 0 to {processor.get_piece_size() - 1} are the "
                f"tokenizer's own{'' if taken is None else f' (it is {taken!r})'}; use a larger one"
            )
