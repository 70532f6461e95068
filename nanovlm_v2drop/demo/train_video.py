"""The recipe of weights/demo-video: a LLaVA-OneVision that starts from the weights of demo and learns the clips of clips.py."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..models.arrange import arrange_video
from ..models.config import VLMConfig
from ..models.vlm import LlavaOnevisionModel
from ..processing.images_onevision import SIGLIP_IMAGE_MEAN, SIGLIP_IMAGE_STD
from . import clips
from .data import CLIPS, VISION, qwen2_tokenizer, video_corpus
from .export import export_onevision, onevision_settings
from .recipe import Demo, Recipe, padded_vocabulary


def demo_video_config(tokenizer: Tokenizer) -> VLMConfig:
    """The demo's decoder with Qwen2's biases, and a tower and projector of the demo's widths in SigLIP's layout."""
    settings = onevision_settings(tokenizer, padded_vocabulary(tokenizer))
    return VLMConfig.from_official(settings["config.json"], settings["generation_config.json"]["eos_token_id"])


def clip_features(model: LlavaOnevisionModel, seen: Tensor) -> Tensor:
    """The tower's output for N clips of F frames (N * F, P, V) -> vision tokens (N, F * pooled patches + 1, D)."""
    frames = model.multi_modal_projector(seen).unflatten(0, (-1, clips.FRAMES))
    newline = model.image_newline.to(frames.dtype)
    return torch.stack([arrange_video(clip, newline, *model.config.video_layout) for clip in frames])


DEMO_VIDEO = Demo(
    world=CLIPS,
    make_tokenizer=lambda: qwen2_tokenizer(video_corpus()),
    make_config=demo_video_config,
    make_model=LlavaOnevisionModel,
    media_features=clip_features,
    export=export_onevision,
    vision_tokens=clips.FRAMES * (-(-VISION.grid_size // 2)) ** 2 + 1,
    image_mean=SIGLIP_IMAGE_MEAN,
    image_std=SIGLIP_IMAGE_STD,
    recipe=Recipe(
        tower_steps=600,
        tower_rate=1e-3,
        instruct_steps=2200,
        instruct_batch=16,
        muon_rate=2e-3,
        adam_rate=1e-3,
        late_step=1400,
        stop_step=2200,
        text_tokens=192,
    ),
    warm=True,
)
