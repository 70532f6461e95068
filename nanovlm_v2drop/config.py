"""Model configurations, filled from the official config.json.

Field names are Hugging Face's, so a config.json needs no second dictionary. The defaults are the ones that the official
files leave out: llava-hf/llava-1.5-7b-hf stores neither the LLaMA sizes nor the CLIP activation.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
# Decoders of this arithmetic; others share LLaMA's tensor names but multiply in between.
TEXT_MODEL_TYPES = ("llama", "llava", "llava_llama", "qwen2", "qwen2_vl", "qwen2_vl_text")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower; defaults are openai/clip-vit-large-patch14-336."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        require_divisible("image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Vision tokens of one picture: 576 for LLaVA-1.5."""
        return self.grid_size**2


@dataclass(frozen=True)
class TextConfig:
    """LLaMA / Qwen2 decoder; defaults are those of transformers' LlamaConfig (the 7B sizes)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] | None = None
    qkv_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        set_once(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        set_once(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_divisible("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.kv_heads)
        if self.mrope_section is not None and sum(self.mrope_section) * 2 != self.head_size:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half of head_dim {self.head_dim}")

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, which is never None after construction."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """head_dim, which is never None after construction."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VLMConfig:
    """A vision tower, a projector and a decoder, in LLaVA's arrangement."""

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        depth = self.vision_config.num_hidden_layers
        if type(self.vision_feature_layer) is not int:
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer!r} is not supported; it must be one number")
        if not -depth - 1 <= self.vision_feature_layer <= depth:
            raise ValueError(f"vision_feature_layer {self.vision_feature_layer} is outside a tower of {depth} layers")

    @property
    def vision_layers_run(self) -> int:
        """Blocks before the feature layer; hidden state 0 is the embedding, so -2 leaves the last block out."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

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
        """From the parsed config.json of llava-hf (nested) or liuhaotian (flat, `mm_` fields)."""
        model_type = raw.get("model_type")
        if model_type not in ("llava", "llava_llama"):
            raise ValueError(f"model_type {model_type!r} is not supported; known: llava, llava_llama")
        text = raw.get("text_config", raw)
        vision = raw.get("vision_config", {})
        check_supported(raw, text, vision)
        eos = next(value for value in (eos_token_id, text.get("eos_token_id"), 2) if value is not None)
        return cls(
            vision_config=from_fields(VisionConfig, vision),
            text_config=from_fields(TextConfig, flatten_rope(text)),
            image_token_id=raw.get("image_token_index", raw.get("image_token_id", cls.image_token_id)),
            vision_feature_layer=raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a settings file; raises ValueError where it holds anything else than one JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def from_fields(config: type[Config], raw: dict[str, Any]) -> Config:
    """Build a dataclass from the entries of `raw` that it has fields for; lists become tuples, null is a default."""
    names = {item.name for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {name: value for name, value in raw.items() if name in names and value is not None}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def flatten_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Bring the three spellings of the rotary settings (rope_theta, rope_scaling, rope_parameters) into plain fields."""
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope type {kind!r} is not supported; known: default, mrope")
    known = {name: rope[name] for name in ("rope_theta", "mrope_section") if name in rope}
    return {**text, **known, "qkv_bias": text.get("model_type", "").startswith("qwen2")}


def check_supported(raw: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Refuse settings that would silently change the numbers."""
    expected = [
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("text_config.model_type", text.get("model_type", "llama"), TEXT_MODEL_TYPES),
        ("text_config.mlp_bias", text.get("mlp_bias", False), (False,)),
        ("text_config.attention_bias", text.get("attention_bias", False), (False,)),
        ("vision_config.model_type", vision.get("model_type", "clip_vision_model"), ("clip_vision_model",)),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("mm_projector_type", raw.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu",)),
        ("multimodal_projector_bias", raw.get("multimodal_projector_bias", True), (True,)),
        ("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ("patch",)),
        ("vision_feature_select_strategy", raw.get("vision_feature_select_strategy", "default"), ("default",)),
    ]
    for name, value, known in expected:
        if value not in known:
            raise ValueError(f"{name} = {value!r} is not supported; known: {', '.join(map(repr, known))}")


def require_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError with both numbers unless `value` is a positive multiple of `divisor`."""
    if divisor <= 0 or value <= 0 or value % divisor:
        raise ValueError(f"{name} {value} must be a positive multiple of {divisor_name} {divisor}")


def set_once(config: object, name: str, value: object) -> None:
    """Fill a field of a frozen dataclass that was left None."""
    if getattr(config, name) is None:
        object.__setattr__(config, name, value)
