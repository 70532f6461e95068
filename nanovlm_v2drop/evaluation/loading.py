"""From options to a model: those of the command line, and those of `--model_args` of lmms-eval."""

import argparse

from ..loading.zoo import VisionLanguageModel, load
from ..processing.images import DEFAULT_ASPECT_RATIO
from ..processing.video import SAMPLINGS, FrameSampling


def load_model(arguments: argparse.Namespace) -> VisionLanguageModel:
    """The model that the options name; raises as `load`."""
    vlm = load(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        image_aspect_ratio=arguments.image_aspect_ratio or DEFAULT_ASPECT_RATIO,
        template=arguments.template,
        attention=arguments.attention,
        weights=arguments.weights,
        max_pixels=arguments.max_pixels,
        sampling=sampling_of(arguments),
        kv_cache_dtype=arguments.kv_cache_dtype,
        tensor_parallel=arguments.tensor_parallel,
    )
    if arguments.compile:
        vlm.model.language_model.compile_layers()
    return vlm


def sampling_of(arguments: argparse.Namespace) -> FrameSampling | None:
    """How frames are chosen from a video file; None is the model's own way. Raises ValueError for an unknown sampling."""
    name, frames = arguments.sampling, arguments.frames
    if name is None and frames is None:
        return None
    if name not in (None, *SAMPLINGS):
        raise ValueError(f"unknown sampling {name!r}; choose one of: {', '.join(SAMPLINGS)}")
    limit = {} if frames is None else {"max_frames" if name in ("fps", "qwen3-vl", "smolvlm") else "num_frames": frames}
    return SAMPLINGS[name or "uniform"](**limit)
