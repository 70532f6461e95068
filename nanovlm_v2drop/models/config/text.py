"""The decoder's sizes: LLaMA and Qwen2."""

from dataclasses import dataclass
from typing import Any

from .settings import require_divisible, set_once

# Decoders of this arithmetic; others share LLaMA's tensor names but multiply in between.
TEXT_MODEL_TYPES = ("llama", "llava", "llava_llama", "llava_qwen", "qwen2", "qwen2_vl", "qwen2_vl_text")
# What transformers' Qwen2Config has otherwise than LlamaConfig, and files leave out.
QWEN2_DEFAULTS = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
QWEN2_EOS_TOKEN_IDS = [151645, 151643]  # <|im_end|>, <|endoftext|>


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
