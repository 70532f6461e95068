"""Vision-language models from scratch, with vision-token dropping inside the prefill loop.

    from nanovlm_v2drop import DropSchedule, Request, V2Drop, generate, load

    vlm = load("demo")
    request = Request(text="What digit is on the red circle?", images=["scene.png"])
    (answer,) = generate(vlm, [request], V2Drop(DropSchedule.for_mean_tokens(32, 144, 12)))
"""

from .config import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, Qwen2VLConfig, TextConfig, VisionConfig, VLMConfig
from .decoder import Decoder
from .dropping import DROPPERS, PUBLISHED_SCHEDULES, BatchSchedule, DropSchedule, PrefillState, Random, TokenDropper, V2Drop
from .inference import Answer, NothingDropped, Prefilled, Sampling, decode_one_token, generate, prefill, stream
from .kv_cache import KVCache
from .prompts import Request
from .vlm import LlavaModel, LlavaNextModel, LlavaOnevisionModel, PackedInputs, Qwen2VLModel
from .zoo import MODELS, VisionLanguageModel, load

__all__ = [
    "DROPPERS",
    "MODELS",
    "PUBLISHED_SCHEDULES",
    "Answer",
    "BatchSchedule",
    "Decoder",
    "DropSchedule",
    "KVCache",
    "LlavaConfig",
    "LlavaModel",
    "LlavaNextConfig",
    "LlavaNextModel",
    "LlavaOnevisionConfig",
    "LlavaOnevisionModel",
    "NothingDropped",
    "PackedInputs",
    "PrefillState",
    "Prefilled",
    "Qwen2VLConfig",
    "Qwen2VLModel",
    "Random",
    "Request",
    "Sampling",
    "TextConfig",
    "TokenDropper",
    "V2Drop",
    "VLMConfig",
    "VisionConfig",
    "VisionLanguageModel",
    "decode_one_token",
    "generate",
    "load",
    "prefill",
    "stream",
]
