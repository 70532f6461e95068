"""Model configurations, filled from the official config.json.

Field names are Hugging Face's, so a config.json needs no second dictionary. The defaults are the ones that the official
files leave out: llava-hf/llava-1.5-7b-hf stores neither the LLaMA sizes nor the CLIP activation, Qwen/Qwen2-VL-7B-Instruct
not the depth of its tower.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

Config = TypeVar("Config")
# Decoders of this arithmetic; others share LLaMA's tensor names but multiply in between.
TEXT_MODEL_TYPES = ("llama", "llava", "llava_llama", "llava_qwen", "qwen2", "qwen2_vl", "qwen2_vl_text")
# What transformers' Qwen2Config has otherwise than LlamaConfig, and files leave out.
QWEN2_DEFAULTS = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
# The same of Qwen2VLTextConfig.
QWEN2_VL_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
QWEN2_EOS_TOKEN_IDS = [151645, 151643]  # <|im_end|>, <|endoftext|>
# What transformers' SiglipVisionConfig has otherwise than the tower that LLaVA-OneVision has where a file names none.
SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


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
        self.check_image_size()

    def check_image_size(self) -> None:
        require_divisible("image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one picture: the 576 vision tokens of LLaVA-1.5."""
        return self.grid_size**2


@dataclass(frozen=True)
class SiglipVisionConfig(VisionConfig):
    """SigLIP vision tower; defaults are google/siglip-so400m-patch14-384. Its last pixels fill no patch: 27 x 14 = 378."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    image_size: int = 384
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def check_image_size(self) -> None:
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size {self.patch_size} must be in 1..image_size {self.image_size}")


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Qwen2-VL's own vision tower; `hidden_size` is the decoder's width, `embed_dim` the tower's."""

    depth: int = 32
    embed_dim: int = 1280
    hidden_size: int = 3584
    hidden_act: str = "quick_gelu"
    mlp_ratio: int = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        require_divisible("embed_dim", self.embed_dim, "4 * num_heads (two axes of rotated pairs)", 4 * self.num_heads)


@dataclass(frozen=True)
class TextConfig:
    """LLaMA / Qwen2 decoder; defaults are those of transformers' LlamaConfig (the 7B sizes)."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: num_attention_heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] | None = None
    qkv_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        set_once(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        set_once(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_divisible("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        if self.mrope_section is not None and sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half of head_dim {self.head_dim}")


@dataclass(frozen=True)
class VLMConfig:
    """What every family has: a decoder, and the tokens that stand where vision features go."""

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
        """From the parsed config.json of any known family; see MODEL_TYPES."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r} is not supported; known: {', '.join(MODEL_TYPES)}")
        family = MODEL_TYPES[model_type]
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


@dataclass(frozen=True)
class LlavaConfig(VLMConfig):
    """LLaVA-1.5: CLIP, projector, LLaMA."""

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    vision_feature_layer: int = -2

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
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        merge_type = ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat"), ("flat",))  # LLaVA-1.6's original says
        return [*llava_settings(raw, "clip_vision_model", "default"), merge_type]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """llava-hf's file is nested, liuhaotian's flat with `mm_` fields."""
        return {
            "vision_config": from_fields(VisionConfig, raw.get("vision_config", {})),
            "image_token_id": raw.get("image_token_index", raw.get("image_token_id", cls.image_token_id)),
            "vision_feature_layer": raw.get("vision_feature_layer", raw.get("mm_vision_select_layer", -2)),
        }

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        return {}

    @classmethod
    def default_eos(cls) -> int | list[int]:
        return 2


@dataclass(frozen=True)
class LlavaNextConfig(LlavaConfig):
    """LLaVA-1.6 (LLaVA-NeXT): LLaVA-1.5 with pictures in tiles.

    `image_grid_pinpoints` (height, width) in pixels: the sizes that a picture may be resized to.
    """

    image_grid_pinpoints: tuple[tuple[int, int], ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in {side for pinpoint in self.image_grid_pinpoints for side in pinpoint}:
            require_divisible("image_grid_pinpoints", side, "image_size", self.vision_config.image_size)

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many: as many as there can be, so never."""
        return max(height * width for height, width in self.image_grid_pinpoints) // self.vision_config.image_size**2

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        pinpoints = read_pinpoints(raw.get("image_grid_pinpoints"))
        return {**super().own_fields(raw), **({} if pinpoints is None else {"image_grid_pinpoints": pinpoints})}


@dataclass(frozen=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """LLaVA-OneVision: SigLIP, projector, Qwen2; pictures in tiles, several pictures, video. LLaVA-Video differs on video only.

    The released towers have 26 blocks, one less than SigLIP, and all of them run. `mm_spatial_pool_mode`: how a frame is
    halved, "bilinear" or "average"; `mm_newline_position`: a newline behind the video ("one_token") or every row ("grid").
    """

    image_token_id: int = 151646
    video_token_id: int | None = 151647
    eos_token_ids: tuple[int, ...] = tuple(QWEN2_EOS_TOKEN_IDS)
    vision_config: VisionConfig = field(default_factory=lambda: SiglipVisionConfig(num_hidden_layers=26))
    vision_feature_layer: int = -1
    image_grid_pinpoints: tuple[tuple[int, int], ...] = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))
    vision_aspect_ratio: str = "anyres_max_9"
    mm_spatial_pool_mode: str = "bilinear"
    mm_newline_position: str = "one_token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.fullmatch(r"anyres_max_\d+", self.vision_aspect_ratio) is None:
            raise ValueError(f"vision_aspect_ratio {self.vision_aspect_ratio!r} is not supported; known: anyres_max_N")

    @property
    def video_layout(self) -> tuple[str, str]:
        """How frames become tokens, as arrange.arrange_video takes it."""
        return self.mm_spatial_pool_mode, self.mm_newline_position

    @property
    def max_tiles(self) -> int:
        """A picture of more tiles than this is scaled down to about as many."""
        return int(self.vision_aspect_ratio.rpartition("_")[2])

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        return [
            *llava_settings(raw, "siglip_vision_model", "full"),
            ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "spatial_unpad"), ("spatial_unpad",)),
            ("mm_newline_position", raw.get("mm_newline_position", cls.mm_newline_position), ("one_token", "grid")),
            ("mm_spatial_pool_mode", raw.get("mm_spatial_pool_mode", cls.mm_spatial_pool_mode), ("bilinear", "average")),
            ("mm_spatial_pool_stride", raw.get("mm_spatial_pool_stride", 2), (2,)),
            ("add_faster_video", raw.get("add_faster_video", False), (False, None)),
        ]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """llava-hf's file is nested; lmms-lab's flat one says nothing of the tower, which is always the same."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        given = {
            "image_token_id": raw.get("image_token_index", raw.get("image_token_id")),
            "video_token_id": raw.get("video_token_index", raw.get("video_token_id")),
            "vision_aspect_ratio": raw.get("vision_aspect_ratio", raw.get("image_aspect_ratio")),
            "vision_feature_layer": raw.get("vision_feature_layer"),
            "image_grid_pinpoints": read_pinpoints(raw.get("image_grid_pinpoints")),
            "mm_spatial_pool_mode": raw.get("mm_spatial_pool_mode"),
            "mm_newline_position": raw.get("mm_newline_position"),
        }
        fields = {name: defaults[name] if value is None else value for name, value in given.items()}
        tower = {**SIGLIP_DEFAULTS, **raw["vision_config"]} if "vision_config" in raw else {"num_hidden_layers": 26}
        return {**fields, "vision_config": from_fields(SiglipVisionConfig, tower)}

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        """As Qwen2Config's, whose key/value heads do not follow the attention heads."""
        return {**QWEN2_DEFAULTS, "num_key_value_heads": 32}

    @classmethod
    def default_eos(cls) -> int | list[int]:
        return QWEN2_EOS_TOKEN_IDS


@dataclass(frozen=True)
class Qwen2VLConfig(VLMConfig):
    """Qwen2-VL: its own tower on pictures of any size, Qwen2 with multimodal positions."""

    vision_token_names: ClassVar[tuple[str, ...]] = ("<|image_pad|>", "<|video_pad|>")
    image_token_id: int = 151655
    video_token_id: int | None = 151656
    eos_token_ids: tuple[int, ...] = tuple(QWEN2_EOS_TOKEN_IDS)
    vision_config: Qwen2VLVisionConfig = field(default_factory=Qwen2VLVisionConfig)

    def __post_init__(self) -> None:
        if self.vision_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"vision_config.hidden_size {self.vision_config.hidden_size} must be the decoder's "
                f"hidden_size {self.text_config.hidden_size}"
            )
        if self.text_config.mrope_section is None:
            raise ValueError("Qwen2-VL's rope_scaling must have an mrope_section, three numbers; is config.json complete?")

    @classmethod
    def supported(cls, raw: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
        vision = raw.get("vision_config", {})
        kind = vision.get("model_type", "qwen2_vl")
        return [("vision_config.model_type", kind, ("qwen2_vl", "qwen2_vl_vision"))]

    @classmethod
    def own_fields(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The hub's file is flat and spells in_channels `in_chans`; newer versions nest the decoder."""
        vision = raw.get("vision_config", {})
        return {
            "vision_config": from_fields(Qwen2VLVisionConfig, {"in_channels": vision.get("in_chans"), **vision}),
            "image_token_id": raw.get("image_token_id", cls.image_token_id),
            "video_token_id": raw.get("video_token_id", cls.video_token_id),
        }

    @classmethod
    def text_defaults(cls) -> dict[str, Any]:
        """As Qwen2VLTextConfig's, which are the sizes of the 72B; files that only say what differs leave them out."""
        return QWEN2_VL_DEFAULTS


MODEL_TYPES: dict[str, type[VLMConfig]] = {
    "llava": LlavaConfig,
    "llava_llama": LlavaConfig,
    "llava_next": LlavaNextConfig,
    "llava_onevision": LlavaOnevisionConfig,
    "llava_qwen": LlavaOnevisionConfig,
    "qwen2_vl": Qwen2VLConfig,
}


def llava_settings(raw: dict[str, Any], tower: str, strategy: str) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """What the projector and the tower of a LLaVA must be."""
    vision = raw.get("vision_config", {})
    return [
        ("vision_config.model_type", vision.get("model_type", tower), (tower,)),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("mm_projector_type", raw.get("mm_projector_type", "mlp2x_gelu"), ("mlp2x_gelu",)),
        ("multimodal_projector_bias", raw.get("multimodal_projector_bias", True), (True,)),
        ("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ("patch",)),
        ("vision_feature_select_strategy", raw.get("vision_feature_select_strategy", strategy), (strategy,)),
    ]


def read_pinpoints(value: Any) -> tuple[tuple[int, int], ...] | None:
    """[[height, width], ...] in pixels; lmms-lab also writes "(1x1),...,(6x6)", in tiles of 384 pixels."""
    if isinstance(value, str):
        ends = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", value.replace(" ", ""))
        if ends is None:
            raise ValueError(f"image_grid_pinpoints {value!r} is not supported; expected [[height, width], ...] in pixels")
        first_high, first_wide, last_high, last_wide = map(int, ends.groups())
        rows, columns = range(first_high, last_high + 1), range(first_wide, last_wide + 1)
        return tuple((384 * high, 384 * wide) for high in rows for wide in columns)
    return None if value is None else tuple((height, width) for height, width in value)


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
    return {**text, **known, "qkv_bias": "qwen" in text.get("model_type", "")}


def check_supported(text: dict[str, Any], expected_of_family: list[tuple[str, Any, tuple[Any, ...]]]) -> None:
    """Refuse settings that would silently change the numbers."""
    expected = [
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("text_config.model_type", text.get("model_type", "llama"), TEXT_MODEL_TYPES),
        ("text_config.mlp_bias", text.get("mlp_bias", False), (False,)),
        ("text_config.attention_bias", text.get("attention_bias", False), (False,)),
        ("text_config.use_sliding_window", text.get("use_sliding_window", False), (False, None)),
        *expected_of_family,
    ]
    for name, value, known in expected:
        if value not in known:
            raise ValueError(f"{name} = {value!r} is not supported; known: {', '.join(map(repr, known))}")


def require_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    """Raise ValueError with both numbers unless `value` is a positive multiple of `divisor`."""
    if divisor <= 0 or value <= 0 or value % divisor:
        raise ValueError(f"{name} {value} must be a positive multiple of {divisor_name} {divisor}")


def set_once(config: object, name: str, value: object) -> None:
    """Fill a field of a frozen dataclass that was left empty, or null in config.json."""
    if not getattr(config, name):
        object.__setattr__(config, name, value)
