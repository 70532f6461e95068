"""What the configurations of all families have in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .settings import from_fields, read_json_object
from .text import QWEN2_DEFAULTS, QWEN2_EOS_TOKEN_IDS, TextConfig, check_supported, flatten_rope


@dataclass(frozen=True)
class VLMConfig:
    """What every family has: a decoder, and the tokens that stand where vision features go."""

    model_types: ClassVar[tuple[str, ...]] = ()  # the family's names in config.json
    vision_token_names: ClassVar[tuple[str, ...]] = ("<image>", "<video>")  # as the tokenizer spells them
    text_config: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    video_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def vision_tokens(self) -> dict[str, int]:
        """Name and id of each token that stands where vision features go."""
        ids = (self.image_token_id, self.video_token_id)
        return {name: token for name, token in zip(self.vision_token_names, ids, strict=True) if token is not None}

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

        Raises FileNotFoundError without a config.json, ValueError for a model type or setting that is not implemented.
        """
        path, generation = folder / "config.json", folder / "generation_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no config.json; is it a checkpoint folder?")
        eos = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
        return cls.from_official(read_json_object(path), eos)

    @classmethod
    def from_official(cls, raw: dict[str, Any], eos_token_id: int | list[int] | None = None) -> "VLMConfig":
        """From the parsed config.json of any known family."""
        model_type = raw.get("model_type")
        families = VLMConfig.families()
        if model_type not in families:
            raise ValueError(f"model_type {model_type!r} is not supported; known: {', '.join(families)}")
        family = families[model_type]
        text = {"tie_word_embeddings": raw.get("tie_word_embeddings", False), **raw.get("text_config", raw)}
        check_supported(text, family.supported(raw))
        eos = next(value for value in (eos_token_id, text.get("eos_token_id"), family.default_eos()) if value is not None)
        common: dict[str, Any] = {
            "text_config": from_fields(TextConfig, {**family.text_defaults(), **flatten_rope(text)}),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        }
        return family(**common, **family.own_fields(raw))

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        """Settings of this family that must have one of the values given: (name, value, known values)."""
        raise NotImplementedError(f"{cls.__name__} is not a family")

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The fields that this family reads from its config.json."""
        raise NotImplementedError(f"{cls.__name__} is not a family")

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        """What its decoder has otherwise than LLaMA where the file says nothing."""
        return QWEN2_DEFAULTS

    @classmethod
    def default_eos(cls) -> int | list[int]:
        return QWEN2_EOS_TOKEN_IDS
