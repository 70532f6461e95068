"""The model of each family, by its configuration."""

from collections.abc import Callable
from typing import Any

from .config import (
    LanguageModelConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    NanoVLMConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    VLMConfig,
)
from .language_model import LanguageModel
from .qwen2_vl import Qwen2_5_VLModel, Qwen2VLModel
from .qwen3_vl import Qwen3VLModel
from .smolvlm import NanoVLMModel, SmolVLMModel
from .vlm import LlavaModel, LlavaNextModel, LlavaOnevisionModel

MODEL_CLASSES: dict[type[VLMConfig | LanguageModelConfig], Callable[[Any, str], Any]] = {
    LanguageModelConfig: LanguageModel,
    LlavaConfig: LlavaModel,
    LlavaNextConfig: LlavaNextModel,
    LlavaOnevisionConfig: LlavaOnevisionModel,
    Qwen2VLConfig: Qwen2VLModel,
    Qwen2_5_VLConfig: Qwen2_5_VLModel,
    Qwen3VLConfig: Qwen3VLModel,
    SmolVLMConfig: SmolVLMModel,
    NanoVLMConfig: NanoVLMModel,
}
