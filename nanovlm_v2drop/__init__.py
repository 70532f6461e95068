"""Vision-language models from scratch, with vision-token dropping inside the prefill loop.

    from nanovlm_v2drop import Request, V2Drop, generate, load

    vlm = load("demo")
    request = Request(text="What digit is on the red circle?", images=["scene.png"])
    (answer,) = generate(vlm, [request], V2Drop, retain=1 / 3)

Each public name is imported when it is first used, so that `nanovlm-v2drop --help` does not wait for torch.
"""

import lazy_loader

PUBLIC_NAMES = {
    "dropping": [
        "BatchSchedule", "Chain", "CountSchedule", "DROPPERS", "DropSchedule", "PUBLISHED_SCHEDULES",
        "PrefillState", "Random", "TokenDropper", "V2Drop",
    ],
    "inference": [
        "Answer", "Chat", "NotFinite", "NothingDropped", "Prefilled", "Sampling", "decode_one_token", "generate",
        "initial_state", "prefill", "stream",
    ],
    "loading.text_model": ["Droppable", "TextModel", "load_decoder"],
    "loading.saving": ["save_quantised"],
    "loading.specs": ["MODELS"],
    "loading.zoo": ["VisionLanguageModel", "load"],
    "models.config": [
        "LanguageModelConfig", "LlavaConfig", "LlavaNextConfig", "LlavaOnevisionConfig", "Qwen2VLConfig", "Qwen2_5_VLConfig",
        "Qwen3VLConfig",
        "TextConfig", "VLMConfig", "VisionConfig",
    ],
    "models.decoder": ["Decoder"],
    "models.kv_cache": ["KVCache"],
    "models.language_model": ["LanguageModel", "TextPrompt"],
    "models.qwen2_vl": ["Qwen2VLModel", "Qwen2_5_VLModel"],
    "models.qwen3_vl": ["Qwen3VLModel"],
    "models.vision": ["VisionTrace"],
    "models.vlm": ["LlavaModel", "LlavaNextModel", "LlavaOnevisionModel", "PackedInputs"],
    "processing.prompts": ["Request"],
    "report.watch": ["watch"],
}  # fmt: skip

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=PUBLIC_NAMES)
