"""What the configurations of all families have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from .settings import (
    FLAG,
    JSON_OBJECT,
    TOKEN_ID,
    TOKEN_IDS,
    Checked,
    Kind,
    ListOf,
    OneOf,
    TokenId,
    checked,
    from_fields,
    or_null,
    prefixed,
    read_json_object,
    require,
)
from .text import LANGUAGE_MODEL_TYPES, TEXT_MODEL_TYPES, TextConfig, text_settings

NANOVLM = "nanovlm"  # the only family whose files name no model_type
EXPERTS = ("qwen3_vl_moe",)  # Qwen3-VL-30B-A3B and -235B-A22B
VISION_TOKEN_SETTINGS = ("image_token_index", "image_token_id", "video_token_index", "video_token_id")


@dataclass(frozen=True)
class VLMConfig(Checked):
    """What every family has: a decoder, and the tokens that stand where vision features go.

    A family is a subclass in a file of its own, imported by this folder's __init__. It says what its config.json may hold in
    `settings`, and what it makes of that in `own_fields`.
    """

    model_types: ClassVar[tuple[str, ...]] = ()  # the family's names in config.json
    text_model_type: ClassVar[str] = "llama"  # that of a text section that names none
    vision_token_names: ClassVar[tuple[str, ...]] = ("<image>", "<video>")  # as the tokenizer spells them
    text_config: TextConfig = field(default_factory=TextConfig)
    image_token_id: TokenId = 32000
    video_token_id: Annotated[int | None, or_null(TOKEN_ID)] = None
    eos_token_ids: Annotated[tuple[int, ...], ListOf(TOKEN_ID, 1, 64)] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_config.head_dim % 2:
            raise ValueError(f"text_config.head_dim {self.text_config.head_dim} must be even: its values are rotated in pairs")

    @property
    def vision_tokens(self) -> dict[str, int]:
        """Name and id of each token that stands where vision features go."""
        ids = (self.image_token_id, self.video_token_id)
        return {name: token for name, token in zip(self.vision_token_names, ids, strict=True) if token is not None}

    @property
    def takes_video(self) -> bool:
        """Whether a request may hold a video."""
        return self.video_token_id is not None

    @property
    def marks(self) -> dict[str, int]:
        """How a prompt marks the place of a picture, and that of a video where the model takes one.

        Each mark comes with the token of the features. Without a token of its own, a video is written with that of pictures.
        """
        video = self.image_token_id if self.video_token_id is None else self.video_token_id
        return dict(zip(self.vision_token_names[: 1 + self.takes_video], (self.image_token_id, video), strict=False))

    @property
    def added_tokens(self) -> dict[str, int]:
        """Name and id of each token that is added to a tokenizer which lacks it."""
        return self.vision_tokens

    @classmethod
    def families(cls) -> dict[str, type["VLMConfig"]]:
        """The families that are imported, by each `model_type` of theirs."""
        own = dict.fromkeys(cls.model_types, cls)
        for family in cls.__subclasses__():
            own |= family.families()
        return own

    @classmethod
    def from_folder(cls, folder: Path) -> "VLMConfig":
        """Read `config.json` (and `generation_config.json` where there is one) of an official checkpoint.

        Raises FileNotFoundError without a config.json, and ValueError, with the file and the setting, for a model type or
        setting that is not implemented or cannot be right.
        """
        path, generation = folder / "config.json", folder / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no config.json; is it a checkpoint folder?")
        raw, ends = read_json_object(path), read_json_object(generation) if generation.is_file() else {}
        with prefixed(f"{path}: "):
            config = family_of(raw).read(raw)
        eos_token_id = ends.get("eos_token_id")
        with prefixed(f"{path if eos_token_id is None else generation}: "):
            return config.ending_at(eos_token_id)

    @classmethod
    def from_official(cls, raw: Mapping[str, Any], eos_token_id: int | Sequence[int] | None = None) -> "VLMConfig":
        """From the parsed config.json of any known family, and the `eos_token_id` of a generation_config.json."""
        return family_of(raw).read(raw).ending_at(eos_token_id)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "VLMConfig":
        """From the parsed config.json of this family; the decoder's settings are in `text_config`, or beside the others."""
        given = checked(raw, {"text_config": JSON_OBJECT, "tie_word_embeddings": FLAG, **cls.settings()})
        prefix = "text_config." if "text_config" in given else ""
        own_type = {"model_type": cls.text_model_type}
        text = text_settings({**own_type, **given["text_config"]} if prefix else {**raw, **own_type}, prefix)
        # As in transformers 5: the outer setting ties, the inner one too.
        text["tie_word_embeddings"] = bool(given.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        config = cls(
            text_config=from_fields(TextConfig, text, prefix),
            eos_token_ids=as_ids(text["eos_token_id"]),
            **cls.own_fields(given),
        )
        config.check_vision_tokens(given)
        return config

    def ending_at(self, eos_token_id: int | Sequence[int] | None) -> "VLMConfig":
        """The same with the end tokens of a generation_config.json, which go before those of config.json; None has none."""
        ends = self.eos_token_ids
        if eos_token_id is not None:
            ends = as_ids(eos_token_id)
        if eos_token_id is not None or ends != TEXT_MODEL_TYPES[self.text_model_type]["eos_token_id"]:
            for token in ends:
                require_in_vocabulary("eos_token_id", token, self.text_config)
        return replace(self, eos_token_ids=ends)

    def check_vision_tokens(self, given: Mapping[str, Any]) -> None:
        """Raise ValueError for a vision token that config.json names and that has no embedding, or that stands for both."""
        # A file that names none is an original LLaVA's: its <image> has no embedding, and needs none.
        for name in VISION_TOKEN_SETTINGS:
            if given.get(name) is not None:
                require_in_vocabulary(name, given[name], self.text_config)
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image and video token have the same id {self.image_token_id}; correct one of them")

    @classmethod
    def settings(cls) -> dict[str, Kind]:
        """The kinds of what this family reads from its config.json, besides the decoder's settings."""
        raise NotImplementedError(f"{cls.__name__} is not a family")

    @classmethod
    def own_fields(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this family, from its checked settings."""
        raise NotImplementedError(f"{cls.__name__} is not a family")


def family_of(raw: Mapping[str, Any]) -> type[VLMConfig]:
    """The family that the `model_type` of a config.json names; raises ValueError for an unknown one."""
    families = VLMConfig.families()
    if raw.get("model_type") in EXPERTS:
        raise ValueError(
            f"model_type {raw['model_type']} is a mixture of experts, which is not supported; take one of the dense Qwen3-VL "
            "models: 2B, 4B, 8B or 32B"
        )
    unnamed = NANOVLM if "model_type" not in raw and "vit_hidden_dim" in raw else None
    model_type = raw.get("model_type", unnamed)
    if isinstance(model_type, str) and model_type in LANGUAGE_MODEL_TYPES and model_type not in families:
        raise ValueError(f"model_type {model_type!r} is a decoder alone: load_decoder(...) reads it")
    require("model_type", model_type, OneOf(*families))
    return families[model_type]


def as_ids(eos_token_id: Any) -> tuple[int, ...]:
    """One token id or several, as a tuple; raises ValueError for anything else."""
    require("eos_token_id", eos_token_id, TOKEN_IDS)
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def require_in_vocabulary(name: str, token: int, text_config: TextConfig) -> None:
    """Raise ValueError for a token that the decoder has no row for."""
    if token >= text_config.vocab_size:
        raise ValueError(f"{name} {token} is outside the vocabulary: vocab_size is {text_config.vocab_size}")
