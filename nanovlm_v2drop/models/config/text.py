"""The decoder's sizes: LLaMA, Mistral, Qwen2, Qwen2-VL, Qwen2.5-VL, Qwen3 and Qwen3-VL."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from .rope import MROPE_SECTION, POSITIONS, ROPE_THETA, RopeScaling, ScalingKind, rope_fields
from .settings import (
    FLAG,
    JSON_OBJECT,
    TOKEN_IDS,
    Checked,
    Depth,
    Epsilon,
    Flag,
    Heads,
    Kind,
    ListOf,
    OneOf,
    Whole,
    Width,
    checked,
    kinds_of,
    or_null,
    require_divisible,
    set_once,
)

# What transformers' classes have where a file says nothing, by the text section's model_type; TextConfig has LlamaConfig's.
LLAMA: dict[str, Any] = {"qkv_bias": False, "qk_norm": False, "mrope_interleaved": False, "eos_token_id": 2}
MISTRAL: dict[str, Any] = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2: dict[str, Any] = {
    **LLAMA,
    "qkv_bias": True,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "eos_token_id": (151645, 151643),  # <|im_end|>, <|endoftext|>: transformers has none, the released files have these
}
QWEN2_VL: dict[str, Any] = {
    **QWEN2,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
}
QWEN3: dict[str, Any] = {**QWEN2, "qkv_bias": False, "qk_norm": True, "head_dim": 128}
QWEN3_VL: dict[str, Any] = {
    **QWEN3,
    "mrope_interleaved": True,
    "mrope_section": (24, 20, 20),
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
}
# Only decoders of this arithmetic. Others share LLaMA's tensor names but multiply in between.
TEXT_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llava": LLAMA,
    "llava_llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "llava_qwen": QWEN2,
    "qwen2_vl": QWEN2_VL,
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3": QWEN3,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_text": QWEN3_VL,
}
LANGUAGE_MODEL_TYPES = ("llama", "qwen2", "qwen3")  # those of a checkpoint that is a decoder alone
ARITHMETIC = ("qkv_bias", "qk_norm", "mrope_interleaved")  # the model_type decides these; config.json has no say


@dataclass(frozen=True)
class TextConfig(Checked):
    """LLaMA / Qwen2 / Qwen3 decoder; defaults are those of transformers' LlamaConfig (the 7B sizes).

    `qk_norm`: an RMS norm on each head of the queries and keys, before the rotation. `mrope_section`: how many frequencies each
    axis of multimodal positions has; `mrope_interleaved`: the axes take turns, instead of one block of frequencies each.
    """

    vocab_size: Annotated[int, Whole(1, 2**24)] = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Depth = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Annotated[int, or_null(Whole(1, 4096))] = 0  # 0: num_attention_heads
    head_dim: Annotated[int, or_null(Whole(2, 1024))] = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: Annotated[int, POSITIONS] = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Annotated[float, ROPE_THETA] = 10000.0
    mrope_section: Annotated[tuple[int, ...] | None, MROPE_SECTION] = None
    mrope_interleaved: Flag = False
    rotary_scaling: Annotated[RopeScaling | None, ScalingKind()] = None  # rope_scaling or rope_parameters of config.json
    qkv_bias: Flag = False
    qk_norm: Flag = False
    tie_word_embeddings: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_once(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        set_once(self, "head_dim", self.hidden_size // self.num_attention_heads)
        require_divisible("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        if self.mrope_section is not None and sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to half of head_dim {self.head_dim}")
        if self.rotary_scaling is not None:
            object.__setattr__(self, "rotary_scaling", self.rotary_scaling.completed(self.max_position_embeddings))
            self.rotary_scaling.check(self.head_dim, self.rope_theta)

    @property
    def context_length(self) -> int | None:
        """The longest prompt in tokens; None where the rotary frequencies follow the length of each prompt."""
        return context_length(self.max_position_embeddings, self.rotary_scaling)

    @property
    def rope_follows_length(self) -> bool:
        """Whether the rotary frequencies of a sequence depend on its length."""
        return self.rotary_scaling is not None and self.rotary_scaling.follows_length


def context_length(max_position_embeddings: int, rope_scaling: RopeScaling | None) -> int | None:
    """The longest prompt in tokens of a decoder with these settings; None has no limit."""
    if rope_scaling is None:
        return max_position_embeddings
    return rope_scaling.completed(max_position_embeddings).context_length(max_position_embeddings)


# What a text section may say besides the fields of TextConfig.
TEXT_SETTINGS: dict[str, Kind] = {
    "model_type": OneOf(*TEXT_MODEL_TYPES),
    "rope_theta": or_null(ROPE_THETA),  # null where rope_parameters has it
    "hidden_act": OneOf("silu"),
    "mlp_bias": OneOf(False),
    "attention_bias": OneOf(False),
    "eos_token_id": or_null(TOKEN_IDS),
    "rope_scaling": or_null(JSON_OBJECT),
    "rope_parameters": or_null(JSON_OBJECT),
    "original_max_position_embeddings": or_null(POSITIONS),
    "use_sliding_window": or_null(FLAG),
    "sliding_window": or_null(Whole(1, 2**27)),
    "max_window_layers": or_null(Whole(0, 4096)),
    "layer_types": or_null(ListOf(OneOf("full_attention", "sliding_attention"), 0, 1024)),
}


def text_settings(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A text section, checked, with what its model_type leaves out: the fields of TextConfig, and eos_token_id.

    Raises ValueError for a setting of another kind, and for one that would silently change the numbers.
    """
    given = flatten_rope(checked(raw, {**kinds_of(TextConfig), **TEXT_SETTINGS}, prefix), prefix)
    model_type = TEXT_MODEL_TYPES[given.get("model_type", "llama")]
    settings = {**model_type, **given}
    check_full_attention(settings, prefix)
    if settings.get("eos_token_id") is None:
        settings["eos_token_id"] = model_type["eos_token_id"]
    return settings


def same_arithmetic(model_type: str) -> OneOf:
    """The text sections' model types that compute as this one does."""
    own = [TEXT_MODEL_TYPES[model_type][name] for name in ARITHMETIC]
    return OneOf(*(other for other, known in TEXT_MODEL_TYPES.items() if [known[name] for name in ARITHMETIC] == own))


def flatten_rope(text: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Bring the three spellings of the rotary settings (rope_theta, rope_scaling, rope_parameters) into fields of TextConfig.

    As in transformers, a rope_scaling that holds anything replaces rope_parameters as a whole.
    """
    model_type = TEXT_MODEL_TYPES.get(text.get("model_type", "llama"), LLAMA)
    section = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope, place = text.get(section) or {}, f"{prefix}{section}."
    checked(rope, {"mrope_interleaved": OneOf(model_type["mrope_interleaved"])}, place)
    fields = rope_fields(rope, place, text.get("original_max_position_embeddings"))
    return {**text, **{name: model_type[name] for name in ARITHMETIC}, **fields}


def check_full_attention(text: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError where some layer would attend to a window that is smaller than the context."""
    window, positions = text.get("sliding_window", 4096), text.get("max_position_embeddings")
    context = context_length(positions or TextConfig.max_position_embeddings, text.get("rotary_scaling"))
    if attends_to_window(text) and not (window is not None and context is not None and window >= context):
        setting = "" if text.get("model_type") == "mistral" else "use_sliding_window with a "
        raise ValueError(
            f"{prefix}{setting}sliding_window of {window} tokens is not supported, because it is smaller than "
            + (f"the context of max_position_embeddings {context}" if context else "prompts of a context without limit")
            + "; only full attention is implemented"
        )


def attends_to_window(text: Mapping[str, Any]) -> bool:
    """Whether some layer attends to a window: all of Mistral's where there is a window, those that the file names in Qwen2."""
    if text.get("model_type") == "mistral":
        return text["sliding_window"] is not None
    if text.get("layer_types") is not None:
        return "sliding_attention" in text["layer_types"]
    first, layers = text.get("max_window_layers"), text.get("num_hidden_layers", TextConfig.num_hidden_layers)
    has_window = text.get("sliding_window", 4096) is not None
    return bool(text.get("use_sliding_window")) and has_window and first is not None and first < layers
