"""Official safetensors checkpoints become models, strictly; the models by name."""

import lazy_loader

# `loading.specs` must be importable without torch, so these names are imported when they are first used.
PUBLIC_NAMES = {"text_model": ["load_decoder"], "zoo": ["load"]}

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=PUBLIC_NAMES)
