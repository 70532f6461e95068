"""Model configurations, filled from the official config.json: one file a family.

Field names are Hugging Face's, so a config.json needs no second dictionary. The defaults are the ones that the official
files leave out: llava-hf/llava-1.5-7b-hf stores neither the LLaMA sizes nor the CLIP activation, Qwen/Qwen2-VL-7B-Instruct
not the depth of its tower.
"""

from .language_model import LanguageModelConfig
from .llava import LlavaConfig
from .llava_next import LlavaNextConfig
from .llava_onevision import LlavaOnevisionConfig
from .nanovlm import NanoVLMConfig
from .qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLVisionConfig
from .qwen2_vl import Qwen2VLConfig, Qwen2VLVisionConfig, QwenVisionConfig
from .qwen3_vl import Qwen3VLConfig, Qwen3VLVisionConfig
from .rope import DynamicScaling, LengthScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from .settings import from_fields, read_json_object
from .smolvlm import SmolVLMConfig
from .text import ARITHMETIC, TextConfig, flatten_rope
from .vision import SiglipVisionConfig, VisionConfig
from .vlm import VLMConfig

__all__ = [
    "ARITHMETIC",
    "DynamicScaling",
    "LanguageModelConfig",
    "LengthScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LlavaConfig",
    "LlavaNextConfig",
    "LlavaOnevisionConfig",
    "NanoVLMConfig",
    "Qwen2VLConfig",
    "Qwen2VLVisionConfig",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLVisionConfig",
    "Qwen3VLConfig",
    "Qwen3VLVisionConfig",
    "QwenVisionConfig",
    "RopeScaling",
    "SiglipVisionConfig",
    "SmolVLMConfig",
    "TextConfig",
    "VLMConfig",
    "VisionConfig",
    "YarnScaling",
    "flatten_rope",
    "from_fields",
    "read_json_object",
]
