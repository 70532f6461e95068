"""A text checkpoint's config.json: a LLaMA, Qwen2 or Qwen3 decoder with nothing before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .settings import TOKEN_ID, Checked, ListOf, OneOf, from_fields, prefixed, read_json_object, require
from .text import LANGUAGE_MODEL_TYPES, TextConfig, text_settings
from .vlm import NANOVLM, VLMConfig, as_ids, require_in_vocabulary


@dataclass(frozen=True)
class LanguageModelConfig(Checked):
    """The decoder's sizes, and the tokens that end an answer."""

    text_config: TextConfig = field(default_factory=TextConfig)
    eos_token_ids: Annotated[tuple[int, ...], ListOf(TOKEN_ID, 1, 64)] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_config.head_dim % 2:
            raise ValueError(f"head_dim {self.text_config.head_dim} must be even: its values are rotated in pairs")

    @classmethod
    def from_folder(cls, folder: Path) -> "LanguageModelConfig":
        """Read `config.json` (and `generation_config.json` where there is one) of a text checkpoint.

        Raises FileNotFoundError without a config.json, and ValueError, with the file and the setting, for a vision-language
        model, for an unknown model type, and for a setting that is not implemented or cannot be right.
        """
        path, generation = folder / "config.json", folder / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no config.json; is it a checkpoint folder?")
        raw, ends = read_json_object(path), read_json_object(generation) if generation.is_file() else {}
        with prefixed(f"{path}: "):
            text_config, eos_token_id = read_text_model(raw)
        with prefixed(f"{path if ends.get('eos_token_id') is None else generation}: "):
            named = ends.get("eos_token_id", raw.get("eos_token_id"))
            ends_of_answer = as_ids(eos_token_id if ends.get("eos_token_id") is None else ends["eos_token_id"])
            for token in ends_of_answer if named is not None else ():
                require_in_vocabulary("eos_token_id", token, text_config)
            return cls(text_config, ends_of_answer)


def read_text_model(raw: Mapping[str, Any]) -> tuple[TextConfig, Any]:
    """The decoder and the `eos_token_id` of a parsed config.json; raises ValueError as `LanguageModelConfig.from_folder`."""
    refuse_vision(raw)
    require("model_type", raw.get("model_type"), OneOf(*LANGUAGE_MODEL_TYPES))
    settings = text_settings(raw)
    return from_fields(TextConfig, settings), settings["eos_token_id"]


def refuse_vision(raw: Mapping[str, Any]) -> None:
    """Raise ValueError where config.json is that of a vision-language model."""
    model_type = raw.get("model_type", NANOVLM if "vit_hidden_dim" in raw else None)
    has_vision = "vision_config" in raw or "text_config" in raw
    if has_vision or (isinstance(model_type, str) and model_type in VLMConfig.families()):
        raise ValueError(
            f"model_type {model_type!r} is a vision-language model, not a decoder alone: "
            "load(...) reads it, and its decoder is .model.language_model"
        )
