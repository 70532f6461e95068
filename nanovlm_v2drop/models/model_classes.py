"""The model of each family, by its configuration."""

from collections.abc import Callable
from typing import Any

from .config import (
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
from .qwen2_vl import Qwen2_5_VLModel, Qwen2VLModel
from .qwen3_vl import Qwen3VLModel
from .smolvlm import NanoVLMModel, SmolVLMModel
from .vlm import VLM, LlavaModel, LlavaNextModel, LlavaOnevisionModel

MODEL_CLASSES: dict[type[VLMConfig], Callable[[Any, str], VLM]] = {
    LlavaConfig: LlavaModel,
    LlavaNextConfig: LlavaNextModel,
    LlavaOnevisionConfig: LlavaOnevisionModel,
    Qwen2VLConfig: Qwen2VLModel,
    Qwen2_5_VLConfig: Qwen2_5_VLModel,
    Qwen3VLConfig: Qwen3VLModel,
    SmolVLMConfig: SmolVLMModel,
    NanoVLMConfig: NanoVLMModel,
}
